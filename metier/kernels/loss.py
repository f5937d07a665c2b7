"""Cross-entropy without the logits: the final norm and the frozen head, at supervised positions alone.

The head is applied to a slice of positions at a time. A slice's logits become its gradient in place and are multiplied
back at once, so that no more than `CHUNK` rows of the vocabulary's width exist; the head's own gradient, which nobody
wants, is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from metier.kernels import ops

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """The final norm's weight [I] with its eps, and the output head [V, I]."""

    norm: torch.Tensor
    eps: float
    weight: torch.Tensor


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, head: Head, chunk: int
    ) -> torch.Tensor:
        x = hidden.index_select(0, positions)
        rows = ops.project_rows(x, factor=head.norm, eps=head.eps)
        assert rows.dense is not None
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        losses = []
        for start in range(0, x.shape[0], chunk):
            piece = slice(start, start + chunk)
            logits = rows.dense[piece] @ head.weight.T
            losses.append(ops.cross_entropy_rows(logits, targets[piece]))
            if grad is not None:
                torch.mm(logits, head.weight, out=grad[piece])
            del logits
        if grad is not None:
            grad, _ = ops.norm_backward(
                grad, x, rstd=rows.rstd, weight=head.norm, low=None, down=None, projected=None, residual=None
            )
        ctx.save_for_backward(grad, positions)
        ctx.num_rows = hidden.shape[0]
        return torch.cat(losses) if losses else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, positions = ctx.saved_tensors
        whole = torch.zeros(ctx.num_rows, grad.shape[1], device=grad.device, dtype=grad.dtype)
        # Positions that carry no loss may name the same row; they add zeros.
        whole.index_add_(0, positions, grad * grads[0].to(grad.dtype)[:, None])
        return whole, None, None, None, None


def head_losses(
    hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, head: Head, *, chunk: int = CHUNK
) -> torch.Tensor:
    """Each position's negative log-likelihood, [N] fp32.

    hidden [M, I] before the final norm; positions [N] int64; targets [N] int64, -100 where there is no loss.
    """
    return _HeadLoss.apply(hidden, positions, targets, head, chunk)  # type: ignore[no-any-return, no-untyped-call]
