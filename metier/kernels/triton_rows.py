"""Triton kernels that go along rows: normalise, quantise, project. CUDA only; imported on first use.

Where a sum or the largest magnitude of a row must be known before anything can be written, a program holds whole rows
in registers, and a product of its own projects what is then still in the cache. Where it is known, one reading does
both. Each equals its namesake in `metier.kernels.reference`.

Limits: rows of up to 32,768 columns where they are held whole.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from metier.kernels.groups import Groups
from metier.kernels.reference import FP8, Rows, product32, rank_gradient
from metier.kernels.triton_groups import cut, is_even, layout, num_ranks, share_of

# One adapter's wider projections leave the kernel's registers and go through cuBLAS.
MAX_FUSED_RANK = 128
MAX_SUMMED_RANK = 128


@triton.jit
def _to_e4m3(value, inverse):
    return tl.minimum(tl.maximum(value * inverse, -448.0), 448.0)


@triton.jit
def _whole_rows(x, factor, target, scale_out, rstd_out, num_rows, num_cols, x_stride, eps,
                NORM: tl.constexpr, HAS_FACTOR: tl.constexpr, QUANTISE: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr):  # fmt: skip
    # From the end: what reads next begins with the rows that are still in the cache.
    rows = ((tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < num_rows
    cols = tl.arange(0, BN)
    col_mask = cols < num_cols
    mask = row_mask[:, None] & col_mask[None, :]
    value = tl.load(x + rows[:, None] * x_stride + cols[None, :], mask, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(value * value, 1) / num_cols + eps)
        tl.store(rstd_out + rows, rstd, row_mask)
        value = value * rstd[:, None]
    if HAS_FACTOR:
        value = value * tl.load(factor + cols, col_mask, other=0.0).to(tl.float32)[None, :]
    if QUANTISE:
        scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-12) / 448.0
        tl.store(scale_out + rows, scale, row_mask)
        value = _to_e4m3(value, (1.0 / scale)[:, None])
    tl.store(target + rows[:, None] * num_cols + cols[None, :], value.to(target.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["shares"])
def _scaled_rows(x, factor, down, largest_in, target, scale_out, low, table, num_rows, num_cols, rank, layers, width,
                 shares, x_stride, down_stride_j, down_stride_n, down_stride_r, end0, end1, chunks,
                 GROUPED: tl.constexpr, IS_UP: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_DOWN: tl.constexpr,
                 QUANTISE: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
                 PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A chunk of a segment of columns, in one reading: the rows' largest magnitudes are known, or not asked for."""
    before, own_rank, first_row, last_row, _ = share_of(tl.program_id(0), table, num_rows, BM, shares, GROUPED)
    if GROUPED:
        rank = own_rank * layers
        down += before * down_stride_j
        if IS_UP:
            down_stride_n = own_rank
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
            if QUANTISE:
                # A use of the sum, which makes the product end here. Of a tile that is read twice Triton 3.6 keeps one
                # buffer less than it loads ahead, and overwrites it while a product that runs on still reads it.
                acc += 0.0
    if HAS_DOWN:
        tl.store(low + (chunk * num_rows + rows)[:, None] * width + segment * rank + ranks[None, :],
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
    into: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> Rows:
    """`into` [M, I] e4m3 is written to, where it is given, instead of new memory."""
    num_rows, num_cols = x.shape
    is_norm = eps is not None
    assert is_norm or quantise or factor is None
    target, scale, rstd = x, None, None
    if into is not None and quantise:
        target = into
    elif is_norm or quantise:
        target = torch.empty(num_rows, num_cols, device=x.device, dtype=FP8 if quantise else x.dtype)
    if quantise:
        scale = torch.empty(num_rows, 1, device=x.device, dtype=torch.float32)
    if is_norm:
        rstd = torch.empty(num_rows, device=x.device, dtype=torch.float32)
    if is_norm or (quantise and largest is None):
        block = _row_block(x)
        _whole_rows[(triton.cdiv(num_rows, block["BM"]),)](
            x, x if factor is None else factor, target, x if scale is None else scale, x if rstd is None else rstd,
            num_rows, num_cols, x.stride(0), eps or 0.0, NORM=is_norm, HAS_FACTOR=factor is not None,
            QUANTISE=quantise, **block,
        )  # fmt: skip
    is_scaled = largest is not None and quantise and not is_norm
    low = None
    if down is None or not is_scaled or not _is_fused(down, groups):
        if is_scaled:
            _scale(x, factor, None, (num_cols,), scaled=(largest, target, scale), groups=None)
        if down is not None:
            low = _low(x, target, factor if is_norm else None, rstd, down, segments, groups)
    else:
        low = _scale(x, factor, down, segments, scaled=(largest, target, scale), groups=groups)
    return Rows(None if quantise else target, target if quantise else None, scale, low, rstd)


def _row_block(x: torch.Tensor) -> dict[str, int]:
    """Measured at 2,048 and 8,192 rows of 4,096 columns on an H100: one row or two, four warps or eight, are alike."""
    cols = triton.next_power_of_2(x.shape[1])
    assert cols <= 32768, f"rows of {x.shape[1]} columns"
    return {"BM": max(1, 4096 // cols), "BN": cols, "num_warps": max(4, min(16, cols // 1024))}


def _low(
    x: torch.Tensor,
    target: torch.Tensor,
    factor: torch.Tensor | None,
    rstd: torch.Tensor | None,
    down: torch.Tensor,
    segments: tuple[int, ...],
    groups: Groups | None,
) -> torch.Tensor:
    """The projection of x, or with `rstd` of its normalised form: `target`, unless that is in e4m3."""
    if rstd is None:
        return _project(x, down, segments, groups).to(x.dtype)
    if target.dtype == x.dtype:
        return _project(target, down, segments, groups).to(x.dtype)
    if factor is not None:
        down = (down * factor[:, None]).to(x.dtype)
    low = _project(x, down, segments, groups)
    return torch.mul(low, rstd[:, None], out=torch.empty(low.shape, device=x.device, dtype=x.dtype))


def _project(
    x: torch.Tensor, down: torch.Tensor, segments: tuple[int, ...], groups: Groups | None
) -> torch.Tensor:  # fmt: skip
    """x [M, I] times down [I, R], range by range, in fp32."""
    if groups is not None or (len(segments) > 1 and _is_fused(down, groups)):
        return _scale(x, None, down, segments, scaled=None, groups=groups)
    starts = (0, *segments[:-1])
    parts = [product32(x[:, a:b], down[a:b]) for a, b in zip(starts, segments, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _is_fused(down: torch.Tensor, groups: Groups | None) -> bool:
    # Of several adapters none is too wide: `MAX_GROUPED_RANK`, of at most three layers.
    return groups is not None or down.shape[1] <= MAX_FUSED_RANK


Scaled = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]


def _scale(
    x: torch.Tensor,
    factor: torch.Tensor | None,
    down: torch.Tensor | None,
    segments: tuple[int, ...],
    *,
    scaled: Scaled | None,
    groups: Groups | None,
) -> torch.Tensor:
    """Launches `_scaled_rows`; returns the projection, in x's dtype where x is quantised too, else in fp32.

    `scaled` are the rows' largest magnitudes, what is written, and its scales.
    """
    num_rows, num_cols = x.shape
    largest, target, scale = scaled if scaled is not None else (None, x, None)
    layers, rank, strides = layout(down, num_cols, groups)
    width, launches = len(segments) * rank * layers, cut(x, 64, groups, rank)
    blocks = [_segment_block(x, some.rank * layers, segments, scaled is not None) for some in launches]
    chunks = max(block["chunks"] for block in blocks)
    dtype = x.dtype if scaled is not None and chunks == 1 else torch.float32
    # Narrower adapters' rows end in zeros, and a class of ranks may take fewer chunks than another.
    new = torch.empty if groups is None or len(set(groups.ranks)) == 1 else torch.zeros
    low = new(chunks, num_rows, width, device=x.device, dtype=dtype)
    for some, block in zip(launches, blocks, strict=True):
        block["EVEN"] &= is_even(x, groups)
        chunks = block.pop("chunks")
        _scaled_rows[(some.total, len(segments) * chunks)](
            x, x if factor is None else factor, x if down is None else down, x if largest is None else largest, target,
            x if scale is None else scale, low, some.table, num_rows, num_cols, some.alone * layers, layers, width,
            some.each, x.stride(0), *strides, *(*segments[:-1], 0, 0)[:2], chunks, GROUPED=some.divisor,
            IS_UP=down is not None and down.dim() == 1, SEGMENTS=len(segments), HAS_FACTOR=factor is not None,
            HAS_DOWN=down is not None, QUANTISE=scaled is not None, **block,
        )  # fmt: skip
    total = low[0] if low.shape[0] == 1 else low.sum(0)
    return total.to(x.dtype) if scaled is not None else total


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


@triton.jit(do_not_specialize=["total", "shares"])
def _norm_backward(dz, x, rstd_in, weight, low, down, means, residual, dx, down_sums, table, num_rows, num_cols,
                   rank, layers, width, total, rows_each, shares, GROUPED: tl.constexpr,
                   HAS_LOW: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
                   STAGES: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr):  # fmt: skip
    """Down a block of columns; the gradient of A is summed on the way, over a share of the rows."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_mask = cols < num_cols
    ranks = tl.arange(0, BR)
    factor = tl.load(weight + cols, col_mask, other=0.0).to(tl.float32)
    before, own_rank, first, last, turn = share_of(tl.program_id(1), table, num_rows, rows_each, shares, GROUPED)
    if GROUPED:
        rank = own_rank * layers
    if HAS_LOW:
        down += before * layers * num_cols
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
            low_block = tl.load(low + rows[:, None] * width + ranks[None, :],
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
        at = turn * total + before * layers + ranks
        tl.store(down_sums + at[None, :] * num_cols + cols[:, None], down_sum * factor[:, None],
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
    layers = 1 if groups is None or down is None else down.shape[0] // groups.total
    rank = 0 if down is None or low is None else down.shape[0] if groups is None else groups.widest
    is_fused = rank > 0 and (groups is not None or rank <= MAX_SUMMED_RANK)
    down_grad = None
    if rank and not is_fused:
        assert low is not None and down is not None
        scaled = (low * rstd[:, None]).to(x.dtype)
        dz, down_grad = torch.addmm(dz, low, down), rank_gradient(scaled, x, (rank,)) * weight
    dx, means = torch.empty_like(x), torch.empty(num_rows, device=x.device, dtype=torch.float32)
    is_wide = x.dtype == torch.float32
    low, width = low if is_fused else dz, rank * layers
    _row_means[(triton.cdiv(num_rows, 4),)](
        dz, x, rstd, weight, low, projected if is_fused else dz, means, num_rows, num_cols, width,
        HAS_LOW=is_fused, BR=max(16, triton.next_power_of_2(width * is_fused)), BM=4, BN=1024, num_warps=4,
    )  # fmt: skip
    blocks, total = triton.cdiv(num_cols, 64), num_ranks(rank, groups) * layers
    rows_each = triton.cdiv(triton.cdiv(num_rows, max(1, 1024 // blocks)), 64) * 64
    launches = cut(x, rows_each, groups, rank)
    down_sums = torch.empty(launches[0].each * is_fused, total, num_cols, device=x.device, dtype=torch.float32)
    for some in launches:
        own = some.rank * layers * is_fused
        _norm_backward[(blocks, some.total)](
            dz, x, rstd, weight, low, down if is_fused else dz, means, dz if residual is None else residual, dx,
            down_sums, some.table, num_rows, num_cols, some.alone, layers, width, total, some.rows, some.each,
            GROUPED=some.divisor, HAS_LOW=is_fused, HAS_RESIDUAL=residual is not None,
            EVEN=is_even(x, groups) and num_cols % 64 == 0, PRECISION="ieee" if is_wide else "tf32",
            **_norm_block(own, is_wide),
        )  # fmt: skip
    return dx, down_sums.sum(0) if is_fused else down_grad


def _norm_block(rank: int, is_wide: bool) -> dict[str, int]:
    """Beyond 64 the sums take half of the registers: fewer rows at a time and more warps."""
    is_many = rank > 64
    return {
        "BR": max(16, triton.next_power_of_2(rank)), "BM": 32 if is_many else 64, "BN": 64,
        "STAGES": 1 if is_wide else 2 if is_many else 3, "num_warps": 8 if is_wide or is_many else 4,
    }  # fmt: skip
