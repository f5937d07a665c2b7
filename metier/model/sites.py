"""A site: linear layers of a decoder layer that share their input, with the adapters' weights as products read them.

In: the frozen weight and the fp32 masters of one adapter or of several. Out: the matrices in the model's dtype, the
rows that products read, and where gradients belong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from metier.kernels import ops
from metier.kernels.dropout import Dropout
from metier.kernels.frozen import FrozenWeight
from metier.kernels.groups import Groups
from metier.kernels.reference import Rows

Gradients = list[torch.Tensor | None]
IMAGES_AT_ONCE = 56
# What a master is copied to, the master, and what it is multiplied by on the way.
Image = tuple[torch.Tensor, nn.Parameter, float]


@dataclass
class Part:
    """One adapter at a site: its fp32 A [R, I] and B [O, R] for each of the layers, or None where it has none.

    `numbers` are those layers' in the adapter, which decide dropout's masks.
    """

    masters: list[tuple[nn.Parameter, nn.Parameter] | None]
    scaling: float
    rank: int
    numbers: list[int]


@dataclass
class Site:
    """Linear layers that share their input, with the adapters' weights in the form in which products read them.

    `ends` are the layers' ends in the output, `names` the layers' in the model. Of one adapter, down [n R, I] holds the
    layers' A, up [O, R] their B times the scaling, both in the model's dtype; None where none of the layers has an
    adapter. Of several they lie one behind the other, each in its own rank (`metier.kernels.groups`), and `totals` are
    the sums of their gradients, with `places` for each parameter and what its sum is multiplied by. `inputs` are the
    parameters that a pass hangs on.
    """

    weight: FrozenWeight
    ends: tuple[int, ...]
    names: tuple[str, ...]
    parts: list[Part] = field(default_factory=list)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    inputs: list[nn.Parameter] = field(default_factory=list)
    totals: tuple[torch.Tensor, ...] | None = None
    places: list[tuple[nn.Parameter, torch.Tensor, float]] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for pair in part.masters if pair is not None for p in pair]

    @property
    def down_t(self) -> torch.Tensor | None:
        return None if self.down is None else self.down.mT

    @property
    def image_size(self) -> int:
        """Elements of `down` and `up`."""
        ranks, (size, width) = sum(part.rank for part in self.parts), self.weight.shape
        return ranks * (size + len(self.ends) * width) if self.parameters else 0

    @property
    def is_full(self) -> bool:
        """Whether each adapter has each of the layers, or none has any."""
        return not self.parameters or all(pair is not None for part in self.parts for pair in part.masters)

    def images(self, room: torch.Tensor) -> list[Image]:
        """Makes `down` and `up` of `room`, zeros of their size and dtype."""
        self.down = self.up = self.totals = None
        self.places = []
        parameters, is_one = self.parameters, len(self.parts) == 1
        self.inputs = parameters if is_one else parameters[:1]
        if not parameters:
            return []
        ranks, (size, width) = [part.rank for part in self.parts], self.weight.shape
        shapes = (len(self.ends) * sum(ranks), width), (size, ranks[0]) if is_one else (size * sum(ranks),)
        flat = torch.split(room, [math.prod(shape) for shape in shapes])
        self.down, self.up = (one.view(shape) for one, shape in zip(flat, shapes, strict=True))
        if not is_one:
            wide = torch.promote_types(room.dtype, torch.float32)
            self.totals = tuple(torch.zeros(shape, dtype=wide, device=room.device) for shape in shapes)
            self.places = self._places(*self.totals)
        return [(place, parameter, scale) for parameter, place, scale in self._places(self.down, self.up)]

    def _places(self, down: torch.Tensor, up: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor, float]]:
        """Each A and B with its place in what is laid out as `down` and `up`, and the scaling of it."""
        found, before, count = [], 0, len(self.ends)
        for part in self.parts:
            after = before + part.rank
            downs = down[count * before : count * after].chunk(count)
            block = up if up.dim() == 2 else up.view(-1, self.weight.shape[0])[before:after].view(-1, part.rank)
            for own, (start, end), pair in zip(downs, itertools.pairwise((0, *self.ends)), part.masters, strict=True):
                if pair is not None:
                    found += [(pair[0], own, 1.0), (pair[1], block[start:end], part.scaling)]
            before = after
        return found

    @property
    def factor(self) -> torch.Tensor | None:
        """What dy is multiplied by before it is quantised for dX."""
        return self.weight.column_scale if self.weight.eats_fp8 else None

    def gradient_rows(
        self, dy: torch.Tensor, groups: Groups | None, largest: torch.Tensor | None = None
    ) -> Rows:  # fmt: skip
        """dy [M, O] as the product for dX reads it, with its projection on the rank."""
        return ops.project_rows(
            dy, factor=self.factor, down=self.up, segments=self.ends if self.up is not None else (),
            quantise=self.weight.eats_fp8, largest=largest, groups=groups,
        )  # fmt: skip

    def gradients(self, down: torch.Tensor | None, up: torch.Tensor | None, groups: Groups | None) -> Gradients:
        """What backward returns for `inputs`, from the gradients of `down` and `up`, fp32 and of their shapes.

        Those of several adapters are added to `totals`, all at once.
        """
        if not self.inputs:
            return []
        assert down is not None and up is not None
        if groups is not None:
            assert self.totals is not None
            torch._foreach_add_(self.totals, (down, up))
            return [None]
        up.mul_(self.parts[0].scaling)
        return [grad for _, grad, _ in self._places(down, up)]

    def project_dropped(self, x: torch.Tensor, dropout: Dropout, **norm: torch.Tensor) -> torch.Tensor | None:
        """The projection [M, n R] of one adapter's input, each layer's after a mask of its own; see `drop_rows`."""
        if self.down is None:
            return None
        numbers, downs = self.parts[0].numbers, self.down.chunk(len(self.ends))
        dropped = (ops.drop_rows(x, dropout, number, **norm) for number in numbers)
        return torch.cat([each @ down.mT for each, down in zip(dropped, downs, strict=True)], 1)

    def dropped_backward(
        self, low: torch.Tensor | None, dropout: Dropout, target: torch.Tensor | None, x: torch.Tensor,
        **norm: torch.Tensor,
    ) -> torch.Tensor | None:  # fmt: skip
        """The gradient of `down`, fp32, from that of `project_dropped`, low [M, n R]; x's is added to `target`."""
        if self.down is None or low is None:
            return None
        grads = []
        for number, own, down in zip(
            self.parts[0].numbers, low.chunk(len(self.ends), 1), self.down.chunk(len(self.ends)), strict=True
        ):
            own = own.contiguous()
            grads.append(ops.down_gradient(own, ops.drop_rows(x, dropout, number, **norm), None))
            if target is not None:
                ops.drop_rows(own @ down, dropout, number, into=target)
        return torch.cat(grads)

    def settle(self) -> None:
        """Hands `totals`, scaled, to the parameters of several adapters as their `.grad`."""
        scaled = [(total, scaling) for _, total, scaling in self.places if scaling != 1]
        if scaled:
            torch._foreach_mul_([total for total, _ in scaled], [scaling for _, scaling in scaled])
        for parameter, total, _ in self.places:
            parameter.grad = total.to(parameter.dtype)

    def rank_gradient(self, dy: torch.Tensor, low: torch.Tensor | None, groups: Groups | None) -> torch.Tensor | None:
        """The gradient of `up` from dy [M, O] and low = x A^T [M, n R]."""
        return None if low is None else ops.rank_gradient(dy, low, self.ends, groups)


@torch.no_grad()
def refresh(images: Sequence[Image]) -> None:
    """Copies fp32 masters into the sites, scaled in fp32, a few at a time: the scaled copies are memory."""
    plain = [(place, master) for place, master, scale in images if scale == 1]
    if plain:
        torch._foreach_copy_([place for place, _ in plain], [master for _, master in plain])
    scaled = [image for image in images if image[2] != 1]
    for start in range(0, len(scaled), IMAGES_AT_ONCE):
        places, masters, scales = zip(*scaled[start : start + IMAGES_AT_ONCE], strict=True)
        torch._foreach_copy_(places, torch._foreach_mul(masters, scales))
