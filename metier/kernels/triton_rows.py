"""Triton kernels that go along rows: normalise, quantise and project in one reading. CUDA only; imported on first use.

A program owns a block of rows and walks their columns twice: once for the sums, the largest magnitude and the
projection on the adapter's rank, once to write. Each equals its namesake in `metier.kernels.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from metier.kernels.reference import FP8, Rows

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
def _project_rows(x, factor, down, largest_in, target, scale_out, rstd_out, low, num_rows, num_cols, rank, eps,
                  x_stride, down_stride_n, down_stride_r, end0, end1,
                  NORM: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_DOWN: tl.constexpr, QUANTISE: tl.constexpr,
                  IS_SCALED: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
                  BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    ranks = tl.arange(0, BR)
    squares = tl.zeros([BM], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    if IS_SCALED:
        largest = tl.load(largest_in + rows, row_mask, other=1.0)
        scale = tl.maximum(largest, 1e-12) / 448.0
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
            if IS_SCALED:
                z = tl.minimum(tl.maximum(value / scale[:, None], -448.0), 448.0)
                tl.store(target + rows[:, None] * num_cols + cols[None, :], z.to(target.dtype.element_ty),
                         row_mask[:, None] & col_mask[None, :])  # fmt: skip
            elif QUANTISE:
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
    if (QUANTISE and not IS_SCALED) or NORM:
        _store_rows(x, factor, target, scale, rstd, rows, row_mask, num_cols, x_stride, HAS_FACTOR, QUANTISE, BM, BN)


def project_rows(
    x: torch.Tensor,
    *,
    factor: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    segments: tuple[int, ...] = (),
    eps: float | None = None,
    quantise: bool = False,
    largest: torch.Tensor | None = None,
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
        block = _row_block(x, len(segments) * rank if is_norm and is_fused else rank * is_fused)
        ends = (*segments[:-1], 0, 0) if is_fused else (0, 0)
        _project_rows[(triton.cdiv(num_rows, block["BM"]),)](
            x, x if factor is None else factor, x if down is None else down, x if largest is None else largest,
            target, scale, rstd, x if low is None else low, num_rows, num_cols, rank, eps or 0.0,
            x.stride(0), *(down.stride() if down is not None else (0, 0)), ends[0], ends[1],
            NORM=is_norm, HAS_FACTOR=factor is not None, HAS_DOWN=is_fused, QUANTISE=quantise,
            IS_SCALED=largest is not None, SEGMENTS=len(segments) if is_fused else 1, **block,
        )  # fmt: skip
    if down is not None and not is_fused:
        source = x
        if is_norm:
            assert factor is not None
            source = (x * rstd[:, None] * factor).to(x.dtype) if quantise else target
        starts = (0, *segments[:-1])
        low = torch.cat([source[:, a:b] @ down[a:b] for a, b in zip(starts, segments, strict=True)], 1)
    has_rows = is_norm or quantise
    return Rows(
        None if quantise else (target if has_rows else x), target if quantise else None, scale if quantise else None,
        low, rstd if is_norm else None,
    )  # fmt: skip


def _row_block(x: torch.Tensor, rank: int) -> dict[str, Any]:
    """Block sizes, measured at 8,192 rows of 4,096 to 22,016 columns on an H100; fewer rows get smaller blocks."""
    is_small = rank > 64 or x.dtype == torch.float32
    num_rows = x.shape[0]
    return {
        "BR": max(16, triton.next_power_of_2(rank)), "BM": 64 if num_rows >= 8192 else 32 if num_rows >= 4096 else 16,
        "BN": 64 if is_small else 256, "num_warps": 8 if num_rows >= 8192 else 4,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
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
    block = _row_block(x, rank)
    block |= {"BM": min(32, block["BM"]), "num_warps": 4}
    _norm_backward[(triton.cdiv(x.shape[0], block["BM"]),)](
        dz, x, rstd, weight, dz if low is None else low, dz if low is None else down,
        dz if residual is None else residual, dx, x.shape[0], x.shape[1], rank,
        HAS_LOW=low is not None, HAS_RESIDUAL=residual is not None, **block,
    )  # fmt: skip
    return dx
