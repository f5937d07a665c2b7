"""Cross-entropy without the logits: the frozen output head is applied to a slice of positions at a time.

A slice's logits become its gradient in place and are multiplied back at once, so that no more than `CHUNK` rows of the
vocabulary's width exist, and the head's own gradient, which nobody wants, is never formed.
"""

from __future__ import annotations

from typing import Any

import torch

from metier.kernels import ops

CHUNK = 4096


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wants_grad else None
        total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, hidden.shape[0], chunk):
            piece = slice(start, start + chunk)
            logits = hidden[piece] @ head.T
            total += ops.cross_entropy_rows(logits, targets[piece]).sum()
            if grad is not None:
                torch.mm(logits, head, out=grad[piece])
            del logits
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None


def head_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Summed negative log-likelihood, an fp32 scalar: hidden [N, I] (normalised), head [V, I] frozen, targets [N]."""
    return _HeadLoss.apply(hidden, head, targets, chunk)  # type: ignore[no-any-return, no-untyped-call]
