"""Triton kernels of the gated activation. CUDA only.

A program owns a block of columns and walks down a share of the rows, with the next tiles' loads under way. The
low-rank parts are added while a tile is in registers, and the gradients of the adapter's matrices are summed there as
well, share by share, so that neither h nor the gradient is read once more for them. Where the result is to be
quantised, its rows' largest magnitudes are found on the way (an atomic maximum, which does not depend on the order).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from metier.kernels.groups import Groups
from metier.kernels.reference import FP8, Rows, SwigluGrads, rank_gradient
from metier.kernels.triton_groups import Shares, cut, is_even, num_ranks, rank_of, share_of
from metier.kernels.triton_rows import project_rows

# Wider low-rank parts leave the kernels' registers and go through cuBLAS.
MAX_FUSED_RANK = 64


@triton.jit
def _tile(at, mask, EVEN: tl.constexpr):
    """A tile in fp32; EVEN: nothing of it lies outside, so that no mask is needed."""
    value = tl.load(at) if EVEN else tl.load(at, mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _low_rank(value, low, rows, stride, offset, up_block, row_mask, ranks, rank,
              PRECISION: tl.constexpr):  # fmt: skip
    """value + low up^T for a tile, and the block of `low` that was read."""
    block = tl.load(low + rows[:, None] * stride + offset + ranks[None, :],
                    row_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
    return tl.dot(block, up_block, value, input_precision=PRECISION), block


@triton.jit
def _sum(total, tile, low, PRECISION: tl.constexpr, BM: tl.constexpr):
    """total + tile^T low. Of 32 rows the product ends here, as in `triton_rows._scaled_rows`: `low` is read twice."""
    total = tl.dot(tl.trans(tile), low, total, input_precision=PRECISION)
    return total if BM >= 64 else total + 0.0


@triton.jit(do_not_specialize=["shares"])
def _swiglu(gate_up, low, up, h_out, largest, table, num_rows, half, rank, width, rows_each, shares,
            GROUPED: tl.constexpr, HAS_LOW: tl.constexpr, FIND_LARGEST: tl.constexpr, PRECISION: tl.constexpr,
            EVEN: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
            BN: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_mask = cols < half
    ranks = tl.arange(0, BR)
    before, own_rank, first, last, turn = share_of(tl.program_id(1), table, num_rows, rows_each, shares, GROUPED)
    if GROUPED:
        rank = own_rank
    if HAS_LOW:
        up += before * 2 * half
        up_at = up + cols[None, :] * rank + ranks[:, None]
        up_mask = col_mask[None, :] & (ranks < rank)[:, None]
        up_gate = tl.load(up_at, up_mask, other=0.0)
        up_upper = tl.load(up_at + half * rank, up_mask, other=0.0)
    for start in tl.range(first, last, BM, num_stages=STAGES):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_mask = rows < last
        mask = row_mask[:, None] & col_mask[None, :]
        at = gate_up + rows[:, None] * (2 * half) + cols[None, :]
        gate, upper = _tile(at, mask, EVEN), _tile(at + half, mask, EVEN)
        if HAS_LOW:
            gate, _ = _low_rank(gate, low, rows, width, 0, up_gate, row_mask, ranks, rank, PRECISION)
            upper, _ = _low_rank(upper, low, rows, width, rank, up_upper, row_mask, ranks, rank, PRECISION)
        h = (gate * tl.sigmoid(gate) * upper).to(h_out.dtype.element_ty)
        if EVEN:
            tl.store(h_out + rows[:, None] * half + cols[None, :], h)
        else:
            tl.store(h_out + rows[:, None] * half + cols[None, :], h, mask)
        if FIND_LARGEST:
            tl.atomic_max(largest + rows, tl.max(tl.abs(h.to(tl.float32)), 1), row_mask, sem="relaxed")


def swiglu(
    gate_up: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    *,
    down: torch.Tensor | None,
    quantise: bool,
    groups: Groups | None = None,
) -> Rows:
    num_rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    rank = rank_of(up, groups)
    if low is not None and rank > MAX_FUSED_RANK:
        gate_up, low, rank = _add_low_rank_(gate_up.clone(), low, up), None, 0
    h = torch.empty(num_rows, half, device=gate_up.device, dtype=gate_up.dtype)
    largest = torch.zeros(num_rows, device=h.device) if quantise else None
    for some in _launches(h, groups, rank):
        _swiglu[(triton.cdiv(half, 64), some.total)](
            gate_up, h if low is None else low, h if low is None else up, h, h if largest is None else largest,
            some.table, num_rows, half, some.alone, 2 * rank, some.rows, some.each, GROUPED=some.divisor,
            HAS_LOW=low is not None, FIND_LARGEST=quantise, **_block(h, some.rank, groups), **_warps(h, some.rank),
        )  # fmt: skip
    segments = (half,) if down is not None else ()
    return project_rows(h, down=down, segments=segments, quantise=quantise, largest=largest, groups=groups)


def _launches(x: torch.Tensor, groups: Groups | None, rank: int) -> list[Shares]:
    """Measured at 8,192 rows of 11,008 columns on an H100: some 1,300 programs in all."""
    blocks = triton.cdiv(x.shape[1], 64)
    return cut(x, triton.cdiv(triton.cdiv(x.shape[0], max(1, 1376 // blocks)), 64) * 64, groups, rank)


def _block(x: torch.Tensor, rank: int, groups: Groups | None) -> dict[str, Any]:
    return {
        "BN": 64, "BR": max(16, triton.next_power_of_2(rank)), "EVEN": is_even(x, groups) and x.shape[1] % 64 == 0,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _warps(x: torch.Tensor, rank: int) -> dict[str, int]:
    """Forward: beyond 16, warps for two tiles and two blocks an SM."""
    if x.dtype == torch.float32:
        return {"BM": 64, "STAGES": 1, "num_warps": 8}
    return {"BM": 64, "STAGES": 3 if rank <= 16 else 2, "num_warps": 4 if rank <= 16 else 8}


def _backward_warps(x: torch.Tensor, rank: int) -> dict[str, int]:
    """Tiles of 64 rows and three sums wider than 16 spill and leave an SM to one block: 32 rows then."""
    if x.dtype == torch.float32:
        return {"BM": 64 if rank <= 16 else 32, "STAGES": 1, "num_warps": 8}
    return {"BM": 64 if rank <= 16 else 32, "STAGES": 3, "num_warps": 4 if rank <= 16 else 8}


def _add_low_rank_(gate_up: torch.Tensor, low: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert up is not None
    for part, own, block in zip(gate_up.chunk(2, 1), low.chunk(2, 1), up.chunk(2), strict=True):
        part.addmm_(own, block.T)
    return gate_up


@triton.jit(do_not_specialize=["total", "shares"])
def _swiglu_backward(dh, gate_up, low, up, low_dh, down, factor, largest, up_sums, down_sums, table, num_rows, half,
                     rank, width, total, rows_each, shares, GROUPED: tl.constexpr, HAS_LOW: tl.constexpr,
                     HAS_DOWN: tl.constexpr, KEEP_H: tl.constexpr, FIND_LARGEST: tl.constexpr, PRECISION: tl.constexpr,
                     EVEN: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    cols, ranks = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BR)
    col_mask = cols < half
    dtype: tl.constexpr = dh.dtype.element_ty
    before, own_rank, first, last, turn = share_of(tl.program_id(1), table, num_rows, rows_each, shares, GROUPED)
    if GROUPED:
        rank = own_rank
    if HAS_LOW:
        up += before * 2 * half
        up_at = up + cols[None, :] * rank + ranks[:, None]
        up_mask = col_mask[None, :] & (ranks < rank)[:, None]
        up_gate = tl.load(up_at, up_mask, other=0.0)
        up_upper = tl.load(up_at + half * rank, up_mask, other=0.0)
        gate_sum, upper_sum = tl.zeros([BN, BR], tl.float32), tl.zeros([BN, BR], tl.float32)
    if HAS_DOWN:
        down += before * half
        down_block = tl.load(down + ranks[:, None] * half + cols[None, :],
                             (ranks < rank)[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
        down_sum = tl.zeros([BN, BR], tl.float32)
    if FIND_LARGEST:
        gate_factor = tl.load(factor + cols, col_mask, other=0.0)[None, :]
        upper_factor = tl.load(factor + half + cols, col_mask, other=0.0)[None, :]
    for start in tl.range(first, last, BM, num_stages=STAGES):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_mask = rows < last
        mask = row_mask[:, None] & col_mask[None, :]
        at = gate_up + rows[:, None] * (2 * half) + cols[None, :]
        grad_at = dh + rows[:, None] * half + cols[None, :]
        gate, upper = _tile(at, mask, EVEN), _tile(at + half, mask, EVEN)
        grad = _tile(grad_at, mask, EVEN)
        if HAS_LOW:
            gate, low_gate = _low_rank(gate, low, rows, 2 * width, 0, up_gate, row_mask, ranks, rank, PRECISION)
            upper, low_upper = _low_rank(upper, low, rows, 2 * width, rank, up_upper, row_mask, ranks, rank, PRECISION)
        if HAS_DOWN:
            grad, low_next = _low_rank(grad, low_dh, rows, width, 0, down_block, row_mask, ranks, rank,
                                       PRECISION)  # fmt: skip
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = (grad * upper * (sigmoid + silu * (1 - sigmoid))).to(dtype)
        d_upper = (grad * silu).to(dtype)
        h = (silu * upper).to(dtype)
        if EVEN:
            tl.store(at, d_gate)
            tl.store(at + half, d_upper)
        else:
            tl.store(at, d_gate, mask)
            tl.store(at + half, d_upper, mask)
        if KEEP_H:
            tl.store(grad_at, h, mask)
        if FIND_LARGEST:
            both = tl.maximum(tl.abs(d_gate.to(tl.float32) * gate_factor),
                              tl.abs(d_upper.to(tl.float32) * upper_factor))  # fmt: skip
            tl.atomic_max(largest + rows, tl.max(both, 1), row_mask, sem="relaxed")
        if HAS_LOW:
            gate_sum = _sum(gate_sum, d_gate, low_gate, PRECISION, BM)
            upper_sum = _sum(upper_sum, d_upper, low_upper, PRECISION, BM)
        if HAS_DOWN:
            down_sum = _sum(down_sum, h, low_next, PRECISION, BM)
    if HAS_LOW:
        sum_at = up_sums + (turn * total + before) * 2 * half + cols[:, None] * rank + ranks[None, :]
        sum_mask = col_mask[:, None] & (ranks < rank)[None, :]
        tl.store(sum_at, gate_sum, sum_mask)
        tl.store(sum_at + half * rank, upper_sum, sum_mask)
    if HAS_DOWN:
        tl.store(down_sums + (turn * total + before + ranks)[None, :] * half + cols[:, None], down_sum,
                 col_mask[:, None] & (ranks < rank)[None, :])  # fmt: skip


def swiglu_backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    *,
    low_dh: torch.Tensor | None,
    down: torch.Tensor | None,
    factor: torch.Tensor | None,
    quantise: bool,
    groups: Groups | None = None,
) -> SwigluGrads:
    num_rows, half = dh.shape
    # An adapter has one rank in all its layers.
    rank = rank_of(up, groups) or (0 if down is None else down.shape[0] if groups is None else groups.widest)
    is_fused = rank <= MAX_FUSED_RANK
    sums_up, sums_down = is_fused and low is not None, is_fused and low_dh is not None
    if low is not None and not is_fused:
        gate_up = _add_low_rank_(gate_up, low, up)
    if low_dh is not None and not is_fused:
        assert down is not None
        dh = dh.addmm_(low_dh, down)
    largest = torch.zeros(num_rows, device=dh.device) if quantise else None
    launches, total = _launches(dh, groups, rank * is_fused), num_ranks(rank, groups)
    shape = (2 * half, rank) if groups is None else (2 * half * total,)
    up_sums = torch.empty(launches[0].each * sums_up, *shape, device=dh.device, dtype=torch.float32)
    down_sums = torch.empty(launches[0].each * sums_down, total, half, device=dh.device, dtype=torch.float32)
    for some in launches:
        _swiglu_backward[(triton.cdiv(half, 64), some.total)](
            dh, gate_up, low if sums_up else dh, up if sums_up else dh, low_dh if sums_down else dh,
            down if sums_down else dh, dh if factor is None else factor, dh if largest is None else largest,
            up_sums, down_sums, some.table, num_rows, half, some.alone, rank, total, some.rows, some.each,
            GROUPED=some.divisor, HAS_LOW=sums_up, HAS_DOWN=sums_down, KEEP_H=low_dh is not None and not is_fused,
            FIND_LARGEST=quantise, **_block(dh, some.rank, groups), **_backward_warps(dh, some.rank),
        )  # fmt: skip
    up_grad, down_grad = up_sums.sum(0) if sums_up else None, down_sums.sum(0) if sums_down else None
    if low is not None and not is_fused:
        up_grad = rank_gradient(gate_up, low, (half, 2 * half))
    if low_dh is not None and not is_fused:
        down_grad = rank_gradient(low_dh, dh, (low_dh.shape[1],))
    segments = (half, 2 * half) if up is not None else ()
    # In 16 bits dh, read for the last time, has just the size of the two gradients in e4m3.
    into = dh.view(FP8) if quantise and dh.element_size() == 2 else None
    rows = project_rows(
        gate_up,
        factor=factor,
        down=up,
        segments=segments,
        quantise=quantise,
        largest=largest,
        into=into,
        groups=groups,
    )
    return SwigluGrads(rows, up_grad, down_grad)
