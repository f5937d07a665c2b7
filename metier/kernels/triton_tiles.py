"""Triton kernels that go over tiles: residual + low-rank part, rotary positions, cross-entropy. CUDA only.

Each equals its namesake in `metier.kernels.reference`. The adapter's part B A x is added here, where its sum is
read anyway, and not by a product of its own that reads and writes the whole output once more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from metier.kernels.groups import Groups
from metier.kernels.reference import Heads, Rotation, rank_gradient
from metier.kernels.triton_groups import cut, layout, num_ranks, rank_of, share_of

MAX_FUSED_RANK = 128
MAX_SUMMED_RANK = 64


@triton.jit(do_not_specialize=["shares"])
def _add_low_rank(residual, y, low, up, out, table, num_rows, num_cols, rank, layers, width, shares,
                  up_stride_j, up_stride_n, up_stride_r, GROUPED: tl.constexpr, IS_UP: tl.constexpr,
                  HAS_RESIDUAL: tl.constexpr, HAS_LOW: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    before, own_rank, first, last, turn = share_of(tl.program_id(0), table, num_rows, BM, shares, GROUPED)
    if GROUPED:
        rank = own_rank * layers
        if IS_UP:
            up_stride_n = own_rank
    rows = (first + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, col_mask = rows < last, cols < num_cols
    mask = row_mask[:, None] & col_mask[None, :]
    at = rows[:, None] * num_cols + cols[None, :]
    total = tl.load(y + at, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask, other=0.0).to(tl.float32)
    if HAS_LOW:
        up += before * up_stride_j
        ranks = tl.arange(0, BR)
        low_block = tl.load(low + rows[:, None] * width + ranks[None, :],
                            row_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
        up_block = tl.load(up + cols[None, :] * up_stride_n + ranks[:, None] * up_stride_r,
                           col_mask[None, :] & (ranks < rank)[:, None], other=0.0)  # fmt: skip
        total = tl.dot(low_block, up_block, total, input_precision=PRECISION)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def add_low_rank(
    residual: torch.Tensor | None,
    y: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    groups: Groups | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Also without a residual; `out` may be y."""
    num_rows, num_cols = y.shape
    layers, rank, strides = layout(up, num_cols, groups)
    if low is not None and up is not None and rank > MAX_FUSED_RANK and groups is None:
        y, low, rank = torch.addmm(y, low, up.T), None, 0
    out = torch.empty_like(y) if out is None else out
    for some in cut(y, 64, groups, rank):
        own = some.rank * layers
        _add_low_rank[(some.total, triton.cdiv(num_cols, 128))](
            y if residual is None else residual, y, y if low is None else low, y if low is None else up, out,
            some.table, num_rows, num_cols, some.alone, layers, rank * layers, some.each, *strides,
            GROUPED=some.divisor, IS_UP=up is not None and up.dim() == 1, HAS_RESIDUAL=residual is not None,
            HAS_LOW=low is not None, PRECISION=_precision(y), BR=max(16, triton.next_power_of_2(own)), BM=64, BN=128,
            num_warps=4,
        )  # fmt: skip
    return out


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _half_head(qkv, low, up, bias, rows, cols, row_mask, col_mask, num_cols, rank, num_low, segment,
               HAS_LOW: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """Half a head's columns of qkv + low-rank part + bias, fp32."""
    mask = row_mask[:, None] & col_mask[None, :]
    value = tl.load(qkv + rows[:, None] * num_cols + cols[None, :], mask, other=0.0).to(tl.float32)
    if HAS_LOW:
        ranks = tl.arange(0, BR)
        low_block = tl.load(low + rows[:, None] * num_low + segment * rank + ranks[None, :],
                            row_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
        up_block = tl.load(up + cols[None, :] * rank + ranks[:, None],
                           col_mask[None, :] & (ranks < rank)[:, None], other=0.0)  # fmt: skip
        value = tl.dot(low_block, up_block, value, input_precision=PRECISION)
    if HAS_BIAS:
        value += tl.load(bias + cols, col_mask, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit(do_not_specialize=["shares"])
def _rotate(qkv, low, up, bias, cos, sin, q_norm, k_norm, table, out, num_rows, num_cols, rank, num_low, num_q, num_kv,
            eps, shares, GROUPED: tl.constexpr,
            HALF: tl.constexpr, HAS_LOW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
            PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, HEADS: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """A block of rows and some heads: their angles are read once. Values, the last heads, are not turned."""
    at = tl.arange(0, BH)
    col_mask = at < HALF
    before, own_rank, begin, last, _ = share_of(tl.program_id(1), table, num_rows, BM, shares, GROUPED)
    if GROUPED:
        rank = own_rank
    up += before * num_cols
    rows = (begin + tl.arange(0, BM)).to(tl.int64)
    row_mask = rows < last
    mask = row_mask[:, None] & col_mask[None, :]
    all_cos = tl.load(cos + rows[:, None] * HALF + at[None, :], mask, other=0.0)
    all_sin = tl.load(sin + rows[:, None] * HALF + at[None, :], mask, other=0.0)
    head0 = tl.program_id(0) * HEADS
    stop = tl.minimum(head0 + HEADS, num_q + 2 * num_kv)
    if GROUPED:
        stop = tl.where(begin < last, stop, head0)
    for head in tl.range(head0, stop, num_stages=STAGES):
        segment = (head >= num_q).to(tl.int32) + (head >= num_q + num_kv).to(tl.int32)
        is_turned = segment < 2
        cols = head * (2 * HALF) + at
        first = _half_head(qkv, low, up, bias, rows, cols, row_mask, col_mask, num_cols, rank, num_low, segment,
                           HAS_LOW, HAS_BIAS, PRECISION, BR)  # fmt: skip
        second = _half_head(qkv, low, up, bias, rows, cols + HALF, row_mask, col_mask, num_cols, rank, num_low, segment,
                            HAS_LOW, HAS_BIAS, PRECISION, BR)  # fmt: skip
        if HAS_NORM:
            norm = q_norm if segment == 0 else k_norm
            rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
            one = first * rstd * tl.load(norm + at, col_mask, other=0.0).to(tl.float32)[None, :]
            two = second * rstd * tl.load(norm + HALF + at, col_mask, other=0.0).to(tl.float32)[None, :]
            first, second = tl.where(is_turned, one, first), tl.where(is_turned, two, second)
        c, s = tl.where(is_turned, all_cos, 1.0), tl.where(is_turned, all_sin, 0.0)
        target = out + rows[:, None] * num_cols + cols[None, :]
        tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask)
        tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask)


@triton.jit
def _before_norm(first, second, raw1, raw2, norm, at, col_mask, eps, HALF: tl.constexpr):
    """The gradient of a head's halves before its norm, from that after it."""
    rstd = tl.rsqrt((tl.sum(raw1 * raw1, 1) + tl.sum(raw2 * raw2, 1)) / (2 * HALF) + eps)[:, None]
    raw1, raw2 = raw1 * rstd, raw2 * rstd
    first = first * tl.load(norm + at, col_mask, other=0.0).to(tl.float32)[None, :]
    second = second * tl.load(norm + HALF + at, col_mask, other=0.0).to(tl.float32)[None, :]
    mean = ((tl.sum(first * raw1, 1) + tl.sum(second * raw2, 1)) / (2 * HALF))[:, None]
    return rstd * (first - raw1 * mean), rstd * (second - raw2 * mean)


@triton.jit(do_not_specialize=["total", "shares"])
def _rotate_backward(dq, dk, dv, qkv, low, up, bias, cos, sin, q_norm, k_norm, table, out,
                     factor, largest, up_sums, num_rows, num_cols, rank, num_low, num_q, num_kv, eps, total, rows_each,
                     shares, GROUPED: tl.constexpr, FIND_LARGEST: tl.constexpr, SUMS: tl.constexpr,
                     HALF: tl.constexpr, HAS_LOW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
                     PRECISION: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """A head, and a share of the rows over which the gradient of `up` is summed."""
    head = tl.program_id(0)
    at = tl.arange(0, BH)
    col_mask = at < HALF
    ranks = tl.arange(0, BR)
    segment = (head >= num_q).to(tl.int32) + (head >= num_q + num_kv).to(tl.int32)
    cols = head * (2 * HALF) + at
    source, heads, inner = dq, num_q, head
    if segment == 1:
        source, heads, inner = dk, num_kv, head - num_q
    if segment == 2:
        source, heads, inner = dv, num_kv, head - num_q - num_kv
    dtype: tl.constexpr = out.dtype.element_ty
    if FIND_LARGEST:
        first_factor = tl.load(factor + cols, col_mask, other=0.0)[None, :]
        second_factor = tl.load(factor + cols + HALF, col_mask, other=0.0)[None, :]
    if SUMS:
        first_sum = tl.zeros([BH, BR], tl.float32)
        second_sum = tl.zeros([BH, BR], tl.float32)
    before, own_rank, begin, last, turn = share_of(tl.program_id(1), table, num_rows, rows_each, shares, GROUPED)
    if GROUPED:
        rank = own_rank
    up += before * num_cols
    for start in tl.range(begin, last, BM, num_stages=1):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        row_mask = rows < last
        mask = row_mask[:, None] & col_mask[None, :]
        grad_at = source + (rows[:, None] * heads + inner) * (2 * HALF) + at[None, :]
        first = tl.load(grad_at, mask, other=0.0).to(tl.float32)
        second = tl.load(grad_at + HALF, mask, other=0.0).to(tl.float32)
        if segment < 2:
            c = tl.load(cos + rows[:, None] * HALF + at[None, :], mask, other=0.0)
            s = tl.load(sin + rows[:, None] * HALF + at[None, :], mask, other=0.0)
            turned = first * c + second * s
            second = second * c - first * s
            first = turned
            if HAS_NORM:
                norm = q_norm if segment == 0 else k_norm
                raw1 = _half_head(qkv, low, up, bias, rows, cols, row_mask, col_mask, num_cols, rank, num_low, segment,
                                  HAS_LOW, HAS_BIAS, PRECISION, BR)  # fmt: skip
                raw2 = _half_head(qkv, low, up, bias, rows, cols + HALF, row_mask, col_mask, num_cols, rank, num_low,
                                  segment, HAS_LOW, HAS_BIAS, PRECISION, BR)  # fmt: skip
                first, second = _before_norm(first, second, raw1, raw2, norm, at, col_mask, eps, HALF)
        target = out + rows[:, None] * num_cols + cols[None, :]
        one, two = first.to(dtype), second.to(dtype)
        tl.store(target, one, mask)
        tl.store(target + HALF, two, mask)
        if FIND_LARGEST:
            both = tl.maximum(tl.abs(one.to(tl.float32) * first_factor), tl.abs(two.to(tl.float32) * second_factor))
            tl.atomic_max(largest + rows, tl.max(both, 1), row_mask, sem="relaxed")
        if SUMS:
            low_block = tl.load(low + rows[:, None] * num_low + segment * rank + ranks[None, :],
                                row_mask[:, None] & (ranks < rank)[None, :], other=0.0)  # fmt: skip
            first_sum = tl.dot(tl.trans(one), low_block, first_sum, input_precision=PRECISION)
            second_sum = tl.dot(tl.trans(two), low_block, second_sum, input_precision=PRECISION)
    if SUMS:
        sum_at = up_sums + turn * total * num_cols + before * num_cols + cols[:, None] * rank + ranks[None, :]
        sum_mask = col_mask[:, None] & (ranks < rank)[None, :]
        tl.store(sum_at, first_sum, sum_mask)
        tl.store(sum_at + HALF * rank, second_sum, sum_mask)


HEADS_EACH = 8


def rotate(
    qkv: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None, heads: Heads, rotation: Rotation,
    groups: Groups | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    # In place, unless the backward pass wants the product as it was.
    out = qkv if rotation.q_norm is None else torch.empty_like(qkv)
    qkv, low, up = _narrow(qkv, low, up, heads, groups)
    num_heads, rank = heads.num_q + 2 * heads.num_kv, rank_of(up, groups)
    for some in cut(out, 32, groups, rank):
        # Measured at 2,048 and 8,192 rows of 12,288 columns on an H100: 32 rows, 8 heads.
        options = _head_options(out, low, some.rank, heads, rotation)
        options |= {"BM": 32, "STAGES": 1 if out.dtype == torch.float32 else 3, "num_warps": 4}
        _rotate[(triton.cdiv(num_heads, HEADS_EACH), some.total)](
            *_head_inputs(qkv, low, up, rotation, out), some.table, out, out.shape[0], out.shape[1], some.alone,
            3 * rank, heads.num_q, heads.num_kv, rotation.eps, some.each, GROUPED=some.divisor, HEADS=HEADS_EACH,
            **options,
        )  # fmt: skip
    q, k, v = out.tensor_split(list(heads.ends[:2]), dim=1)
    return tuple(part.view(part.shape[0], -1, heads.size) for part in (q, k, v))  # type: ignore[return-value]


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor | None,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    heads: Heads,
    rotation: Rotation,
    factor: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    dq, dk, dv = (g.contiguous() for g in grads)
    num_rows, num_cols = dq.shape[0], heads.ends[2]
    out = torch.empty(num_rows, num_cols, device=dq.device, dtype=dq.dtype)
    given, rank = low, rank_of(up, groups)
    has_norm = rotation.q_norm is not None and qkv is not None
    if not has_norm:
        rotation = rotation._replace(bias=None)
    elif qkv is not None:
        qkv, low, up = _narrow(qkv, low, up, heads, groups)
    product = qkv if has_norm and qkv is not None else dq
    sums = low is not None and rank <= MAX_SUMMED_RANK
    largest = torch.zeros(num_rows, device=out.device) if factor is not None else None
    num_heads, total = heads.num_q + 2 * heads.num_kv, num_ranks(rank, groups)
    rows_each = triton.cdiv(triton.cdiv(num_rows, max(1, 1536 // num_heads)), 64) * 64
    launches = cut(out, rows_each, groups, rank)
    shape = (num_cols, rank) if groups is None else (num_cols * total,)
    up_sums = torch.empty(launches[0].each * sums, *shape, device=out.device, dtype=torch.float32)
    for some in launches:
        options = _head_options(out, low if has_norm else None, some.rank, heads, rotation)
        _rotate_backward[(num_heads, some.total)](
            dq, dk, dv, *_head_inputs(product, low, up, rotation, out), some.table, out,
            out if factor is None else factor, out if largest is None else largest, up_sums, num_rows, num_cols,
            some.alone, 3 * rank, heads.num_q, heads.num_kv, rotation.eps, total, some.rows, some.each,
            GROUPED=some.divisor, FIND_LARGEST=factor is not None, SUMS=sums, **options,
        )  # fmt: skip
    up_grad = None
    if given is not None:
        up_grad = up_sums.sum(0) if sums else rank_gradient(out, given, heads.ends)
    return out, largest, up_grad


def _narrow(
    qkv: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None, heads: Heads, groups: Groups | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Adds a low-rank part that is too wide for the kernels' registers by products of its own."""
    if low is None or up is None or groups is not None or up.shape[1] <= MAX_FUSED_RANK:
        return qkv, low, up
    rank, starts = up.shape[1], (0, *heads.ends[:2])
    for j, (a, b) in enumerate(zip(starts, heads.ends, strict=True)):
        qkv[:, a:b] += low[:, j * rank : (j + 1) * rank] @ up[a:b].T
    return qkv, None, None


def _head_inputs(
    qkv: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None, rotation: Rotation, stand_in: torch.Tensor
) -> list[torch.Tensor]:
    """What both rotary kernels read; `stand_in` where there is nothing."""
    given = (qkv, low, up, rotation.bias, rotation.cos, rotation.sin, rotation.q_norm, rotation.k_norm)
    return [stand_in if tensor is None else tensor for tensor in given]


def _head_options(
    out: torch.Tensor, low: torch.Tensor | None, rank: int, heads: Heads, rotation: Rotation
) -> dict[str, Any]:
    half = heads.size // 2
    return {
        "HALF": half, "HAS_LOW": low is not None, "HAS_BIAS": rotation.bias is not None,
        "HAS_NORM": rotation.q_norm is not None, "PRECISION": _precision(out),
        "BR": max(16, triton.next_power_of_2(rank)), "BH": max(16, triton.next_power_of_2(half)),
        # Fewer rows where a wide rank's sums would leave the SM to one block.
        "BM": 64 if rank <= 16 else 32, "num_warps": 4 if rank <= 32 else 8,
    }  # fmt: skip


@triton.jit
def _cross_entropy(logits, targets, losses, num_cols, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * num_cols
    peak = tl.full([BN], -float("inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, num_cols, BN):
        cols = start + tl.arange(0, BN)
        z = tl.load(at + cols, cols < num_cols, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, z)
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.exp(z - safe)
        peak = higher
    top = tl.max(peak, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
    target = tl.load(targets + row)
    counts = (target >= 0).to(tl.float32)
    tl.store(losses + row, counts * (log_sum - tl.load(at + tl.maximum(target, 0)).to(tl.float32)))
    tl.debug_barrier()
    for start in range(0, num_cols, BN):
        cols = start + tl.arange(0, BN)
        z = tl.load(at + cols, cols < num_cols, other=-float("inf")).to(tl.float32)
        p = counts * (tl.exp(z - log_sum) - tl.where(cols == target, 1.0, 0.0))
        tl.store(at + cols, p.to(logits.dtype.element_ty), cols < num_cols)


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = torch.empty(logits.shape[0], device=logits.device, dtype=torch.float32)
    if logits.shape[0]:
        _cross_entropy[(logits.shape[0],)](logits, targets, losses, logits.shape[1], BN=4096, num_warps=8)
    return losses
