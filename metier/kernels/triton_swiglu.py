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

from metier.kernels.reference import FP8, MAX_GROUPED_RANK, Groups, Rows, SwigluGrads, rank_gradient
from metier.kernels.triton_groups import Shares, cut, is_even, share_of
from metier.kernels.triton_rows import project_rows

# Wider low-rank parts leave the kernels' registers and go through cuBLAS.
MAX_FUSED_RANK = 64
MAX_SUMMED_RANK = 32


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
def _swiglu(gate_up, low, up, h_out, largest, bounds, num_rows, half, rank, rows_each, shares, GROUPED: tl.constexpr,
            HAS_LOW: tl.constexpr, FIND_LARGEST: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
            STAGES: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_mask = cols < half
    ranks = tl.arange(0, BR)
    adapter, first, last = share_of(tl.program_id(1), bounds, num_rows, rows_each, shares, GROUPED)
    if HAS_LOW:
        up += adapter * 2 * half * rank
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
            gate, _ = _low_rank(gate, low, rows, 2 * rank, 0, up_gate, row_mask, ranks, rank, PRECISION)
            upper, _ = _low_rank(upper, low, rows, 2 * rank, rank, up_upper, row_mask, ranks, rank, PRECISION)
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
    rank = up.shape[-1] if up is not None else 0
    if low is not None and rank > MAX_FUSED_RANK:
        gate_up, low, rank = _with_low_rank(gate_up, low, up), None, 0
    h = torch.empty(num_rows, half, device=gate_up.device, dtype=gate_up.dtype)
    largest = torch.zeros(num_rows, device=h.device) if quantise else None
    blocks, shares, options = _shares(h, rank, groups, stages=FORWARD_STAGES)
    _swiglu[(blocks, shares.total)](
        gate_up, h if low is None else low, h if low is None else up, h, h if largest is None else largest,
        shares.bounds, num_rows, half, rank, shares.rows, shares.each, GROUPED=shares.is_grouped,
        HAS_LOW=low is not None, FIND_LARGEST=quantise, **options,
    )  # fmt: skip
    segments = (half,) if down is not None else ()
    return project_rows(h, down=down, segments=segments, quantise=quantise, largest=largest, groups=groups)


FORWARD_STAGES = 3


def _shares(
    x: torch.Tensor, rank: int, groups: Groups | None, *, stages: int
) -> tuple[int, Shares, dict[str, Any]]:  # fmt: skip
    """Grid and block sizes, measured at 8,192 rows of 11,008 columns on an H100: some 1,300 programs in all."""
    num_rows, num_cols = x.shape
    is_wide = x.dtype == torch.float32
    blocks = triton.cdiv(num_cols, 64)
    rows_each = triton.cdiv(triton.cdiv(num_rows, max(1, 1376 // blocks)), 64) * 64
    return blocks, cut(x, rows_each, groups), {
        "BM": 64, "BN": 64, "BR": max(16, triton.next_power_of_2(rank)),
        "STAGES": 1 if is_wide else stages, "num_warps": 4 if rank <= 16 and not is_wide else 8,
        "EVEN": is_even(x, groups) and num_cols % 64 == 0, "PRECISION": "ieee" if is_wide else "tf32",
    }  # fmt: skip


def _with_low_rank(gate_up: torch.Tensor, low: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert up is not None
    half, rank = gate_up.shape[1] // 2, up.shape[1]
    parts = (slice(0, half), slice(half, 2 * half))
    sums = [
        torch.addmm(gate_up[:, part], low[:, rank * j : rank * (j + 1)], up[part].T) for j, part in enumerate(parts)
    ]
    return torch.cat(sums, 1)


@triton.jit
def _swiglu_backward(dh, gate_up, low, up, low_dh, down, factor, largest, up_sums, down_sums, bounds, num_rows, half,
                     rank, next_rank, rows_each, shares, GROUPED: tl.constexpr,
                     HAS_LOW: tl.constexpr, HAS_DOWN: tl.constexpr, KEEP_H: tl.constexpr,
                     FIND_LARGEST: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
                     BR: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    cols, split = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    col_mask = cols < half
    ranks, nexts = tl.arange(0, BR), tl.arange(0, BD)
    dtype: tl.constexpr = dh.dtype.element_ty
    adapter, first, last = share_of(split, bounds, num_rows, rows_each, shares, GROUPED)
    if HAS_LOW:
        up += adapter * 2 * half * rank
        up_at = up + cols[None, :] * rank + ranks[:, None]
        up_mask = col_mask[None, :] & (ranks < rank)[:, None]
        up_gate = tl.load(up_at, up_mask, other=0.0)
        up_upper = tl.load(up_at + half * rank, up_mask, other=0.0)
        gate_sum, upper_sum = tl.zeros([BN, BR], tl.float32), tl.zeros([BN, BR], tl.float32)
    if HAS_DOWN:
        down += adapter * next_rank * half
        down_block = tl.load(down + nexts[:, None] * half + cols[None, :],
                             (nexts < next_rank)[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
        down_sum = tl.zeros([BN, BD], tl.float32)
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
            gate, low_gate = _low_rank(gate, low, rows, 2 * rank, 0, up_gate, row_mask, ranks, rank, PRECISION)
            upper, low_upper = _low_rank(upper, low, rows, 2 * rank, rank, up_upper, row_mask, ranks, rank, PRECISION)
        if HAS_DOWN:
            grad, low_next = _low_rank(grad, low_dh, rows, next_rank, 0, down_block, row_mask, nexts, next_rank,
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
            both = tl.maximum(
                tl.abs(d_gate.to(tl.float32) * gate_factor), tl.abs(d_upper.to(tl.float32) * upper_factor)
            )
            tl.atomic_max(largest + rows, tl.max(both, 1), row_mask, sem="relaxed")
        if HAS_LOW:
            gate_sum = tl.dot(tl.trans(d_gate), low_gate, gate_sum, input_precision=PRECISION)
            upper_sum = tl.dot(tl.trans(d_upper), low_upper, upper_sum, input_precision=PRECISION)
        if HAS_DOWN:
            down_sum = tl.dot(tl.trans(h), low_next, down_sum, input_precision=PRECISION)
    if HAS_LOW:
        sum_at = up_sums + (split * 2 * half + cols)[:, None] * rank + ranks[None, :]
        sum_mask = col_mask[:, None] & (ranks < rank)[None, :]
        tl.store(sum_at, gate_sum, sum_mask)
        tl.store(sum_at + half * rank, upper_sum, sum_mask)
    if HAS_DOWN:
        sum_at = down_sums + (split * next_rank + nexts)[None, :] * half + cols[:, None]
        tl.store(sum_at, down_sum, col_mask[:, None] & (nexts < next_rank)[None, :])


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
    rank = up.shape[-1] if up is not None and low is not None else 0
    next_rank = down.shape[-2] if down is not None and low_dh is not None else 0
    widest = MAX_SUMMED_RANK if groups is None else MAX_GROUPED_RANK
    sums_up, sums_down = 0 < rank <= widest, 0 < next_rank <= widest
    if rank and not sums_up:
        assert low is not None
        gate_up = _with_low_rank(gate_up, low, up)
    if next_rank and not sums_down:
        assert low_dh is not None and down is not None
        dh = torch.addmm(dh, low_dh, down)
    largest = torch.zeros(num_rows, device=dh.device) if quantise else None
    most = max(rank * sums_up, next_rank * sums_down)
    blocks, shares, options = _shares(dh, most, groups, stages=3 if most <= MAX_SUMMED_RANK else 1)
    up_sums = torch.empty(shares.total * sums_up, 2 * half, rank, device=dh.device, dtype=torch.float32)
    down_sums = torch.empty(shares.total * sums_down, next_rank, half, device=dh.device, dtype=torch.float32)
    _swiglu_backward[(blocks, shares.total)](
        dh, gate_up, low if sums_up else dh, up if sums_up else dh, low_dh if sums_down else dh,
        down if sums_down else dh, dh if factor is None else factor, dh if largest is None else largest,
        up_sums, down_sums, shares.bounds, num_rows, half, rank, next_rank, shares.rows, shares.each,
        GROUPED=shares.is_grouped,
        HAS_LOW=sums_up, HAS_DOWN=sums_down, KEEP_H=bool(next_rank) and not sums_down, FIND_LARGEST=quantise,
        BD=max(16, triton.next_power_of_2(next_rank * sums_down)), **options,
    )  # fmt: skip
    up_grad = shares.summed(up_sums) if sums_up else None
    if rank and not sums_up:
        assert low is not None
        up_grad = rank_gradient(gate_up, low, (half, 2 * half))
    down_grad = shares.summed(down_sums) if sums_down else None
    if next_rank and not sums_down:
        assert low_dh is not None
        down_grad = rank_gradient(low_dh, dh, (next_rank,))
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
