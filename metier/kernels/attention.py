"""Causal attention inside each of the documents that lie end to end in a row: no padding, no mask, no crossing over.

On a CUDA device in 16 bits: FlashAttention's variable-length kernels, as torch ships them (Dao, 2023, arXiv
2307.08691), and cuDNN's for documents of one length.
Anywhere else, and for head sizes that those do not take: documents side by side in a padded batch under torch's
scaled_dot_product_attention. Padding stands to the right, where causal attention never looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from metier.kernels import cpu


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents lie in a row of M tokens.

    cu_seqlens [B + 1] int32: their starts and the end. `gather` [B, L] int64 has their positions, L the longest, the
    end padded with the document's own first, so that nothing of another reaches it; `scatter` [M] has the places of
    the row's tokens in it, flat. `equal` is the length that all of them have, if it is a multiple of 128.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    equal: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, is_flash: bool) -> Documents:
        sizes = torch.tensor([0, *lengths])
        starts = sizes.cumsum(0)
        longest = max(lengths)
        cu_seqlens = starts.to(device=device, dtype=torch.int32)
        if is_flash:
            is_equal = longest == min(lengths) and longest % 128 == 0
            return cls(cu_seqlens, longest, None, None, longest if is_equal else 0)
        steps = torch.arange(longest)
        is_token = steps[None] < sizes[1:, None]
        gather = torch.where(is_token, starts[:-1, None] + steps[None], starts[:-1, None])
        return cls(cu_seqlens, longest, gather.to(device), is_token.flatten().nonzero()[:, 0].to(device))


def takes_flash(dtype: torch.dtype, device: torch.device, head_size: int) -> bool:
    """Whether torch's FlashAttention runs: 16 bits, compute capability 8.0 or newer, heads of at most 256."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_size > 256 or head_size % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
        starts, longest = documents.cu_seqlens, documents.max_seqlen
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, unused)
        ctx.documents = documents
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, seed, unused = ctx.saved_tensors
        starts, longest = ctx.documents.cu_seqlens, ctx.documents.max_seqlen
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(), q, k, v, out, lse, starts, starts, longest, longest, 0.0, True, seed, unused
        )
        return dq, dk, dv, None


class _Cudnn(torch.autograd.Function):
    """Documents of one length, as a batch, under cuDNN's kernels: on an H100 in a third of FlashAttention-2's time."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> torch.Tensor:
        q, k, v = (x.view(-1, size, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        found = torch.ops.aten._cudnn_attention_forward(q, k, v, None, None, None, size, size, True, 0.0, True, False)
        ctx.save_for_backward(q, k, v, found[0], found[1], found[6], found[7])
        ctx.size = size
        return found[0].transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        size = ctx.size
        grad = grads[0].contiguous().view(-1, size, *grads[0].shape[1:]).transpose(1, 2)
        found = torch.ops.aten._cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, None, None, size, size, 0.0, True
        )
        return *(x.transpose(1, 2).flatten(0, 1) for x in found), None


def _takes_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> bool:
    """Where it was measured to be faster (Hopper, as many key heads as query heads) and torch finds that it runs."""
    if q.shape[1:] != k.shape[1:] or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    q4, k4, v4 = (x.detach().view(-1, size, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    case = torch.backends.cuda.SDPAParams(q4, k4, v4, None, 0.0, True, False)
    return torch.backends.cuda.can_use_cudnn_attention(case)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, causal and inside documents: q [M, Hq, D], k, v [M, Hkv, D] -> [M, Hq, D]."""
    if documents.equal and _takes_cudnn(q, k, v, documents.equal):
        return _Cudnn.apply(q, k, v, documents.equal)  # type: ignore[no-any-return, no-untyped-call]
    if documents.gather is None or documents.scatter is None:
        return _Flash.apply(q, k, v, documents)  # type: ignore[no-any-return, no-untyped-call]
    if not q.is_cuda:
        return cpu.attention(q, k, v, documents.gather, documents.scatter)
    q, k, v = (x[documents.gather].transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)[documents.scatter]
