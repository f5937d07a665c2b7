"""Triton kernels that go along rows: normalise, quantise and project in one reading. CUDA only; imported on first use.

A program owns a block of rows and walks their columns twice: once for the sums, the largest magnitude and the
projection on the adapter's rank, once to write. Each equals its namesake in `metier.kernels.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from metier.kernels.reference import FP8, Rows, SwigluGrads

# Wider projections leave the kernel's registers and go through cuBLAS.
MAX_FUSED_RANK = 128


@triton.jit
def _store_rows(source, factor, target, scale, rstd, rows, row_mask, num_cols, source_stride,
                HAS_FACTOR: tl.constexpr, QUANTISE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    for start in range(0, num_cols, BN):
        cols = start + tl.arange(0, BN)
        mask = row_mask[:, None] & (cols < num_cols)[None, :]
        z = tl.load(source + rows[:, None] * source_stride + cols[None, :], mask, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            z = z * tl.load(factor + cols, cols < num_cols, other=0.0).to(tl.float32)[None, :]
        z = z * rstd[:, None]
        if QUANTISE:
            z = tl.minimum(tl.maximum(z / scale[:, None], -448.0), 448.0)
        tl.store(target + rows[:, None] * num_cols + cols[None, :], z.to(target.dtype.element_ty), mask)


@triton.jit
def _project_rows(x, factor, down, target, scale_out, rstd_out, low, num_rows, num_cols, rank, eps,
                  x_stride, down_stride_n, down_stride_r, end0, end1,
                  NORM: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_DOWN: tl.constexpr, QUANTISE: tl.constexpr,
                  SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
                  BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    ranks = tl.arange(0, BR)
    squares = tl.zeros([BM], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    for segment in tl.static_range(SEGMENTS):
        first = 0 if segment == 0 else (end0 if segment == 1 else end1)
        last = num_cols if segment == SEGMENTS - 1 else (end0 if segment == 0 else end1)
        acc = tl.zeros([BM, BR], tl.float32)
        for start in range(first, last, BN):
            cols = start + tl.arange(0, BN)
            col_mask = cols < last
            raw = tl.load(
                x + rows[:, None] * x_stride + cols[None, :], row_mask[:, None] & col_mask[None, :], other=0.0
            )
            value = raw.to(tl.float32)
            if NORM:
                squares += tl.sum(value * value, 1)
            if HAS_FACTOR:
                value = value * tl.load(factor + cols, col_mask, other=0.0).to(tl.float32)[None, :]
            if QUANTISE:
                largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
            if HAS_DOWN:
                weight = tl.load(down + cols[:, None] * down_stride_n + ranks[None, :] * down_stride_r,
                                 col_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
                read = value.to(raw.dtype) if NORM else raw
                acc = tl.dot(read, weight, acc, input_precision=PRECISION)
        if HAS_DOWN:
            if NORM:
                acc = acc * tl.rsqrt(squares / num_cols + eps)[:, None]
            tl.store(low + rows[:, None] * (SEGMENTS * rank) + segment * rank + ranks[None, :],
                     acc.to(low.dtype.element_ty), row_mask[:, None] & (ranks < rank)[None, :])  # fmt: skip
    rstd = tl.zeros([BM], tl.float32) + 1.0
    if NORM:
        rstd = tl.rsqrt(squares / num_cols + eps)
        tl.store(rstd_out + rows, rstd, row_mask)
    scale = tl.maximum(largest * rstd, 1e-12) / 448.0
    if QUANTISE:
        tl.store(scale_out + rows, scale, row_mask)
    if QUANTISE or NORM:
        _store_rows(x, factor, target, scale, rstd, rows, row_mask, num_cols, x_stride, HAS_FACTOR, QUANTISE, BM, BN)


def project_rows(
    x: torch.Tensor,
    *,
    factor: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    segments: tuple[int, ...] = (),
    eps: float | None = None,
    quantise: bool = False,
) -> Rows:
    num_rows, num_cols = x.shape
    is_norm = eps is not None
    assert is_norm or quantise or factor is None
    low = None
    is_fused = down is not None and down.shape[1] <= MAX_FUSED_RANK
    target, scale, rstd = x, x, x
    if is_norm or quantise:
        target = torch.empty(num_rows, num_cols, device=x.device, dtype=FP8 if quantise else x.dtype)
    if quantise:
        scale = torch.empty(num_rows, 1, device=x.device, dtype=torch.float32)
    if is_norm:
        rstd = torch.empty(num_rows, device=x.device, dtype=torch.float32)
    rank = down.shape[1] if down is not None else 0
    if is_fused:
        low = torch.empty(num_rows, len(segments) * rank, device=x.device, dtype=x.dtype)
    if is_norm or quantise or is_fused:
        block = _row_block(rank if is_fused else 0, x.dtype)
        ends = (*segments[:-1], 0, 0) if is_fused else (0, 0)
        _project_rows[(triton.cdiv(num_rows, block["BM"]),)](
            x, x if factor is None else factor, x if down is None else down, target, scale, rstd,
            x if low is None else low, num_rows, num_cols, rank, eps or 0.0,
            x.stride(0), *(down.stride() if down is not None else (0, 0)), ends[0], ends[1],
            NORM=is_norm, HAS_FACTOR=factor is not None, HAS_DOWN=is_fused, QUANTISE=quantise,
            SEGMENTS=len(segments) if is_fused else 1, **block,
        )  # fmt: skip
    if down is not None and not is_fused:
        source = x
        if is_norm:
            source = (x * rstd[:, None]).mul_(factor).to(x.dtype) if quantise else target
        starts = (0, *segments[:-1])
        low = torch.cat([source[:, a:b] @ down[a:b] for a, b in zip(starts, segments, strict=True)], 1)
    has_rows = is_norm or quantise
    return Rows(
        None if quantise else (target if has_rows else x), target if quantise else None, scale if quantise else None,
        low, rstd if is_norm else None,
    )  # fmt: skip


def _row_block(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes by rank: a small block keeps the second reading in the cache."""
    is_wide = rank > 64
    return {
        "BR": max(16, triton.next_power_of_2(rank)), "BM": 16, "BN": 64 if is_wide or dtype == torch.float32 else 128,
        "num_warps": 4, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip


@triton.jit
def _norm_backward(dz, x, rstd_in, weight, low, down, residual, dx, num_rows, num_cols, rank,
                   HAS_LOW: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
                   BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    ranks = tl.arange(0, BR)
    rstd = tl.load(rstd_in + rows, row_mask, other=0.0)
    low_block = tl.zeros([BM, BR], dz.dtype.element_ty)
    if HAS_LOW:
        low_block = tl.load(low + rows[:, None] * rank + ranks[None, :],
                            row_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
    total = tl.zeros([BM], tl.float32)
    for sweep in tl.static_range(2):
        mean = total / num_cols
        for start in range(0, num_cols, BN):
            cols = start + tl.arange(0, BN)
            col_mask = cols < num_cols
            mask = row_mask[:, None] & col_mask[None, :]
            at = rows[:, None] * num_cols + cols[None, :]
            grad = tl.load(dz + at, mask, other=0.0).to(tl.float32)
            if HAS_LOW:
                down_block = tl.load(down + ranks[:, None] * num_cols + cols[None, :],
                                     (ranks < rank)[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
                grad = tl.dot(low_block, down_block, grad, input_precision=PRECISION)
            grad = grad * tl.load(weight + cols, col_mask, other=0.0).to(tl.float32)[None, :]
            unit = tl.load(x + at, mask, other=0.0).to(tl.float32) * rstd[:, None]
            if sweep == 0:
                total += tl.sum(grad * unit, 1)
            else:
                result = rstd[:, None] * (grad - unit * mean[:, None])
                if HAS_RESIDUAL:
                    result += tl.load(residual + at, mask, other=0.0).to(tl.float32)
                tl.store(dx + at, result.to(dx.dtype.element_ty), mask)


def norm_backward(
    dz: torch.Tensor,
    x: torch.Tensor,
    *,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor | None,
    down: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    rank = down.shape[0] if down is not None else 0
    if low is not None and down is not None and rank > MAX_FUSED_RANK:
        dz, low, rank = torch.addmm(dz, low, down), None, 0
    dx = torch.empty_like(x)
    block = _row_block(rank, x.dtype)
    _norm_backward[(triton.cdiv(x.shape[0], block["BM"]),)](
        dz, x, rstd, weight, dz if low is None else low, dz if low is None else down,
        dz if residual is None else residual, dx, x.shape[0], x.shape[1], rank,
        HAS_LOW=low is not None, HAS_RESIDUAL=residual is not None, **block,
    )  # fmt: skip
    return dx


@triton.jit
def _swiglu(gate_up, low, up, down, h_out, low_out, quantised, scale_out, num_rows, half, rank, next_rank,
            down_stride_n, down_stride_r, HAS_LOW: tl.constexpr, HAS_DOWN: tl.constexpr, QUANTISE: tl.constexpr,
            PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    ranks, nexts = tl.arange(0, BR), tl.arange(0, BD)
    low_gate = tl.zeros([BM, BR], gate_up.dtype.element_ty)
    low_up = tl.zeros([BM, BR], gate_up.dtype.element_ty)
    if HAS_LOW:
        low_mask = row_mask[:, None] & (ranks < rank)[None, :]
        low_gate = tl.load(low + rows[:, None] * (2 * rank) + ranks[None, :], low_mask, other=0.0)
        low_up = tl.load(low + rows[:, None] * (2 * rank) + rank + ranks[None, :], low_mask, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    for start in range(0, half, BN):
        cols = start + tl.arange(0, BN)
        col_mask = cols < half
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows[:, None] * (2 * half) + cols[None, :]
        gate = tl.load(gate_up + at, mask, other=0.0).to(tl.float32)
        upper = tl.load(gate_up + at + half, mask, other=0.0).to(tl.float32)
        if HAS_LOW:
            up_mask = (ranks < rank)[:, None] & col_mask[None, :]
            up_at = up + cols[None, :] * rank + ranks[:, None]
            gate = tl.dot(low_gate, tl.load(up_at, up_mask, other=0.0), gate, input_precision=PRECISION)
            upper = tl.dot(low_up, tl.load(up_at + half * rank, up_mask, other=0.0), upper, input_precision=PRECISION)
        h = (gate * tl.sigmoid(gate) * upper).to(gate_up.dtype.element_ty)
        tl.store(h_out + rows[:, None] * half + cols[None, :], h, mask)
        if QUANTISE:
            largest = tl.maximum(largest, tl.max(tl.abs(h.to(tl.float32)), 1))
        if HAS_DOWN:
            weight = tl.load(down + cols[:, None] * down_stride_n + nexts[None, :] * down_stride_r,
                             col_mask[:, None] & (nexts < next_rank)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(h, weight, acc, input_precision=PRECISION)
    if HAS_DOWN:
        tl.store(low_out + rows[:, None] * next_rank + nexts[None, :], acc.to(low_out.dtype.element_ty),
                 row_mask[:, None] & (nexts < next_rank)[None, :])  # fmt: skip
    if QUANTISE:
        scale = tl.maximum(largest, 1e-12) / 448.0
        tl.store(scale_out + rows, scale, row_mask)
        tl.debug_barrier()
        one = tl.zeros([BM], tl.float32) + 1.0
        _store_rows(h_out, h_out, quantised, scale, one, rows, row_mask, half, half, False, True, BM, BN)


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
    next_rank = down.shape[1] if down is not None else 0
    if low is not None and rank > MAX_FUSED_RANK:
        gate_up, low, rank = _with_low_rank(gate_up, low, up), None, 0
    h = torch.empty(num_rows, half, device=gate_up.device, dtype=gate_up.dtype)
    quantised, scale = h, h
    if quantise:
        quantised = torch.empty(num_rows, half, device=h.device, dtype=FP8)
        scale = torch.empty(num_rows, 1, device=h.device, dtype=torch.float32)
    is_fused = down is not None and next_rank <= MAX_FUSED_RANK
    low_out = torch.empty(num_rows, next_rank, device=h.device, dtype=h.dtype) if down is not None else None
    block = _row_block(max(rank, next_rank if is_fused else 0), h.dtype)
    _swiglu[(triton.cdiv(num_rows, block["BM"]),)](
        gate_up, h if low is None else low, h if low is None else up, h if down is None else down, h,
        h if low_out is None else low_out, quantised, scale, num_rows, half, rank, next_rank,
        *(down.stride() if down is not None else (0, 0)),
        HAS_LOW=low is not None, HAS_DOWN=is_fused, QUANTISE=quantise,
        BD=max(16, triton.next_power_of_2(next_rank)) if is_fused else 16,
        **(block | {"BR": max(16, triton.next_power_of_2(rank))}),
    )  # fmt: skip
    if down is not None and not is_fused:
        low_out = h @ down
    return Rows(None, quantised, scale, low_out) if quantise else Rows(h, None, None, low_out)


def _with_low_rank(gate_up: torch.Tensor, low: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert up is not None
    half, rank = gate_up.shape[1] // 2, up.shape[1]
    return torch.cat(
        [torch.addmm(gate_up[:, half * j : half * (j + 1)], low[:, rank * j : rank * (j + 1)],
                     up[half * j : half * (j + 1)].T) for j in range(2)], 1,
    )  # fmt: skip


@triton.jit
def _swiglu_backward(dh, gate_up, low, up, low_dh, down, factor, low_out, quantised, scale_out,
                     num_rows, half, rank, next_rank,
                     HAS_LOW: tl.constexpr, HAS_DOWN: tl.constexpr, PROJECT: tl.constexpr, QUANTISE: tl.constexpr,
                     PRECISION: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    ranks, nexts = tl.arange(0, BR), tl.arange(0, BD)
    dtype: tl.constexpr = dh.dtype.element_ty
    low_gate = tl.zeros([BM, BR], dtype)
    low_up = tl.zeros([BM, BR], dtype)
    low_grad = tl.zeros([BM, BD], dtype)
    low_mask = row_mask[:, None] & (ranks < rank)[None, :]
    if HAS_LOW:
        low_gate = tl.load(low + rows[:, None] * (2 * rank) + ranks[None, :], low_mask, other=0.0)
        low_up = tl.load(low + rows[:, None] * (2 * rank) + rank + ranks[None, :], low_mask, other=0.0)
    if HAS_DOWN:
        low_grad = tl.load(low_dh + rows[:, None] * next_rank + nexts[None, :],
                           row_mask[:, None] & (nexts < next_rank)[None, :], other=0.0)  # fmt: skip
    acc_gate = tl.zeros([BM, BR], tl.float32)
    acc_up = tl.zeros([BM, BR], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    for start in range(0, half, BN):
        cols = start + tl.arange(0, BN)
        col_mask = cols < half
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows[:, None] * (2 * half) + cols[None, :]
        grad_at = rows[:, None] * half + cols[None, :]
        gate = tl.load(gate_up + at, mask, other=0.0).to(tl.float32)
        upper = tl.load(gate_up + at + half, mask, other=0.0).to(tl.float32)
        grad = tl.load(dh + grad_at, mask, other=0.0).to(tl.float32)
        up_mask = col_mask[:, None] & (ranks < rank)[None, :]
        up_at = up + cols[:, None] * rank + ranks[None, :]
        if HAS_LOW:
            gate_weight = tl.load(up_at, up_mask, other=0.0)
            up_weight = tl.load(up_at + half * rank, up_mask, other=0.0)
            gate = tl.dot(low_gate, tl.trans(gate_weight), gate, input_precision=PRECISION)
            upper = tl.dot(low_up, tl.trans(up_weight), upper, input_precision=PRECISION)
        if HAS_DOWN:
            weight = tl.load(down + nexts[:, None] * half + cols[None, :],
                             (nexts < next_rank)[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
            grad = tl.dot(low_grad, weight, grad, input_precision=PRECISION)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = (grad * upper * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype)
        d_up = (grad * silu).to(dtype)
        tl.store(dh + grad_at, (silu * upper).to(dtype), mask)
        tl.store(gate_up + at, d_gate, mask)
        tl.store(gate_up + at + half, d_up, mask)
        if QUANTISE:
            gate_factor = tl.load(factor + cols, col_mask, other=0.0)[None, :]
            up_factor = tl.load(factor + half + cols, col_mask, other=0.0)[None, :]
            largest = tl.maximum(largest, tl.max(tl.abs(d_gate.to(tl.float32) * gate_factor), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(d_up.to(tl.float32) * up_factor), 1))
        if PROJECT:
            acc_gate = tl.dot(d_gate, gate_weight, acc_gate, input_precision=PRECISION)
            acc_up = tl.dot(d_up, up_weight, acc_up, input_precision=PRECISION)
    if PROJECT:
        tl.store(low_out + rows[:, None] * (2 * rank) + ranks[None, :], acc_gate.to(dtype), low_mask)
        tl.store(low_out + rows[:, None] * (2 * rank) + rank + ranks[None, :], acc_up.to(dtype), low_mask)
    if QUANTISE:
        scale = tl.maximum(largest, 1e-12) / 448.0
        tl.store(scale_out + rows, scale, row_mask)
        tl.debug_barrier()
        one = tl.zeros([BM], tl.float32) + 1.0
        _store_rows(gate_up, factor, quantised, scale, one, rows, row_mask, 2 * half, 2 * half, True, True, BM, BN)


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
    is_wide = max(rank, next_rank) > MAX_FUSED_RANK // 2
    whole_up = up
    if is_wide:
        if low is not None:
            gate_up, low = _with_low_rank(gate_up, low, up), None
        if low_dh is not None and down is not None:
            dh, low_dh = torch.addmm(dh, low_dh, down), None
        up, rank, next_rank = None, 0, 0
    low_out = torch.empty(num_rows, 2 * rank, device=dh.device, dtype=dh.dtype) if up is not None else None
    quantised, scale = dh, dh
    if quantise:
        quantised = torch.empty(num_rows, 2 * half, device=dh.device, dtype=FP8)
        scale = torch.empty(num_rows, 1, device=dh.device, dtype=torch.float32)
    block = _row_block(max(rank, next_rank), dh.dtype)
    _swiglu_backward[(triton.cdiv(num_rows, block["BM"]),)](
        dh, gate_up, dh if low is None else low, dh if up is None else up, dh if low_dh is None else low_dh,
        dh if low_dh is None else down, dh if factor is None else factor, dh if low_out is None else low_out,
        quantised, scale, num_rows, half, rank, next_rank,
        HAS_LOW=low is not None, HAS_DOWN=low_dh is not None, PROJECT=up is not None, QUANTISE=quantise,
        BD=max(16, triton.next_power_of_2(next_rank)), **(block | {"BR": max(16, triton.next_power_of_2(rank))}),
    )  # fmt: skip
    if whole_up is not None and up is None:
        low_out = torch.cat([gate_up[:, :half] @ whole_up[:half], gate_up[:, half:] @ whole_up[half:]], 1)
    rows = Rows(None, quantised, scale, low_out) if quantise else Rows(gate_up, None, None, low_out)
    return SwigluGrads(dh, gate_up, rows)
