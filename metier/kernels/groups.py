"""Whose rows are whose in a pass of several adapters, where their matrices lie, and an op of one applied to each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from metier.kernels.reference import Rows

MAX_GROUPED_RANK = 64  # the widest that kernels take of several adapters


class Groups(NamedTuple):
    """Whose rows are whose, where several adapters of these `ranks` share a pass.

    Their matrices lie one behind the other, each in its own rank r: those of A as rows, [n sum(r), I] where n layers
    share an input, those of B as blocks [O, r] in a vector. A projection of rows [M, n max(r)] has n r columns of the
    row's own adapter, and zeros. `spans`: (adapter, first row, end), in the rows' order, each adapter at most once.
    For kernels, `table` [J, 4] int32 on the device holds each adapter's first row and end, its rank, and the sum of the
    ranks before it; no span has more rows than `longest`, and `is_even` says that all begin and end at multiples of 64.
    """

    spans: tuple[tuple[int, int, int], ...]
    ranks: tuple[int, ...]
    table: torch.Tensor | None = None
    longest: int = 0
    is_even: bool = False

    @property
    def widest(self) -> int:
        return max(self.ranks)

    @property
    def total(self) -> int:
        return sum(self.ranks)

    def classes(self) -> list[tuple[int, list[int]]]:
        """Neighbours whose ranks take the same blocks (16, 32 or 64 wide): the first one's number, and the ranks."""
        found, first = [], 0
        for _, some in itertools.groupby(self.ranks, lambda rank: max(4, (rank - 1).bit_length())):
            ranks = list(some)
            found.append((first, ranks))
            first += len(ranks)
        return found

    def on(self, device: torch.device) -> Groups:
        """With what kernels on `device` read."""
        rows = dict.fromkeys(range(len(self.ranks)), (0, 0)) | {n: (start, end) for n, start, end in self.spans}
        table = [(*rows[number], rank, sum(self.ranks[:number])) for number, rank in enumerate(self.ranks)]
        is_even = all(start % 64 == 0 and end % 64 == 0 for _, start, end in self.spans)
        longest = max(end - start for _, start, end in self.spans)
        on_device = torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True)
        return self._replace(table=on_device, longest=longest, is_even=is_even)

    def down_of(self, down: torch.Tensor, adapter: int) -> torch.Tensor:
        """An adapter's rows [n r, I]."""
        each, before = down.shape[0] // self.total, sum(self.ranks[:adapter])
        return down[each * before : each * (before + self.ranks[adapter])]

    def up_of(self, up: torch.Tensor, adapter: int) -> torch.Tensor:
        """An adapter's block [O, r]."""
        size, before, rank = up.shape[0] // self.total, sum(self.ranks[:adapter]), self.ranks[adapter]
        return up[size * before : size * (before + rank)].view(size, rank)

    def low_of(self, low: torch.Tensor, adapter: int) -> torch.Tensor:
        """The columns [rows, n r] of rows [rows, n max(r)] of an adapter's."""
        return low[:, : low.shape[1] // self.widest * self.ranks[adapter]]

    def each(
        self, op: Callable[..., Any], rows: Mapping[str, Any], lows: Mapping[str, Any], stacks: Mapping[str, Any],
        **rest: Any,
    ) -> list[Any]:  # fmt: skip
        """What `op`, of one adapter, gives for each span of rows with the span's own matrices.

        `rows` and `lows` are arguments with a row for each token, the latter projections; of `stacks`, an argument is
        what its function says of the adapter. So what is not finite in one adapter reaches no other.
        """
        found = []
        for adapter, start, end in self.spans:
            own = {name: None if x is None else x[start:end] for name, x in rows.items()}
            own |= {name: None if x is None else self.low_of(x[start:end], adapter) for name, x in lows.items()}
            own |= {name: None if of is None else of(adapter) for name, of in stacks.items()}
            found.append(op(**own, **rest))
        return found

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """The spans' rows, one below the other."""
        fields = list(zip(*parts, strict=True))
        lows = [None if low is None else F.pad(low, (0, low.shape[1] // self.ranks[n] * self.widest - low.shape[1]))
                for low, (n, *_) in zip(fields[3], self.spans, strict=True)]  # fmt: skip
        return Rows(_cat(fields[0]), _cat(fields[1]), _cat(fields[2]), _cat(lows), _cat(fields[4]))

    def summed(self, parts: Any, *, is_up: bool) -> torch.Tensor | None:
        """The spans' gradients of A or B in the adapters' order, zero for one without rows."""
        own = dict(zip((number for number, *_ in self.spans), parts, strict=True))
        number, first = next(iter(own.items()))
        if first is None:
            return None
        size = first.numel() // self.ranks[number] if is_up else first.shape[0] // self.ranks[number]
        shapes = [(size * rank, *(() if is_up else first.shape[1:])) for rank in self.ranks]
        grads = [own.get(number) for number in range(len(shapes))]
        return torch.cat([
            first.new_zeros(shape) if grad is None else grad.reshape(shape)
            for grad, shape in zip(grads, shapes, strict=True)
        ])  # fmt: skip


def _cat(parts: Any) -> torch.Tensor | None:
    return parts[0] if parts[0] is None or len(parts) == 1 else torch.cat(list(parts))
