"""A linear layer's product in fp32 on a CPU, at the processor's width.

PyTorch sends fp32 products to MKL, which on AMD processors does not use their 512-bit units; oneDNN, which PyTorch
brings along too, does: about twice the speed for 8 to 512 rows (benchmarks/results/serving_cpu_202611.md). Inputs and
outputs are those of `torch.nn.functional.linear`, whose sums are added in another order.

Limits: forward only; one row, other types and other devices go the usual way, and so does a PyTorch without the
operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + bias: [..., I], [O, I], [O] -> [..., O]."""
    is_wide = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > x.shape[-1]
    if is_wide and not torch.is_grad_enabled() and (product := _onednn()):
        return product(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def _onednn() -> Callable[..., torch.Tensor] | None:
    """The operator that TorchInductor compiles linear layers to."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
