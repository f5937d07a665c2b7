"""Rows of several adapters in one kernel: which program has which rows and matrices. CUDA only.

Rows are cut into shares, each adapter's apart. A program has one share, so it reads one adapter's matrices, in their
own rank, and sums over that adapter's rows: what is not finite in one adapter meets nothing of another, not even times
zero, as it would in one product over all adapters' columns with a mask. Where the rows begin and end is read on the
card (`Groups.table`), so a CUDA graph serves other spans as well, up to the `longest` that it was recorded with.

A kernel is launched once for each class of ranks (up to 16, 32, 64), since the width of its blocks decides its
registers: a company's narrow adapters do not pay for a wide one.

Limits: ranks up to `groups.MAX_GROUPED_RANK`; wider ones take the definitions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from metier.kernels.groups import Groups


@triton.jit
def share_of(number, table, num_rows, rows_each, shares, GROUPED: tl.constexpr):
    """Of share `number`: the sum of the ranks before its adapter, the adapter's rank, first row, end, and its turn.

    There may be no row between first and end. Of one adapter no rank is told. GROUPED: 0, or a divisor of the ranks.
    """
    before, rank = number * 0, number * 0
    begin, end = 0, num_rows
    if GROUPED:
        at = table + 4 * (number // shares)
        begin, end = tl.load(at), tl.load(at + 1)
        rank, before = tl.multiple_of(tl.load(at + 2), GROUPED), tl.load(at + 3)
        number = number % shares
    first = begin + number * rows_each
    return before, rank, first, tl.minimum(first + rows_each, end), number


class Shares(NamedTuple):
    """A launch: `each` of some adapters, whose widest has `rank`, has so many shares of `rows` rows.

    `total` is the size of the grid's axis, `divisor` what `share_of` calls GROUPED. `alone` is the rank of one adapter,
    and 0 where the card looks it up: kernels are compiled anew for other kinds of numbers.
    """

    table: torch.Tensor
    rows: int
    each: int
    total: int
    rank: int
    alone: int
    divisor: int


def cut(x: torch.Tensor, rows: int, groups: Groups | None, rank: int) -> list[Shares]:
    """Shares of `rows` rows of x [M, ...] of one adapter of `rank`, or of `groups`: a launch for each class of ranks.

    Every adapter has as many shares as the longest span needs.
    """
    if groups is None:
        each = triton.cdiv(x.shape[0], rows)
        return [Shares(x, rows, each, each, rank, rank, 0)]
    assert groups.table is not None
    each = triton.cdiv(groups.longest, rows)
    return [Shares(groups.table[first:], rows, each, each * len(ranks), max(ranks), 0, _divisor(ranks))
            for first, ranks in groups.classes()]  # fmt: skip


def _divisor(ranks: list[int]) -> int:
    return next(number for number in (16, 4, 1) if all(rank % number == 0 for rank in ranks))


def rank_of(up: torch.Tensor | None, groups: Groups | None) -> int:
    """The rank of B, `up`; of several the widest."""
    return 0 if up is None else up.shape[1] if groups is None else groups.widest


def num_ranks(rank: int, groups: Groups | None) -> int:
    """`rank`, or the sum of those of `groups`."""
    return rank if groups is None else groups.total


def is_even(x: torch.Tensor, groups: Groups | None) -> bool:
    """Whether every share of x's rows is made of whole blocks of 64."""
    return x.shape[0] % 64 == 0 if groups is None else groups.is_even


def layout(
    matrix: torch.Tensor | None, num_cols: int, groups: Groups | None
) -> tuple[int, int, tuple[int, int, int]]:  # fmt: skip
    """Layers whose A stand together, the widest rank, and strides: to the next rank's start, by column, by rank.

    `matrix` is what rows are projected by, [I, R], or what a projection is multiplied by, turned.
    """
    if matrix is None:
        return 1, 0, (0, 0, 0)
    if groups is None:
        return 1, matrix.shape[1], (0, matrix.stride(0), matrix.stride(1))
    if matrix.dim() == 1:  # B of each adapter in its own rank
        return 1, groups.widest, (num_cols, 0, 1)
    layers = matrix.shape[1] // groups.total
    return layers, groups.widest, (layers * matrix.stride(1), matrix.stride(0), matrix.stride(1))


@triton.jit(do_not_specialize=["total", "shares"])
def _sum_rows(wide, narrow, table, sums, num_rows, num_cols, layers, width, total, rows_each, shares,
              GROUPED: tl.constexpr, IS_UP: tl.constexpr,
              PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    before, rank, first, last, turn = share_of(tl.program_id(1), table, num_rows, rows_each, shares, GROUPED)
    rank *= layers
    ranks = tl.arange(0, BR)
    acc = tl.zeros([BR, BN], tl.float32)
    for start in tl.range(first, last, BM, num_stages=2):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        mask = (rows < last)[:, None]
        one = tl.load(wide + rows[:, None] * num_cols + cols[None, :], mask & (cols < num_cols)[None, :], other=0.0)
        other = tl.load(narrow + rows[:, None] * width + ranks[None, :], mask & (ranks < rank)[None, :], other=0.0)
        acc = tl.dot(tl.trans(other), one, acc, input_precision=PRECISION)
    at = sums + turn * total * num_cols + before * layers * num_cols
    if IS_UP:
        at += ranks[:, None] + cols[None, :] * rank
    else:
        at += ranks[:, None] * num_cols + cols[None, :]
    tl.store(at, acc, (ranks < rank)[:, None] & (cols < num_cols)[None, :])


def rank_gradient(dy: torch.Tensor, low: torch.Tensor, groups: Groups, *, is_up: bool) -> torch.Tensor:
    """dy^T low for each adapter, fp32: blocks [O, r] of dy [M, O] and low [M, R], or rows [n r, I], dy a projection."""
    narrow, wide = (low, dy) if is_up else (dy, low)
    width, num_cols = narrow.shape[1], wide.shape[1]
    layers = width // groups.widest
    blocks = triton.cdiv(num_cols, 64)
    launches = cut(dy, triton.cdiv(triton.cdiv(dy.shape[0], max(1, 1024 // blocks)), 64) * 64, groups, 0)
    sums = torch.empty(launches[0].each, layers * groups.total, num_cols, device=dy.device, dtype=torch.float32)
    is_wide = dy.dtype == torch.float32
    wide, narrow = wide.contiguous(), narrow.contiguous()
    for some in launches:
        rank = layers * some.rank
        _sum_rows[(blocks, some.total)](
            wide, narrow, some.table, sums, dy.shape[0], num_cols, layers, width, layers * groups.total, some.rows,
            some.each, GROUPED=some.divisor, IS_UP=is_up, PRECISION="ieee" if is_wide else "tf32",
            BR=max(16, triton.next_power_of_2(rank)), BM=32 if rank > 64 else 64, BN=64,
            num_warps=8 if is_wide or rank > 64 else 4,
        )  # fmt: skip
    total = sums.sum(0)
    return total.flatten() if is_up else total
