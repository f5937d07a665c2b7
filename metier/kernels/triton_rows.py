"""Triton kernels that go along rows: normalise, quantise and project in one reading. CUDA only; imported on first use.

A program owns a block of rows and walks their columns: twice where a sum or the largest magnitude must be known before
anything can be written, the second time backwards, over what is still in the cache. Each equals its namesake in
`metier.kernels.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from metier.kernels import triton_groups
from metier.kernels.reference import FP8, Groups, Rows, rank_gradient
from metier.kernels.triton_groups import cut, is_even, share_of
from metier.kernels.triton_tiles import add_low_rank

# Wider projections leave the kernel's registers and go through cuBLAS.
MAX_FUSED_RANK = 128
MAX_SUMMED_RANK = 64


@triton.jit
def _to_e4m3(value, inverse):
    return tl.minimum(tl.maximum(value * inverse, -448.0), 448.0)


@triton.jit
def _project_rows(x, factor, down, target, scale_out, rstd_out, low, bounds, num_rows, num_cols, rank, shares, eps,
                  x_stride, down_stride_j, down_stride_n, down_stride_r, GROUPED: tl.constexpr,
                  NORM: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_DOWN: tl.constexpr, QUANTISE: tl.constexpr,
                  PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    adapter, first, last = share_of(tl.program_id(0), bounds, num_rows, BM, shares, GROUPED)
    down += adapter * down_stride_j
    rows = (first + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < last
    stop = num_cols
    if GROUPED:
        stop = tl.where(first < last, num_cols, 0)
    ranks = tl.arange(0, BR)
    squares = tl.zeros([BM], tl.float32)
    largest = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BR], tl.float32)
    for start in range(0, stop, BN):
        cols = start + tl.arange(0, BN)
        col_mask = cols < num_cols
        raw = tl.load(x + rows[:, None] * x_stride + cols[None, :], row_mask[:, None] & col_mask[None, :], other=0.0)
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
    times = tl.zeros([BM], tl.float32) + 1.0
    if NORM:
        times = tl.rsqrt(squares / num_cols + eps)
        tl.store(rstd_out + rows, times, row_mask)
    if HAS_DOWN:
        if NORM:
            acc = acc * times[:, None]
        tl.store(low + rows[:, None] * rank + ranks[None, :], acc.to(low.dtype.element_ty),
                 row_mask[:, None] & (ranks < rank)[None, :])  # fmt: skip
    if QUANTISE:
        scale = tl.maximum(largest * times, 1e-12) / 448.0
        tl.store(scale_out + rows, scale, row_mask)
        times = times / scale
    if QUANTISE or NORM:
        num_blocks = tl.cdiv(stop, BN)
        for step in range(num_blocks):
            cols = (num_blocks - 1 - step) * BN + tl.arange(0, BN)
            mask = row_mask[:, None] & (cols < num_cols)[None, :]
            z = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
            if HAS_FACTOR:
                z = z * tl.load(factor + cols, cols < num_cols, other=0.0).to(tl.float32)[None, :]
            z = _to_e4m3(z, times[:, None]) if QUANTISE else z * times[:, None]
            tl.store(target + rows[:, None] * num_cols + cols[None, :], z.to(target.dtype.element_ty), mask)


@triton.jit
def _scaled_rows(x, factor, down, largest_in, target, scale_out, low, bounds, num_rows, num_cols, rank, shares,
                 x_stride, down_stride_j, down_stride_n, down_stride_r, end0, end1, chunks, GROUPED: tl.constexpr,
                 HAS_FACTOR: tl.constexpr, HAS_DOWN: tl.constexpr, QUANTISE: tl.constexpr, SEGMENTS: tl.constexpr,
                 EVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A chunk of a segment of columns, in one reading: the rows' largest magnitudes are known, or not asked for."""
    adapter, first_row, last_row = share_of(tl.program_id(0), bounds, num_rows, BM, shares, GROUPED)
    down += adapter * down_stride_j
    rows = (first_row + tl.arange(0, BM)).to(tl.int64)
    segment = tl.program_id(1) // chunks
    chunk = tl.program_id(1) % chunks
    row_mask = rows < last_row
    ranks = tl.arange(0, BR)
    first, last = 0, num_cols
    if SEGMENTS > 1:
        first = tl.where(segment == 0, 0, tl.where(segment == 1, end0, end1))
        last = tl.where(segment == SEGMENTS - 1, num_cols, tl.where(segment == 0, end0, end1))
    cols_each = tl.cdiv(tl.cdiv(last - first, BN), chunks) * BN
    first += chunk * cols_each
    last = tl.minimum(first + cols_each, last)
    if GROUPED:
        last = tl.where(first_row < last_row, last, first)
    acc = tl.zeros([BM, BR], tl.float32)
    inverse = tl.zeros([BM], tl.float32)
    if QUANTISE:
        scale = tl.maximum(tl.load(largest_in + rows, row_mask, other=1.0), 1e-12) / 448.0
        inverse = 1.0 / scale
        tl.store(scale_out + rows, scale, row_mask & (tl.program_id(1) == 0))
    for start in tl.range(first, last, BN, num_stages=STAGES):
        cols = start + tl.arange(0, BN)
        col_mask = cols < last
        mask = row_mask[:, None] & col_mask[None, :]
        if EVEN:
            raw = tl.load(x + rows[:, None] * x_stride + cols[None, :])
        else:
            raw = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask, other=0.0)
        if QUANTISE:
            value = raw.to(tl.float32)
            if HAS_FACTOR:
                value = value * tl.load(factor + cols, col_mask, other=0.0).to(tl.float32)[None, :]
            value = _to_e4m3(value, inverse[:, None]).to(target.dtype.element_ty)
            if EVEN:
                tl.store(target + rows[:, None] * num_cols + cols[None, :], value)
            else:
                tl.store(target + rows[:, None] * num_cols + cols[None, :], value, mask)
        if HAS_DOWN:
            weight = tl.load(down + cols[:, None] * down_stride_n + ranks[None, :] * down_stride_r,
                             col_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(raw, weight, acc, input_precision=PRECISION)
    if HAS_DOWN:
        tl.store(low + (chunk * num_rows + rows)[:, None] * (SEGMENTS * rank) + segment * rank + ranks[None, :],
                 acc.to(low.dtype.element_ty), row_mask[:, None] & (ranks < rank)[None, :])  # fmt: skip


def project_rows(
    x: torch.Tensor,
    *,
    factor: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    segments: tuple[int, ...] = (),
    eps: float | None = None,
    quantise: bool = False,
    largest: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> Rows:
    num_rows, num_cols = x.shape
    is_norm = eps is not None
    assert is_norm or quantise or factor is None
    rank = down.shape[-1] if down is not None else 0
    # Of several adapters none is too wide: `MAX_GROUPED_RANK`, of at most three layers.
    is_fused = 0 < rank <= (MAX_FUSED_RANK if groups is None else 256)
    target, scale, rstd, low = x, x, x, None
    if is_norm or quantise:
        target = torch.empty(num_rows, num_cols, device=x.device, dtype=FP8 if quantise else x.dtype)
    if quantise:
        scale = torch.empty(num_rows, 1, device=x.device, dtype=torch.float32)
    if is_norm:
        rstd = torch.empty(num_rows, device=x.device, dtype=torch.float32)
    if is_fused:
        low = torch.empty(num_rows, len(segments) * rank, device=x.device, dtype=x.dtype)
    one, low_out = x if factor is None else factor, x if low is None else low
    options: dict[str, Any] = {"HAS_FACTOR": factor is not None, "HAS_DOWN": is_fused, "QUANTISE": quantise}
    projection = (down if is_fused else x, *(_strides(down) if down is not None else (0, 0, 0)))
    if quantise and not is_norm and largest is None and len(segments) > 1:
        largest = (x.float() * factor if factor is not None else x.float()).abs().amax(1)
    if is_norm or (quantise and largest is None):
        block = _row_block(x, rank * is_fused)
        shares = cut(x, block["BM"], groups)
        _project_rows[(shares.total,)](
            x, one, projection[0], target, scale, rstd, low_out, shares.bounds, num_rows, num_cols, rank, shares.each,
            eps or 0.0, x.stride(0), *projection[1:], GROUPED=shares.is_grouped, NORM=is_norm, **options, **block,
        )  # fmt: skip
    elif quantise or is_fused:
        ends = segments if is_fused else (num_cols,)
        block = _segment_block(x, rank * is_fused, ends, quantise)
        block["EVEN"] &= is_even(x, groups)
        chunks, shares = block.pop("chunks"), cut(x, block["BM"], groups)
        if chunks > 1 and low is not None:
            low_out = torch.empty(chunks, *low.shape, device=x.device, dtype=torch.float32)
        _scaled_rows[(shares.total, len(ends) * chunks)](
            x, one, projection[0], x if largest is None else largest, target, scale, low_out, shares.bounds, num_rows,
            num_cols, rank, shares.each, x.stride(0), *projection[1:], *(*ends[:-1], 0, 0)[:2], chunks,
            GROUPED=shares.is_grouped, SEGMENTS=len(ends), **options, **block,
        )  # fmt: skip
        if chunks > 1 and low is not None:
            low.copy_(low_out.sum(0))
    if down is not None and not is_fused:
        source = x
        if is_norm:
            assert factor is not None
            source = (x * rstd[:, None] * factor).to(x.dtype) if quantise else target
        starts = (0, *segments[:-1])
        low = torch.cat([source[:, a:b] @ down[a:b] for a, b in zip(starts, segments, strict=True)], 1)
    return Rows(
        None if quantise else target, target if quantise else None, scale if quantise else None, low,
        rstd if is_norm else None,
    )  # fmt: skip


def _strides(down: torch.Tensor) -> tuple[int, int, int]:
    """From one adapter to the next, along the columns, along the rank."""
    return 0 if down.dim() == 2 else down.stride(0), down.stride(-2), down.stride(-1)


def _row_block(x: torch.Tensor, rank: int) -> dict[str, Any]:
    """Block sizes, measured at 2,048 to 8,192 rows of 4,096 columns on an H100; fewer rows get smaller blocks."""
    is_small = rank > 64 or x.dtype == torch.float32
    is_tall = x.shape[0] >= (2048 if rank <= 16 else 8192) and not is_small
    return {
        "BR": max(16, triton.next_power_of_2(rank)), "BM": 64 if is_tall else 16, "BN": 64 if is_small else 256,
        "num_warps": 8 if is_tall else 4, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _segment_block(x: torch.Tensor, rank: int, ends: tuple[int, ...], quantise: bool) -> dict[str, Any]:
    """Block sizes, measured at 8,192 rows of 11,008 to 22,016 columns on an H100; few rows are shared by chunks."""
    is_small = rank > 64 or x.dtype == torch.float32
    programs = triton.cdiv(x.shape[0], 64) * len(ends)
    is_wide = quantise and programs >= 256 and not is_small
    cols = 256 if is_wide else 64 if is_small else 128
    shortest = min(b - a for a, b in zip((0, *ends[:-1]), ends, strict=True))
    return {
        "BR": max(16, triton.next_power_of_2(rank)), "BM": 64, "BN": cols, "num_warps": 8 if is_wide else 4,
        "STAGES": 1 if x.dtype == torch.float32 else 2 if is_wide else 3,
        "EVEN": all(end % cols == 0 for end in ends),
        "chunks": 1 if is_wide else max(1, min(512 // programs, shortest // cols)),
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip


@triton.jit
def _row_means(dz, x, rstd_in, weight, low, projected, means, num_rows, num_cols, rank,
               HAS_LOW: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The mean over a row of gradient times unit; the low-rank part of that is low . (x A^T), which forward kept."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    part = tl.zeros([BM, BN], tl.float32)
    for start in range(0, num_cols, BN):
        cols = start + tl.arange(0, BN)
        mask = row_mask[:, None] & (cols < num_cols)[None, :]
        at = rows[:, None] * num_cols + cols[None, :]
        scaled = tl.load(dz + at, mask, other=0.0).to(tl.float32) * tl.load(x + at, mask, other=0.0).to(tl.float32)
        part += scaled * tl.load(weight + cols, cols < num_cols, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(part, 1) * tl.load(rstd_in + rows, row_mask, other=0.0)
    if HAS_LOW:
        ranks = tl.arange(0, BR)
        at = rows[:, None] * rank + ranks[None, :]
        mask = row_mask[:, None] & (ranks < rank)[None, :]
        total += tl.sum(tl.load(low + at, mask, other=0.0).to(tl.float32)
                        * tl.load(projected + at, mask, other=0.0).to(tl.float32), 1)  # fmt: skip
    tl.store(means + rows, total / num_cols, row_mask)


@triton.jit
def _norm_backward(dz, x, rstd_in, weight, low, down, means, residual, dx, down_sums, bounds, num_rows, num_cols,
                   rank, rows_each, shares, GROUPED: tl.constexpr,
                   HAS_LOW: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
                   STAGES: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):  # fmt: skip
    """Down a block of columns; the gradient of A is summed on the way, over a share of the rows."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    col_mask = cols < num_cols
    ranks = tl.arange(0, BR)
    factor = tl.load(weight + cols, col_mask, other=0.0).to(tl.float32)
    adapter, first, last = share_of(split, bounds, num_rows, rows_each, shares, GROUPED)
    if HAS_LOW:
        down += adapter * rank * num_cols
        down_block = tl.load(down + ranks[:, None] * num_cols + cols[None, :],
                             (ranks < rank)[:, None] & col_mask[None, :], other=0.0)  # fmt: skip
        down_sum = tl.zeros([BN, BR], tl.float32)
    for start in tl.range(first, last, BM, num_stages=STAGES):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_mask = rows < last
        mask = row_mask[:, None] & col_mask[None, :]
        at = rows[:, None] * num_cols + cols[None, :]
        if EVEN:
            grad = tl.load(dz + at).to(tl.float32)
            raw = tl.load(x + at)
        else:
            grad = tl.load(dz + at, mask, other=0.0).to(tl.float32)
            raw = tl.load(x + at, mask, other=0.0)
        rstd = tl.load(rstd_in + rows, row_mask, other=0.0)
        mean = tl.load(means + rows, row_mask, other=0.0)
        if HAS_LOW:
            low_block = tl.load(low + rows[:, None] * rank + ranks[None, :],
                                row_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
            grad = tl.dot(low_block, down_block, grad, input_precision=PRECISION)
            scaled = (low_block.to(tl.float32) * rstd[:, None]).to(low_block.dtype)
            down_sum = tl.dot(tl.trans(raw), scaled, down_sum, input_precision=PRECISION)
        result = rstd[:, None] * (grad * factor[None, :] - raw.to(tl.float32) * (rstd * mean)[:, None])
        if HAS_RESIDUAL:
            if EVEN:
                result += tl.load(residual + at).to(tl.float32)
            else:
                result += tl.load(residual + at, mask, other=0.0).to(tl.float32)
        if EVEN:
            tl.store(dx + at, result.to(dx.dtype.element_ty))
        else:
            tl.store(dx + at, result.to(dx.dtype.element_ty), mask)
    if HAS_LOW:
        tl.store(down_sums + (split * rank + ranks)[None, :] * num_cols + cols[:, None], down_sum * factor[:, None],
                 col_mask[:, None] & (ranks < rank)[None, :])  # fmt: skip


def norm_backward(
    dz: torch.Tensor,
    x: torch.Tensor,
    *,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor | None,
    down: torch.Tensor | None,
    projected: torch.Tensor | None,
    residual: torch.Tensor | None,
    groups: Groups | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    num_rows, num_cols = x.shape
    rank = down.shape[-2] if down is not None and low is not None else 0
    is_fused = 0 < rank <= MAX_SUMMED_RANK
    down_grad = None
    if rank and not is_fused:
        assert low is not None and down is not None
        scaled = (low * rstd[:, None]).to(x.dtype)
        if groups is None:
            dz, down_grad = torch.addmm(dz, low, down), rank_gradient(scaled, x, (rank,)) * weight
        else:
            dz = add_low_rank(None, dz, low, down.mT, groups)
            down_grad = triton_groups.rank_gradient(scaled, x, (rank,), groups) * weight
    dx, means = torch.empty_like(x), torch.empty(num_rows, device=x.device, dtype=torch.float32)
    is_wide = x.dtype == torch.float32
    ranks = {"HAS_LOW": is_fused, "BR": max(16, triton.next_power_of_2(rank * is_fused))}
    low = low if is_fused else dz
    _row_means[(triton.cdiv(num_rows, 4),)](
        dz, x, rstd, weight, low, projected if is_fused else dz, means, num_rows, num_cols, rank,
        **ranks, BM=4, BN=1024, num_warps=4,
    )  # fmt: skip
    blocks = triton.cdiv(num_cols, 64)
    rows_each = triton.cdiv(triton.cdiv(num_rows, max(1, 1024 // blocks)), 64) * 64
    shares = cut(x, rows_each, groups)
    down_sums = torch.empty(shares.total * is_fused, rank, num_cols, device=x.device, dtype=torch.float32)
    _norm_backward[(blocks, shares.total)](
        dz, x, rstd, weight, low, down if is_fused else dz, means, dz if residual is None else residual, dx, down_sums,
        shares.bounds, num_rows, num_cols, rank, shares.rows, shares.each, GROUPED=shares.is_grouped,
        HAS_RESIDUAL=residual is not None, EVEN=is_even(x, groups) and num_cols % 64 == 0, STAGES=1 if is_wide else 3,
        PRECISION="ieee" if is_wide else "tf32", **ranks, BM=64, BN=64, num_warps=8 if is_wide else 4,
    )  # fmt: skip
    return dx, shares.summed(down_sums) if is_fused else down_grad
