"""Rows of several adapters in one kernel: which program has which rows, and sums over an adapter's rows. CUDA only.

Rows are cut into shares, each adapter's apart. A program has one share, so it reads one adapter's matrices and sums
over that adapter's rows: what is not finite in one adapter meets nothing of another, not even times zero, as it would
in one product over all adapters' columns with a mask. Where the rows begin and end is read on the card
(`Groups.bounds`), so a CUDA graph serves other spans as well, up to the `longest` that it was recorded with.

Limits: ranks up to `reference.MAX_GROUPED_RANK`; wider ones take the definitions there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from metier.kernels.reference import Groups


@triton.jit
def share_of(number, bounds, num_rows, rows_each, shares, GROUPED: tl.constexpr):
    """The adapter of share `number`, the share's first row and its end; there may be no row between them."""
    adapter = number * 0
    begin, end = 0, num_rows
    if GROUPED:
        adapter = number // shares
        begin = tl.load(bounds + 2 * adapter)
        end = tl.load(bounds + 2 * adapter + 1)
    first = begin + (number - adapter * shares) * rows_each
    return adapter, first, tl.minimum(first + rows_each, end)


class Shares(NamedTuple):
    """How rows are cut: `each` adapter has so many shares of `rows`; `total` is the size of the grid's axis."""

    bounds: torch.Tensor
    rows: int
    each: int
    num_adapters: int
    is_grouped: bool

    @property
    def total(self) -> int:
        return self.each * self.num_adapters

    def summed(self, sums: torch.Tensor) -> torch.Tensor:
        """[total, ...] -> [...], or [J, ...] where there are several adapters."""
        if not self.is_grouped:
            return sums.sum(0)
        return sums.view(self.num_adapters, self.each, *sums.shape[1:]).sum(1)


def cut(x: torch.Tensor, rows: int, groups: Groups | None) -> Shares:
    """Shares of `rows` rows of x [M, ...]; with `groups` as many for each adapter as the longest span needs."""
    if groups is None:
        return Shares(x, rows, triton.cdiv(x.shape[0], rows), 1, False)
    assert groups.bounds is not None
    return Shares(groups.bounds, rows, triton.cdiv(groups.longest, rows), groups.num_adapters, True)


def is_even(x: torch.Tensor, groups: Groups | None) -> bool:
    """Whether every share of x's rows is made of whole blocks of 64."""
    return x.shape[0] % 64 == 0 if groups is None else groups.is_even


@triton.jit
def _sum_rows(wide, narrow, bounds, sums, num_rows, num_cols, rank, rows_each, shares, col_stride, rank_stride,
              GROUPED: tl.constexpr,
              PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    _, first, last = share_of(split, bounds, num_rows, rows_each, shares, GROUPED)
    ranks = tl.arange(0, BR)
    total = tl.zeros([BR, BN], tl.float32)
    for start in tl.range(first, last, BM, num_stages=2):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        mask = (rows < last)[:, None]
        one = tl.load(wide + rows[:, None] * num_cols + cols[None, :], mask & (cols < num_cols)[None, :], other=0.0)
        other = tl.load(narrow + rows[:, None] * rank + ranks[None, :], mask & (ranks < rank)[None, :], other=0.0)
        total = tl.dot(tl.trans(other), one, total, input_precision=PRECISION)
    tl.store(sums + split * rank * num_cols + ranks[:, None] * rank_stride + cols[None, :] * col_stride, total,
             (ranks < rank)[:, None] & (cols < num_cols)[None, :])  # fmt: skip


def rank_gradient(dy: torch.Tensor, low: torch.Tensor, ends: tuple[int, ...], groups: Groups | None) -> torch.Tensor:
    """`metier.kernels.reference.rank_gradient` for one range of columns: dy [M, O], low [M, R] -> fp32 [J, O, R]."""
    assert len(ends) == 1
    is_turned = dy.shape[1] < low.shape[1]
    narrow, wide = (dy, low) if is_turned else (low, dy)
    rank, num_cols = narrow.shape[1], wide.shape[1]
    blocks = triton.cdiv(num_cols, 64)
    shares = cut(dy, triton.cdiv(triton.cdiv(dy.shape[0], max(1, 1024 // blocks)), 64) * 64, groups)
    sums = torch.empty(shares.total, dy.shape[1], low.shape[1], device=dy.device, dtype=torch.float32)
    is_wide = dy.dtype == torch.float32
    _sum_rows[(blocks, shares.total)](
        wide.contiguous(), narrow.contiguous(), shares.bounds, sums, dy.shape[0], num_cols, rank, shares.rows,
        shares.each, *((1, num_cols) if is_turned else (rank, 1)), GROUPED=shares.is_grouped,
        PRECISION="ieee" if is_wide else "tf32", BR=max(16, triton.next_power_of_2(rank)),
        BM=32 if rank > 64 else 64, BN=64, num_warps=8 if is_wide or rank > 64 else 4,
    )  # fmt: skip
    return shares.summed(sums)
