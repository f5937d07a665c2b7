"""Several LoRA adapters on one base, in one batch: each row asks for one of them, or for the base alone.

The adapters' matrices lie side by side, A [R, I] and B [O, R] with R the sum of their ranks, and every row
multiplies the columns that are not its own by zero. So a batch of any mixture costs two products more than the
base, a row's numbers are those of its adapter alone, and a row of the base gets the base's own output. The base's
layers are computed by `metier.kernels.linear`, whether an adapter asks for them or not.

Limits: adapters that also train the model's bias terms are refused; the cost grows with the sum of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from metier.errors import ModelError
from metier.kernels.linear import linear
from metier.model.load import Base
from metier.model.lora import load_adapter

# (adapter's number, rank), in the order of a layer's columns.
Layout = tuple[tuple[int, int], ...]


@dataclass
class Selection:
    """Which adapter each row of the batch at hand asks for; `masks` holds the columns' switches by layout.

    `owners` keeps the columns' adapters of each layout: a pass that is being recorded may copy nothing to the device.
    """

    rows: torch.Tensor | None = None
    masks: dict[Layout, torch.Tensor] = field(default_factory=dict)
    owners: dict[Layout, torch.Tensor] = field(default_factory=dict)

    def mask(self, layout: Layout, dtype: torch.dtype) -> torch.Tensor | None:
        """[rows, 1, R] of ones and zeros, or None when every row asks for the base, or no adapter has the layer."""
        if self.rows is None or not layout:
            return None
        if layout not in self.masks:
            if layout not in self.owners:
                owners = [adapter for adapter, rank in layout for _ in range(rank)]
                self.owners[layout] = torch.tensor(owners, device=self.rows.device)
            self.masks[layout] = (self.rows[:, None] == self.owners[layout]).to(dtype)[:, None]
        return self.masks[layout]


class BankLinear(nn.Module):
    """A frozen linear layer and the updates of several adapters; A and B scaled are in the base's dtype."""

    def __init__(self, base: nn.Linear, selection: Selection) -> None:
        super().__init__()
        self.base = base
        self.selection = selection
        self.layout: Layout = ()
        self.lora_a = base.weight.new_empty(0, base.in_features)
        self.lora_b = base.weight.new_empty(base.out_features, 0)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def add(self, adapter: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Puts an adapter's A [r, I] and scaled B [O, r] behind those that are there."""
        self.lora_a = torch.cat([self.lora_a, lora_a.to(self.lora_a)])
        self.lora_b = torch.cat([self.lora_b, lora_b.to(self.lora_b)], dim=1)
        self.layout = (*self.layout, (adapter, lora_a.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.base.weight, self.base.bias)
        mask = self.selection.mask(self.layout, x.dtype)
        if mask is None:
            return y
        return y.add_(linear(linear(x, self.lora_a).mul_(mask), self.lora_b))


class AdapterBank:
    """The adapters of one base by name, in their order; `select` says which rows of the next passes ask for which."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.names: list[str] = []
        self._selection = Selection()
        self._layers = {
            name: BankLinear(module, self._selection)
            for name, module in base.model.named_modules()
            if type(module) is nn.Linear
        }
        self._put_in()

    def add(self, name: str, folder: Path) -> None:
        """Adds the adapter of a PEFT folder. Raises `ModelError` when it does not fit the base, or trains biases."""
        self._take_out()
        adapter = load_adapter(self.base.model, folder)
        number = len(self.names)
        for where, layer in adapter.layers.items():
            self._layers[where].add(number, layer.lora_a.detach(), layer.lora_b.detach() * layer.scaling)
        self.base.model.requires_grad_(False)
        self._put_in()
        if adapter.biases:
            raise ModelError(
                f"`{folder}` also trained bias terms (`bias: {adapter.config.bias}`), and a server shares them",
                hint="export the adapter merged, and serve the merged model",
            )
        self.names.append(name)

    def select(self, rows: Sequence[str | None]) -> None:
        """Names the adapter of each row of the next passes; None is the base."""
        has_adapters = any(name is not None for name in rows)
        self.select_numbers(torch.tensor(self.numbers(rows), device=self.base.device) if has_adapters else None)

    def select_numbers(self, rows: torch.Tensor | None) -> None:
        """`select` by `numbers` [rows] on the device; None when every row asks for the base."""
        self._selection.masks = {}
        self._selection.rows = rows

    def numbers(self, rows: Sequence[str | None]) -> list[int]:
        """Each adapter's number; -1 is the base's."""
        return [-1 if name is None else self.names.index(name) for name in rows]

    def _put_in(self) -> None:
        for where, layer in self._layers.items():
            self._put(where, layer)

    def _take_out(self) -> None:
        for where, layer in self._layers.items():
            self._put(where, layer.base)

    def _put(self, where: str, module: nn.Module) -> None:
        parent, _, child = where.rpartition(".")
        setattr(self.base.model.get_submodule(parent), child, module)
