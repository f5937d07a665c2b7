"""One name for each op: the Triton kernel on a CUDA device, its plain-PyTorch definition elsewhere and in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metier.kernels import reference


def _on(x: torch.Tensor, name: str) -> Callable[..., Any]:
    if not x.is_cuda or x.dtype == torch.float64:
        return getattr(reference, name)  # type: ignore[no-any-return]
    from metier.kernels import triton_rows, triton_swiglu, triton_tiles

    for module in (triton_swiglu, triton_tiles, triton_rows):
        if name in module.__dict__:
            return module.__dict__[name]  # type: ignore[no-any-return]
    return getattr(reference, name)  # type: ignore[no-any-return]


def project_rows(x: torch.Tensor, **options: Any) -> reference.Rows:
    return _on(x, "project_rows")(x, **options)  # type: ignore[no-any-return]


def norm_backward(dz: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return _on(x, "norm_backward")(dz, x, **options)  # type: ignore[no-any-return]


def add_low_rank(residual: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
    return _on(y, "add_low_rank")(residual, y, *rest)  # type: ignore[no-any-return]


def rotate(qkv: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _on(qkv, "rotate")(qkv, *rest)  # type: ignore[no-any-return]


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *rest: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _on(grads[0], "rotate_backward")(grads, *rest)  # type: ignore[no-any-return]


def swiglu(gate_up: torch.Tensor, *low_and_up: torch.Tensor | None, **options: Any) -> reference.Rows:
    return _on(gate_up, "swiglu")(gate_up, *low_and_up, **options)  # type: ignore[no-any-return]


def swiglu_backward(
    dh: torch.Tensor, gate_up: torch.Tensor, *low_and_up: torch.Tensor | None, **options: Any
) -> reference.SwigluGrads:
    return _on(dh, "swiglu_backward")(dh, gate_up, *low_and_up, **options)  # type: ignore[no-any-return]


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _on(logits, "cross_entropy_rows")(logits, targets)  # type: ignore[no-any-return]
