"""Plain-PyTorch definition of every op: what a faster kernel must equal, and the path that any device takes.

Shapes: B batch, T tokens, I input features, O output features, R rank, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """y = x W^T + bias + scaling * dropout(x) A^T B^T (Hu et al., 2021, arXiv 2106.09685, equation 3).

    x [..., I] and weight [O, I] share one dtype, which is also y's; lora_a [R, I] and lora_b [O, R] are
    the fp32 masters: B is scaled in fp32 and both are cast to x's dtype for the products.
    """
    y = F.linear(x, weight, bias)
    if dropout:
        x = F.dropout(x, dropout)
    h = F.linear(x, lora_a.to(x.dtype))
    return y + F.linear(h, (lora_b * scaling).to(x.dtype))


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed negative log-likelihood in nats, fp32: logits [N, V] of any float dtype, targets [N] int64.

    A sum, since the step divides by the unmasked tokens of all its micro-batches together.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum")
