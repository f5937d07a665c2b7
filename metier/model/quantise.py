"""Frozen linear layers with weights in e4m3 or NF4, made one at a time, so that a model fits while it is loaded.

A `FrozenLinear` stands where the linear layer stood, for training, generation and scoring alike. Embeddings, norms
and the output head keep the model's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metier.errors import ModelError
from metier.kernels.frozen import FrozenWeight, Storage, freeze, moved
from metier.kernels.reference import Rows, quantise_rows


class _Product(torch.autograd.Function):
    """x W^T with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight.matmul(_rows(x, weight.eats_fp8))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, dy = ctx.weight, grads[0]
        if weight.eats_fp8:
            dy = dy.float() * weight.column_scale
        return weight.matmul_t(_rows(dy, weight.eats_fp8)), None


def _rows(x: torch.Tensor, quantise: bool) -> Rows:
    return Rows(None, *quantise_rows(x)) if quantise else Rows(x)


class FrozenLinear(nn.Linear):
    """y = x W^T + bias with W [O, I] as a `FrozenWeight`; it has no `weight` parameter."""

    def __init__(self, weight: FrozenWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.frozen = weight
        self.dtype = dtype
        self.bias = bias  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        return self.frozen.tensors()[0].device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Product.apply(x.reshape(-1, self.in_features), self.frozen)  # type: ignore[no-untyped-call]
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {type(self.frozen).__name__}"


def quantise_linear(linear: nn.Linear, storage: Storage, factors: list[torch.Tensor] | None = None) -> nn.Module:
    """`linear`, its weight already on the device, with that weight in `storage`; on a GPU `linear` itself loses it.

    `factors` of its inputs (`metier.kernels.feedback`) let nf4's errors make up for each other.

    A layer whose sizes the format does not take (fp8: multiples of 16; nf4: inputs in multiples of 64) stays as it is.
    """
    rows, cols = linear.weight.shape
    if storage == "dense" or cols % (64 if storage == "nf4" else 16) or rows % 16:
        return linear
    weight = linear.weight.detach()
    eats_fp8 = multiplies_fp8(weight.device) and weight.dtype == torch.bfloat16
    # By way of the host, and back when the weight itself is free, so that nothing leaves holes between the frozen ones:
    # they were 4.6 GiB for LLaMA-2-7B in NF4, which no CUDA graph could use.
    device, dtype = weight.device, weight.dtype
    frozen = moved(freeze(weight, storage, eats_fp8=eats_fp8, factors=factors), torch.device("cpu"))
    if device.type == "cuda":
        linear.register_parameter("weight", None)
        del weight
        torch.cuda.empty_cache()
        frozen = moved(frozen, device)
    return FrozenLinear(frozen, linear.bias, dtype)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has FP8 matrix units: compute capability 8.9 or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantise_model(model: Any, storage: Storage) -> None:
    """Every linear layer of `model` but the output head, in place, one after the other."""
    quantise_linears(model, storage, but=model.get_output_embeddings())


def quantise_linears(module: nn.Module, storage: Storage, *, but: nn.Module | None = None) -> None:
    """Every linear layer inside `module` but `but`, in place."""
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear and linear is not but:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, quantise_linear(linear, storage))


def count_parameters(model: nn.Module) -> int:
    """The model's parameters, quantised weights included."""
    frozen = (m for m in model.modules() if isinstance(m, FrozenLinear))
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in frozen)


def check_storage(storage: Storage, device: torch.device) -> None:
    """Raises `ModelError` when the device cannot work with weights in `storage`."""
    if storage == "dense":
        return
    if device.type != "cuda":
        raise ModelError(
            f"`precision: {storage}` needs a CUDA GPU", hint="`precision: auto` takes fp32 or bf16 on this CPU"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if storage == "fp8" and not multiplies_fp8(device):
        raise ModelError(
            f"`precision: fp8` needs a GPU of compute capability 8.9 or newer (Ada, Hopper), and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}",
            hint="`precision: nf4` saves more memory and runs on it; `precision: auto` is the fastest there",
        )
