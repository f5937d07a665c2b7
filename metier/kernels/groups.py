"""Whose rows are whose in a pass of several adapters."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_GROUPED_RANK = 64  # the widest that kernels take of several adapters


class Groups(NamedTuple):
    """Whose rows are whose, where several adapters share a pass; their matrices are then stacked, [J, ...].

    `spans`: (adapter, first row, end), in the order of the rows, each adapter at most once. `num_adapters` is J.
    For kernels, `bounds` [J, 2] int32 are the same on the device, zeros for an adapter without rows; then no span has
    more rows than `longest`, and `is_even` says that all begin and end at multiples of 64.
    """

    spans: tuple[tuple[int, int, int], ...]
    num_adapters: int
    bounds: torch.Tensor | None = None
    longest: int = 0
    is_even: bool = False

    def on(self, device: torch.device) -> Groups:
        """With what kernels on `device` read."""
        table = torch.zeros(self.num_adapters, 2, dtype=torch.int32)
        for adapter, start, end in self.spans:
            table[adapter, 0], table[adapter, 1] = start, end
        is_even = all(start % 64 == 0 and end % 64 == 0 for _, start, end in self.spans)
        longest = max(end - start for _, start, end in self.spans)
        return self._replace(bounds=table.to(device, non_blocking=True), longest=longest, is_even=is_even)
