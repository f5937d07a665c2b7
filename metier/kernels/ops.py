"""One name for each op: the Triton kernel on a CUDA device, few passes on a CPU, the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metier.kernels import cpu, dropout, reference


def _on(x: torch.Tensor, name: str, groups: Any = None) -> Callable[..., Any]:
    # Ranks too wide for the kernels' registers come without bounds (`metier.model.fused`).
    if x.dtype == torch.float64 or (groups is not None and groups.bounds is None and x.is_cuda):
        return _defined(name)
    if not x.is_cuda:
        return cpu.__dict__.get(name) or _defined(name)
    from metier.kernels import triton_dropout, triton_groups, triton_rows, triton_swiglu, triton_tiles

    grouped = [triton_groups] if groups is not None else []
    for module in (*grouped, triton_swiglu, triton_tiles, triton_rows, triton_dropout):
        if name in module.__dict__:
            return module.__dict__[name]  # type: ignore[no-any-return]
    return _defined(name)


def _defined(name: str) -> Callable[..., Any]:
    return dropout.__dict__.get(name) or getattr(reference, name)  # type: ignore[no-any-return]


def project_rows(x: torch.Tensor, **options: Any) -> reference.Rows:
    return _on(x, "project_rows", options.get("groups"))(x, **options)  # type: ignore[no-any-return]


def norm_backward(dz: torch.Tensor, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _on(x, "norm_backward", options.get("groups"))(dz, x, **options)  # type: ignore[no-any-return]


def add_low_rank(
    residual: torch.Tensor, y: torch.Tensor, *low_and_up: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    return _on(y, "add_low_rank", options.get("groups"))(residual, y, *low_and_up, **options)  # type: ignore[no-any-return]


def add_low_rank_(
    y: torch.Tensor, low: torch.Tensor, down: torch.Tensor, groups: reference.Groups | None
) -> torch.Tensor:  # fmt: skip
    """y += low down, in place: y [M, I], low [M, R], down [R, I], or [J, R, I] with `groups`."""
    if groups is None:
        return y.addmm_(low, down)
    if groups.bounds is not None and y.dtype != torch.float64:
        return _on(y, "add_low_rank", groups)(None, y, low, down.mT, groups, y)  # type: ignore[no-any-return]
    for adapter, start, end in groups.spans:
        y[start:end].addmm_(low[start:end], down[adapter])
    return y


def rank_gradient(
    dy: torch.Tensor, low: torch.Tensor, ends: tuple[int, ...], groups: reference.Groups | None
) -> torch.Tensor:  # fmt: skip
    return _on(dy, "rank_gradient", groups)(dy, low, ends, groups)  # type: ignore[no-any-return]


def drop_rows(x: torch.Tensor, drops: dropout.Dropout, site: int, **options: Any) -> torch.Tensor:
    return _on(x, "drop_rows")(x, drops, site, **options)  # type: ignore[no-any-return]


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
