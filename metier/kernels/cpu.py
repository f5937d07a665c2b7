"""The ops that a CPU spends its time in, in few passes over memory and in the model's own dtype.

What `metier.kernels.reference` defines, with the same arguments. Sums of a product are fp32 inside of oneDNN; what is
written between two ops is rounded to the model's dtype, as in transformers' own layers. float64 takes the
definitions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from metier.kernels import reference
from metier.kernels.reference import Rows, SwigluGrads, rank_gradient

# Scores that exist at a time, in elements.
MAX_SCORES = 1 << 24


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
    """As `reference.project_rows`; rows that are only projected are not copied."""
    if eps is not None or factor is not None or quantise:
        return reference.project_rows(x, factor=factor, down=down, segments=segments, eps=eps, quantise=quantise)
    if down is None:
        return Rows(x)
    starts = (0, *segments[:-1])
    low = [x[:, a:b] @ down[a:b] for a, b in zip(starts, segments, strict=True)]
    return Rows(x, low=torch.cat(low, 1))


def add_low_rank(
    residual: torch.Tensor, y: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    """residual + y + low up^T, [M, O]; y is overwritten."""
    if low is not None and up is not None:
        y.addmm_(low, up.T)
    return y.add_(residual)


def _add_gate_up(gate_up: torch.Tensor, low: torch.Tensor | None, up: torch.Tensor | None) -> None:
    """Adds low up^T to both halves of gate_up [M, 2F], in place."""
    if low is None or up is None:
        return
    for part, low_part, up_part in zip(gate_up.chunk(2, 1), low.chunk(2, 1), up.chunk(2), strict=True):
        part.addmm_(low_part, up_part.T)


def swiglu(
    gate_up: torch.Tensor,
    low: torch.Tensor | None,
    up: torch.Tensor | None,
    *,
    down: torch.Tensor | None,
    quantise: bool,
) -> Rows:
    """As `reference.swiglu`. gate_up stays as it is: backward adds the low-rank part again."""
    gate_up = gate_up.clone() if low is not None else gate_up
    _add_gate_up(gate_up, low, up)
    gate, linear = gate_up.chunk(2, 1)
    h = F.silu(gate).mul_(linear)
    return project_rows(h, down=down, segments=(h.shape[1],), quantise=quantise)


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
    """As `reference.swiglu_backward`; dh and gate_up are overwritten."""
    if low_dh is not None and down is not None:
        dh.addmm_(low_dh, down)
    _add_gate_up(gate_up, low, up)
    gate, linear = gate_up.chunk(2, 1)
    silu = F.silu(gate)
    half = dh.shape[1]
    grad = torch.empty_like(gate_up)
    torch.ops.aten.silu_backward.grad_input(dh * linear, gate, grad_input=grad[:, :half])
    torch.mul(dh, silu, out=grad[:, half:])
    rows = project_rows(grad, factor=factor, down=up, segments=(half, 2 * half), quantise=quantise)
    h = silu.mul_(linear)
    up_grad = None if low is None else rank_gradient(grad, low, (half, 2 * half))
    down_grad = None if low_dh is None else rank_gradient(low_dh, h, (low_dh.shape[1],))
    return SwigluGrads(rows, up_grad, down_grad)


class _Attention(torch.autograd.Function):
    """Documents side by side, padded; scores are formed for some documents at a time, and again for backward.

    The backward of torch's own kernel took 15 ms a layer of SmolLM2 in bf16 (16 documents of 45 tokens), this takes 3.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, gather, scatter)
        parts = [_side_by_side(x, gather, k.shape[1]) for x in (q, k, v)]
        out = torch.empty_like(parts[0])
        for piece in _pieces(parts[0], parts[1]):
            torch.bmm(_weights(parts[0][piece], parts[1][piece]), parts[2][piece], out=out[piece])
        return _in_a_row(out, gather, scatter, q.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, gather, scatter = ctx.saved_tensors
        queries, keys, values = (_side_by_side(x, gather, k.shape[1]) for x in (q, k, v))
        spread = q.new_zeros(gather.numel(), *q.shape[1:]).index_copy_(0, scatter, grads[0])
        d_out = _heads_first(spread, gather, k.shape[1])
        dq, dk, dv = (torch.empty_like(x) for x in (queries, keys, values))
        scale = 1 / math.sqrt(q.shape[2])
        for piece in _pieces(queries, keys):
            weights = _weights(queries[piece], keys[piece])
            torch.bmm(weights.transpose(1, 2), d_out[piece], out=dv[piece])
            d_weights = torch.bmm(d_out[piece], values[piece].transpose(1, 2))
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(scale)
            torch.bmm(d_scores, keys[piece], out=dq[piece])
            torch.bmm(d_scores.transpose(1, 2), queries[piece], out=dk[piece])
        many, few = q.shape[1], k.shape[1]
        rows = (_in_a_row(x, gather, scatter, n) for x, n in ((dq, many), (dk, few), (dv, few)))
        return *rows, None, None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor
) -> torch.Tensor:
    """Causal attention inside documents: q [M, Hq, D], k, v [M, Hkv, D] -> [M, Hq, D].

    gather [B, L] and scatter [M] as in `metier.kernels.attention.Documents`.
    """
    return _Attention.apply(q, k, v, gather, scatter)  # type: ignore[no-any-return, no-untyped-call]


def _side_by_side(x: torch.Tensor, gather: torch.Tensor, few: int) -> torch.Tensor:
    return _heads_first(x.index_select(0, gather.flatten()), gather, few)


def _heads_first(x: torch.Tensor, gather: torch.Tensor, few: int) -> torch.Tensor:
    """[B L, H, D] -> [B Hkv, G L, D]: the query heads of one key head stand below each other."""
    documents, longest = gather.shape
    size = x.shape[2]
    return x.view(documents, longest, few, -1, size).permute(0, 2, 3, 1, 4).reshape(documents * few, -1, size)


def _in_a_row(x: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor, heads: int) -> torch.Tensor:
    documents, longest = gather.shape
    x = x.view(documents, heads, longest, -1).transpose(1, 2).reshape(documents * longest, heads, -1)
    return x.index_select(0, scatter)


def _pieces(queries: torch.Tensor, keys: torch.Tensor) -> list[slice]:
    step = max(1, MAX_SCORES // (queries.shape[1] * keys.shape[1]))
    return [slice(start, start + step) for start in range(0, queries.shape[0], step)]


def _weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) under the causal mask, [B Hkv, G L, L]."""
    longest = keys.shape[1]
    mask = queries.new_full((longest, longest), -math.inf).triu_(1).repeat(queries.shape[1] // longest, 1)
    return torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=1 / math.sqrt(keys.shape[2])).softmax(-1)
