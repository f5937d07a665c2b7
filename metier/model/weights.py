"""Weights from safetensors straight onto the device, tensor by tensor, into a model that was built empty.

A tensor is read (memory-mapped), copied to the device and cast there; so the host never holds more than one shard,
and the device never more than the finished model and one tensor. `replace` may exchange each linear layer for
a quantised one as soon as its weight is there: a model that fits only quantised never exists in full.

Limits: the checkpoint's names are the model's own. Where they are not (`can_fill` says so), transformers' loader,
which knows every old spelling, does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

# (a linear layer's full name, the layer, loaded) -> what takes its place, or None to leave it.
Replace = Callable[[str, nn.Linear], nn.Module | None]


def shard_names(folder: Path) -> dict[str, Path]:
    """Which of the folder's *.safetensors holds each tensor, from their headers alone."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names.update(dict.fromkeys(tensors.keys(), file))
    return names


def can_fill(model: Any, names: Iterable[str], shapes: dict[str, list[int]]) -> bool:
    """Whether tensors of these names and shapes are all that `model`, built empty, needs, each under its own name."""
    held = set(names)
    own = dict(model.named_parameters())
    every = dict(model.named_parameters(remove_duplicate=False))
    is_plain = not model._keep_in_fp32_modules and not model._keep_in_fp32_modules_strict
    has_buffers = any(name in model.state_dict() for name, _ in model.named_buffers())
    # Both names of a tied pair: whether they are equal is transformers' question.
    both = held & (every.keys() - own.keys())
    fits = all(name in held and shapes[name] == list(parameter.shape) for name, parameter in own.items())
    return bool(is_plain and not has_buffers and not both and fits)


def shapes_of(names: dict[str, Path]) -> dict[str, list[int]]:
    """The shape of each tensor in `names`, from the headers."""
    shapes = {}
    for file in sorted(set(names.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, not a dict
                shapes[name] = list(tensors.get_slice(name).get_shape())
    return shapes


def fill(
    model: nn.Module,
    names: dict[str, Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    replace: Replace | None = None,
    placed: Iterable[Callable[[str], None]] = (),
) -> list[str]:
    """Loads every parameter of `model` (all on the meta device) from `names`; returns the names that it had no use for.

    They are loaded in the model's own order, layer after layer. Each of `placed` is told of each parameter once it is
    where it stays. Parameters that are one (tied embeddings) stay one. Buffers go to `device` first, as they are.
    Raises what safetensors raises for a damaged file, and `torch.OutOfMemoryError`.
    """
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(key, buffer.to(device), persistent=key not in module._non_persistent_buffers_set)
    places = _places(model)
    order = {name: place for place, name in enumerate(places)}
    unused = []
    for file, run in groupby(sorted(names, key=lambda name: order.get(name, -1)), key=names.__getitem__):
        with safe_open(file, framework="pt") as tensors:
            for name in run:
                if name not in places:
                    unused.append(name)
                    continue
                weight = nn.Parameter(tensors.get_tensor(name).to(device).to(dtype), requires_grad=False)
                for module, attribute, _ in places[name]:
                    setattr(module, attribute, weight)
                del weight  # which `replace` may free
                if replace:
                    _replace(model, [(module, owner) for module, _, owner in places[name]], replace)
                for hear in placed:
                    hear(name)
    return unused


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str, str]]]:
    """Parameter name -> every (module, attribute, module's name) that holds it; tied ones hold the same."""
    first: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str, str]]] = {}
    for owner, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first.setdefault(id(parameter), f"{owner}.{attribute}" if owner else attribute)
            places.setdefault(name, []).append((module, attribute, owner))
    return places


def _replace(model: nn.Module, loaded: list[tuple[nn.Module, str]], replace: Replace) -> None:
    """Offers a linear layer to `replace` once weight and bias are both there; tied ones (the head) are left alone."""
    if len(loaded) != 1:
        return
    module, name = loaded[0]
    if not isinstance(module, nn.Linear) or any(p.is_meta for p in module.parameters()):
        return
    if (instead := replace(name, module)) is not None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, instead)
