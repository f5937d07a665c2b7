"""A Triton kernel for dropout on what an adapter reads, whose masks follow from keys. CUDA only; imported on first use.

Equals its namesake in `metier.kernels.dropout`, to the bit of each mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from metier.kernels.dropout import Dropout


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit(do_not_specialize=["number", "least"])
def _drop_rows(x, keys, rstd, factor, target, num_rows, num_cols, number, least, scale,
               NORM: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    row_mask, col_mask = rows < num_rows, cols < num_cols
    mask = row_mask[:, None] & col_mask[None, :]
    at = rows[:, None] * num_cols + cols[None, :]
    value = tl.load(x + at, mask, other=0.0)
    if NORM:
        unit = value.to(tl.float32) * tl.load(rstd + rows, row_mask, other=0.0)[:, None]
        value = (unit * tl.load(factor + cols, col_mask, other=0.0).to(tl.float32)[None, :]).to(value.dtype)
    key = _mixed(tl.load(keys + rows, row_mask, other=0) + number)
    bits = _mixed(key[:, None] + (cols.to(tl.int32) * -1640531527)[None, :]) & 0x7FFFFFFF
    result = tl.where(bits >= least, value.to(tl.float32) * scale, 0.0)
    if ADD:
        result = result.to(value.dtype).to(tl.float32) + tl.load(target + at, mask, other=0.0).to(tl.float32)
    tl.store(target + at, result.to(target.dtype.element_ty), mask)


def drop_rows(
    x: torch.Tensor,
    dropout: Dropout,
    site: int,
    *,
    rstd: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, num_cols = x.shape
    is_norm = rstd is not None and factor is not None
    target = torch.empty_like(x) if into is None else into
    number = (site * 668265263 + 2**31) % 2**32 - 2**31  # as int32
    _drop_rows[(triton.cdiv(num_rows, 16), triton.cdiv(num_cols, 256))](
        x, dropout.keys, rstd if is_norm else x, factor if is_norm else x, target, num_rows, num_cols, number,
        int(dropout.probability * 2**31), 1 / (1 - dropout.probability),
        NORM=is_norm, ADD=into is not None, BM=16, BN=256, num_warps=4,
    )  # fmt: skip
    return target
