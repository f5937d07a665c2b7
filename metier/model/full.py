"""All weights of a model as what is trained, where an adapter is trained elsewhere; and their checkpoint on disk.

In: a base in fp32. Out: a folder in transformers' own layout (config, tokenizer, safetensors), which `load_base`
reads like any other.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from metier.artifacts import MANIFEST, disk_errors, write_atomic
from metier.model.load import Base


@dataclass
class AllWeights:
    """Every weight of a model, by name; tied ones once."""

    parameters: dict[str, nn.Parameter]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of the weights on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies `tensors` in."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])


def unfreeze(base: Base) -> AllWeights:
    """Makes every weight of `base` trainable."""
    base.model.requires_grad_(True)
    return AllWeights(dict(base.model.named_parameters()))


def save_model(folder: Path, base: Base, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Writes `tensors` in `dtype` beside the configuration and the tokenizer of `base`."""
    with disk_errors(folder):
        for path in base.path.iterdir():
            if (
                path.suffix in (".json", ".jinja", ".model", ".txt")
                and path.name != MANIFEST
                and "index" not in path.name
            ):
                shutil.copyfile(path, folder / path.name)
    kept = {name: t.to(dtype).contiguous() for name, t in tensors.items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(kept, metadata={"format": "pt"}))
