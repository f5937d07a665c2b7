"""LoRA on a transformers model: W' = W + (alpha / r) B A, with W frozen; PEFT's format on disk.

`attach` replaces the target linear layers by `LoRALinear`; nothing else of the model is touched. `new_adapter` makes
one that is not in the model yet: several may share a base, and `put_in` and `take_out` give each its turn. The
adapter's own weights are fp32 whatever the base's precision. The base is always there: `Adapter.off` gives its
outputs exactly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from metier.artifacts import write_atomic, write_json
from metier.errors import ModelError, did_you_mean
from metier.kernels.dropout import keyed_dropout
from metier.kernels.reference import low_rank
from metier.model.quantise import FrozenLinear
from metier.model.resolve import first_line, read_json
from metier.recipe import AdapterConfig

PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen linear layer W [O, I] with a low-rank update B [O, R] A [R, I], both fp32.

    `number` counts the adapter's layers. Dropout's mask follows from `row_keys` [T] where they are set, and
    else from torch's random state.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        self.dropout = dropout
        self.is_on = True
        self.number = 0
        self.row_keys: torch.Tensor | None = None
        device = base.device if isinstance(base, FrozenLinear) else base.weight.device
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_on:
            return self.base(x)  # type: ignore[no-any-return]
        dropped = self._dropped(x) if self.dropout and self.training else x
        return self.base(x) + low_rank(dropped, self.lora_a, self.lora_b, scaling=self.scaling)  # type: ignore[no-any-return]

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        if self.row_keys is None:
            return F.dropout(x, self.dropout)
        return keyed_dropout(x, self.dropout, self.row_keys, self.number)


@dataclass
class Adapter:
    """The trainable part of a model: its LoRA layers by module name, and the bias terms that are trained.

    `biases` maps a parameter's name to (the trained parameter, the base's own value).
    """

    config: AdapterConfig
    layers: dict[str, LoRALinear]
    biases: dict[str, tuple[nn.Parameter, torch.Tensor]]
    target_modules: list[str]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their PEFT names, in a fixed order."""
        named = {}
        for name, layer in self.layers.items():
            named[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a
            named[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b
        for name, (parameter, _) in self.biases.items():
            named[PREFIX + name] = parameter
        return named

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of the adapter's weights on the CPU, by PEFT names."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies `tensors` in. Raises `ModelError` unless names and shapes are exactly the adapter's."""
        mine = self.parameters
        for name in [*(mine.keys() - tensors.keys()), *(tensors.keys() - mine.keys())]:
            side = "lacks" if name in mine else "has an unknown"
            raise ModelError(f"the adapter's file {side} tensor `{name}`", hint="is it an adapter of this base model?")
        with torch.no_grad():
            for name, parameter in mine.items():
                if parameter.shape != tensors[name].shape:
                    raise ModelError(
                        f"`{name}` is {[*tensors[name].shape]} in the adapter's file and {[*parameter.shape]} here"
                    )
                parameter.copy_(tensors[name])

    def put_in(self, model: nn.Module) -> None:
        """Makes the model's target layers this adapter's."""
        for name, layer in self.layers.items():
            _put(model, name, layer)

    def take_out(self, model: nn.Module) -> None:
        """Leaves the model as it was before `put_in`."""
        for name, layer in self.layers.items():
            _put(model, name, layer.base)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The base model alone, bit for bit, inside the `with`."""
        trained = {name: parameter.detach().clone() for name, (parameter, _) in self.biases.items()}
        try:
            self._switch(is_on=False, biases={name: base for name, (_, base) in self.biases.items()})
            yield
        finally:
            self._switch(is_on=True, biases=trained)

    def _switch(self, *, is_on: bool, biases: dict[str, torch.Tensor]) -> None:
        for layer in self.layers.values():
            layer.is_on = is_on
        with torch.no_grad():
            for name, value in biases.items():
                self.biases[name][0].copy_(value)


def scaling_of(config: AdapterConfig) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732, theorem 3.2)."""
    return config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)


def attach(model: nn.Module, config: AdapterConfig, *, seed: int) -> Adapter:
    """Puts a fresh adapter on `model`: B is zero, so outputs do not change; A is Kaiming-uniform as in PEFT.

    `model` is frozen throughout except for the adapter. Raises `ModelError` for target modules that the
    model does not have or that are not linear layers.
    """
    adapter = new_adapter(model, config, seed=seed)
    adapter.put_in(model)
    return replace(adapter, biases=_trained_biases(model, config.bias, adapter.layers))


def new_adapter(model: nn.Module, config: AdapterConfig, *, seed: int) -> Adapter:
    """`attach`'s adapter for `model`, which is frozen, without putting it in and without trained biases."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoRALinear] = {}
    names = target_names(model, config.target_modules)
    endings = sorted({name.rpartition(".")[2] for name in names})
    # PEFT selects by ending; where the endings alone would select more, the full names are kept.
    targets = endings if target_names(model, endings) == names else names
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoRALinear(base, config.rank, scaling_of(config), config.dropout)
        layer.number = len(layers)
        start = torch.empty(layer.lora_a.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            layer.lora_a.copy_(start)
        layers[name] = layer
    return Adapter(config, layers, {}, targets)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def target_names(model: Any, target_modules: str | list[str]) -> list[str]:
    """Full names of the linear layers that `target_modules` selects, in the model's order."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.get_output_embeddings()
    if target_modules == "all-linear":
        return [n for n, m in linear.items() if m is not head]
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    if not wanted:
        raise ModelError("adapter.target_modules is empty: there is nothing to train", hint="use `all-linear`")
    for word in wanted:
        if not any(_selects(word, name) for name in linear):
            known = sorted({n.rpartition(".")[2] for n in linear})
            raise ModelError(
                f"adapter.target_modules: the model has no linear layer `{word}`{did_you_mean(word, known)}",
                hint=f"it has {', '.join(known)}; or use `all-linear`",
            )
    return [name for name in linear if any(_selects(word, name) for word in wanted)]


def _selects(word: str, name: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _trained_biases(
    model: nn.Module, bias: str, layers: dict[str, LoRALinear]
) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
    """The model's own bias terms that are trained, under PEFT's names (`x.base_layer.bias` in a LoRA layer)."""
    found: dict[str, tuple[nn.Parameter, torch.Tensor]] = {}
    if bias == "none":
        return found
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".bias")
        inside = module.removesuffix(".base")
        is_lora = inside in layers and module.endswith(".base")
        if name.endswith(".bias") and (bias == "all" or is_lora):
            parameter.requires_grad_(True)
            key = f"{inside}.base_layer.bias" if is_lora else name
            found[key] = (parameter, parameter.detach().clone())
    return found


def save_adapter(
    folder: Path, adapter: Adapter, tensors: dict[str, torch.Tensor], *, base: str, revision: str | None
) -> None:
    """Writes PEFT's adapter_config.json and adapter_model.safetensors; PEFT loads the folder as it is.

    `tensors` are `adapter.tensors()` of the step that is kept; `base` is the path or hub id that
    transformers can load. The target modules are written as they were resolved, since PEFT's own
    `all-linear` may differ between its versions.
    """
    config = adapter.config
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
            "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "bias": config.bias,
            "target_modules": adapter.target_modules, "use_rslora": config.use_rslora, "inference_mode": True,
            "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True,
        },
    )  # fmt: skip
    data = safetensors.torch.save({k: v.contiguous() for k, v in sorted(tensors.items())}, metadata={"format": "pt"})
    write_atomic(folder / "adapter_model.safetensors", data)


def read_adapter_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """The AdapterConfig in a PEFT folder, and the file's other entries.

    Raises `ModelError` when the folder is no LoRA adapter, or uses what metier's LoRA does not do (DoRA,
    per-layer ranks, trained embeddings): a silently dropped part would give another model.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"`{folder}` holds no adapter_config.json", hint="name a run's folder or a PEFT adapter")
    entries = read_json(path)
    kind = entries.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"`{path}` describes a {kind} adapter; metier loads LORA")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in entries]:
        raise ModelError(f"`{path}` lacks `{missing[0]}`", hint="it was written by something other than PEFT or metier")
    unsupported = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
                   "lora_bias", "target_parameters", "fan_in_fan_out")  # fmt: skip
    for name in unsupported:
        if entries.get(name):
            raise ModelError(f"`{path}` uses `{name}`, which metier's LoRA does not have")
    base_name, revision = entries.get("base_model_name_or_path"), entries.get("revision")
    if not isinstance(base_name, str | None) or not isinstance(revision, str | None):
        raise ModelError(f"`{path}`: the base's name and revision are text", hint="name the base as a path or a hub id")
    try:
        config = AdapterConfig.model_validate(
            {
                "rank": entries["r"], "alpha": entries["lora_alpha"], "target_modules": entries["target_modules"],
                "dropout": entries.get("lora_dropout") or 0.0, "bias": entries.get("bias") or "none",
                "use_rslora": entries.get("use_rslora") or False,
            }
        )  # fmt: skip
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"`{path}` is no adapter's: {first['loc'][0]} is wrong ({first['msg']})") from None
    if not math.isfinite(config.alpha):
        raise ModelError(f"`{path}`: lora_alpha is not finite")
    return config, entries


def load_adapter(model: nn.Module, folder: Path) -> Adapter:
    """Attaches the adapter of a PEFT folder to `model`. Raises `ModelError` when file and model do not fit."""
    config, _ = read_adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"`{folder}` holds no adapter_model.safetensors", hint="metier loads safetensors only, never pickle"
        )
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise ModelError(f"`{path}` is damaged: {first_line(error)}") from None
    _check_tensors(path, tensors, config.rank)
    # The tensors say which layers they belong to, however the file's target_modules were spelled.
    names = sorted({key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors if ".lora_" in key})
    adapter = attach(model, config.model_copy(update={"target_modules": names}), seed=0)
    adapter.load(tensors)
    return adapter


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor], rank: int) -> None:
    """Refuses integers, numbers that are not finite, and ranks other than the file's own, before anything is built."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ModelError(f"`{name}` in `{path}` is stored as {tensor.dtype}, and an adapter's weights are floats")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"`{name}` in `{path}` holds numbers that are not finite", hint="was the training stable?")
        if name.endswith(".lora_A.weight") and tensor.shape[:1] != (rank,):
            raise ModelError(f"`{name}` in `{path}` has the shape {[*tensor.shape]}, and its rank is {rank}")
