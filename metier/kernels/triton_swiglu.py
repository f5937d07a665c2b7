"""Triton kernels of the gated activation, tile by tile. CUDA only.

The low-rank parts are added while the tile is in registers. Where the result is to be quantised, its rows' largest
magnitudes are found on the way (an atomic maximum, which does not depend on the order), so that quantising reads it
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from metier.kernels.reference import Rows, SwigluGrads
from metier.kernels.triton_rows import project_rows

# Wider low-rank parts leave the kernels' registers and go through cuBLAS.
MAX_FUSED_RANK = 64


@triton.jit
def _gate_and_up(gate_up, low, up, rows, cols, row_mask, col_mask, half, rank,
                 HAS_LOW: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """A tile of both halves of gate_up + low-rank part, fp32."""
    mask = row_mask[:, None] & col_mask[None, :]
    at = gate_up + rows[:, None] * (2 * half) + cols[None, :]
    gate = tl.load(at, mask, other=0.0).to(tl.float32)
    upper = tl.load(at + half, mask, other=0.0).to(tl.float32)
    if HAS_LOW:
        ranks = tl.arange(0, BR)
        low_at = low + rows[:, None] * (2 * rank) + ranks[None, :]
        low_mask = row_mask[:, None] & (ranks < rank)[None, :]
        up_at = up + cols[None, :] * rank + ranks[:, None]
        up_mask = col_mask[None, :] & (ranks < rank)[:, None]
        gate = tl.dot(tl.load(low_at, low_mask, other=0.0), tl.load(up_at, up_mask, other=0.0), gate,
                      input_precision=PRECISION)  # fmt: skip
        upper = tl.dot(tl.load(low_at + rank, low_mask, other=0.0), tl.load(up_at + half * rank, up_mask, other=0.0),
                       upper, input_precision=PRECISION)  # fmt: skip
    return gate, upper


@triton.jit
def _swiglu(gate_up, low, up, h_out, largest, num_rows, half, rank, HAS_LOW: tl.constexpr, FIND_LARGEST: tl.constexpr,
            PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, col_mask = rows < num_rows, cols < half
    gate, upper = _gate_and_up(gate_up, low, up, rows, cols, row_mask, col_mask, half, rank, HAS_LOW, PRECISION, BR)
    h = (gate * tl.sigmoid(gate) * upper).to(h_out.dtype.element_ty)
    tl.store(h_out + rows[:, None] * half + cols[None, :], h, row_mask[:, None] & col_mask[None, :])
    if FIND_LARGEST:
        tl.atomic_max(largest + rows, tl.max(tl.abs(h.to(tl.float32)), 1), row_mask)


def swiglu(
    gate_up: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    *,
    down: torch.Tensor | None,
    quantise: bool,
) -> Rows:
    num_rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    rank = up.shape[1] if up is not None else 0
    if low is not None and rank > MAX_FUSED_RANK:
        gate_up, low, rank = _with_low_rank(gate_up, low, up), None, 0
    h = torch.empty(num_rows, half, device=gate_up.device, dtype=gate_up.dtype)
    largest = torch.zeros(num_rows, device=h.device) if quantise else None
    _swiglu[(triton.cdiv(num_rows, 64), triton.cdiv(half, 128))](
        gate_up, h if low is None else low, h if low is None else up, h, h if largest is None else largest,
        num_rows, half, rank, HAS_LOW=low is not None, FIND_LARGEST=quantise, PRECISION=_precision(h),
        BR=max(16, triton.next_power_of_2(rank)), BM=64, BN=128, num_warps=8,
    )  # fmt: skip
    segments = (half,) if down is not None else ()
    return project_rows(h, down=down, segments=segments, quantise=quantise, largest=largest)


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _with_low_rank(gate_up: torch.Tensor, low: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert up is not None
    half, rank = gate_up.shape[1] // 2, up.shape[1]
    parts = (slice(0, half), slice(half, 2 * half))
    sums = [
        torch.addmm(gate_up[:, part], low[:, rank * j : rank * (j + 1)], up[part].T) for j, part in enumerate(parts)
    ]
    return torch.cat(sums, 1)


@triton.jit
def _swiglu_backward(dh, gate_up, low, up, low_dh, down, factor, largest, num_rows, half, rank, next_rank,
                     HAS_LOW: tl.constexpr, HAS_DOWN: tl.constexpr, FIND_LARGEST: tl.constexpr,
                     PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, col_mask = rows < num_rows, cols < half
    mask = row_mask[:, None] & col_mask[None, :]
    dtype: tl.constexpr = dh.dtype.element_ty
    gate, upper = _gate_and_up(gate_up, low, up, rows, cols, row_mask, col_mask, half, rank, HAS_LOW, PRECISION, BR)
    grad_at = dh + rows[:, None] * half + cols[None, :]
    grad = tl.load(grad_at, mask, other=0.0).to(tl.float32)
    if HAS_DOWN:
        nexts = tl.arange(0, BD)
        low_grad = tl.load(low_dh + rows[:, None] * next_rank + nexts[None, :],
                           row_mask[:, None] & (nexts < next_rank)[None, :], other=0.0)  # fmt: skip
        weight = tl.load(down + nexts[:, None] * half + cols[None, :],
                         (nexts < next_rank)[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
        grad = tl.dot(low_grad, weight, grad, input_precision=PRECISION)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = (grad * upper * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype)
    d_up = (grad * silu).to(dtype)
    at = gate_up + rows[:, None] * (2 * half) + cols[None, :]
    tl.store(grad_at, (silu * upper).to(dtype), mask)
    tl.store(at, d_gate, mask)
    tl.store(at + half, d_up, mask)
    if FIND_LARGEST:
        gate_factor = tl.load(factor + cols, col_mask, other=0.0)[None, :]
        up_factor = tl.load(factor + half + cols, col_mask, other=0.0)[None, :]
        both = tl.maximum(tl.abs(d_gate.to(tl.float32) * gate_factor), tl.abs(d_up.to(tl.float32) * up_factor))
        tl.atomic_max(largest + rows, tl.max(both, 1), row_mask)


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
) -> SwigluGrads:
    num_rows, half = dh.shape
    rank = up.shape[1] if up is not None else 0
    next_rank = down.shape[0] if down is not None else 0
    if low is not None and rank > MAX_FUSED_RANK:
        gate_up, low = _with_low_rank(gate_up, low, up), None
    if low_dh is not None and down is not None and next_rank > MAX_FUSED_RANK:
        dh, low_dh = torch.addmm(dh, low_dh, down), None
    largest = torch.zeros(num_rows, device=dh.device) if quantise else None
    _swiglu_backward[(triton.cdiv(num_rows, 64), triton.cdiv(half, 128))](
        dh, gate_up, dh if low is None else low, dh if low is None else up, dh if low_dh is None else low_dh,
        dh if low_dh is None else down, dh if factor is None else factor, dh if largest is None else largest,
        num_rows, half, rank, next_rank,
        HAS_LOW=low is not None, HAS_DOWN=low_dh is not None, FIND_LARGEST=quantise, PRECISION=_precision(dh),
        BR=max(16, triton.next_power_of_2(rank)) if low is not None else 16,
        BD=max(16, triton.next_power_of_2(next_rank)) if low_dh is not None else 16, BM=64, BN=128, num_warps=8,
    )  # fmt: skip
    segments = (half, 2 * half) if up is not None else ()
    rows = project_rows(gate_up, factor=factor, down=up, segments=segments, quantise=quantise, largest=largest)
    return SwigluGrads(dh, gate_up, rows)
