"""One name for each op: the Triton kernel on a CUDA device, few passes on a CPU, the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metier.kernels import cpu, reference


def _on(x: torch.Tensor, name: str, groups: Any = None) -> Callable[..., Any]:
    # The Triton kernels know one adapter: rows of several take the definition on a CUDA device too.
    if x.dtype == torch.float64 or (groups is not None and x.is_cuda):
        return getattr(reference, name)  # type: ignore[no-any-return]
    if not x.is_cuda:
        return cpu.__dict__.get(name) or getattr(reference, name)  # type: ignore[no-any-return]
    from metier.kernels import triton_rows, triton_swiglu, triton_tiles

    for module in (triton_swiglu, triton_tiles, triton_rows):
        if name in module.__dict__:
            return module.__dict__[name]  # type: ignore[no-any-return]
    return getattr(reference, name)  # type: ignore[no-any-return]


def project_rows(x: torch.Tensor, **options: Any) -> reference.Rows:
    return _on(x, "project_rows", options.get("groups"))(x, **options)  # type: ignore[no-any-return]


def norm_backward(dz: torch.Tensor, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _on(x, "norm_backward", options.get("groups"))(dz, x, **options)  # type: ignore[no-any-return]


def add_low_rank(
    residual: torch.Tensor, y: torch.Tensor, *low_and_up: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    return _on(y, "add_low_rank", options.get("groups"))(residual, y, *low_and_up, **options)  # type: ignore[no-any-return]


def rotate(qkv: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _on(qkv, "rotate", options.get("groups"))(qkv, *rest, **options)  # type: ignore[no-any-return]


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *rest: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return _on(grads[0], "rotate_backward", options.get("groups"))(grads, *rest, **options)  # type: ignore[no-any-return]


def swiglu(gate_up: torch.Tensor, *low_and_up: torch.Tensor | None, **options: Any) -> reference.Rows:
    return _on(gate_up, "swiglu", options.get("groups"))(gate_up, *low_and_up, **options)  # type: ignore[no-any-return]


def swiglu_backward(
    dh: torch.Tensor, gate_up: torch.Tensor, *low_and_up: torch.Tensor | None, **options: Any
) -> reference.SwigluGrads:
    return _on(dh, "swiglu_backward", options.get("groups"))(dh, gate_up, *low_and_up, **options)  # type: ignore[no-any-return]


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _on(logits, "cross_entropy_rows")(logits, targets)  # type: ignore[no-any-return]
