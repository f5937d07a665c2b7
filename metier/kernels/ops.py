"""One name for each op: the Triton kernel on a CUDA device, few passes on a CPU, the definition in float64.

With `groups` the rows are several adapters' (`metier.kernels.groups`): kernels take them together, everything else one
adapter after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metier.kernels import cpu, dropout, reference
from metier.kernels.groups import Groups
from metier.kernels.reference import Rows, SwigluGrads

Matrix = torch.Tensor | None


def _on(x: torch.Tensor, name: str, groups: Groups | None = None) -> Callable[..., Any]:
    if x.dtype == torch.float64 or (groups is not None and groups.table is None and x.is_cuda):
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


def _is_together(x: torch.Tensor, groups: Groups) -> bool:
    """Whether a kernel takes the rows of several adapters at once: not ranks too wide for its registers."""
    return x.is_cuda and groups.table is not None and x.dtype != torch.float64


def _told(groups: Groups | None) -> dict[str, Groups]:
    """What an op's code is told: definitions and the CPU's know one adapter alone."""
    return {} if groups is None else {"groups": groups}


def _downs(groups: Groups, down: Matrix) -> Callable[[int], torch.Tensor] | None:
    return None if down is None else lambda adapter: groups.down_of(down, adapter)


def _ups(groups: Groups, up: Matrix) -> Callable[[int], torch.Tensor] | None:
    return None if up is None else lambda adapter: groups.up_of(up, adapter)


def _inward(groups: Groups, down: Matrix) -> Callable[[int], torch.Tensor] | None:
    """What rows are projected by: A as [I, n sum(r)], turned, or B."""
    if down is None or down.dim() == 1:
        return _ups(groups, down)
    return lambda adapter: groups.down_of(down.mT, adapter).mT


def project_rows(x: torch.Tensor, *, groups: Groups | None = None, down: Matrix = None, **options: Any) -> Rows:
    op = _on(x, "project_rows", groups)
    if groups is None:
        return op(x, down=down, **options)  # type: ignore[no-any-return]
    if _is_together(x, groups):
        return op(x, down=down, groups=groups, **options)  # type: ignore[no-any-return]
    rows = {"x": x, "largest": options.pop("largest", None)}
    return groups.joined(groups.each(op, rows, {}, {"down": _inward(groups, down)}, **options))


def norm_backward(
    dz: torch.Tensor, x: torch.Tensor, *, rstd: Matrix, low: Matrix, down: Matrix, projected: Matrix,
    residual: Matrix, groups: Groups | None = None, **options: Any,
) -> tuple[torch.Tensor, Matrix]:  # fmt: skip
    op = _on(x, "norm_backward", groups)
    rows, lows = {"dz": dz, "x": x, "rstd": rstd, "residual": residual}, {"low": low, "projected": projected}
    if groups is None:
        return op(**rows, **lows, down=down, **options)  # type: ignore[no-any-return]
    if _is_together(x, groups):
        return op(**rows, **lows, down=down, groups=groups, **options)  # type: ignore[no-any-return]
    dx, down_grad = zip(*groups.each(op, rows, lows, {"down": _downs(groups, down)}, **options), strict=True)
    return torch.cat(dx), groups.summed(down_grad, is_up=False)


def add_low_rank(
    residual: torch.Tensor, y: torch.Tensor, low: Matrix, up: Matrix, groups: Groups | None = None
) -> torch.Tensor:  # fmt: skip
    op = _on(y, "add_low_rank", groups)
    if groups is None or _is_together(y, groups):
        return op(residual, y, low, up, **_told(groups))  # type: ignore[no-any-return]
    rows, stacks = {"residual": residual, "y": y}, {"up": _ups(groups, up)}
    return torch.cat(groups.each(op, rows, {"low": low}, stacks))


def add_low_rank_(y: torch.Tensor, low: torch.Tensor, down: torch.Tensor, groups: Groups | None) -> torch.Tensor:
    """y += low down, in place: y [M, I], low [M, R], down [R, I]."""
    if groups is None:
        return y.addmm_(low, down)
    if _is_together(y, groups):
        return _on(y, "add_low_rank", groups)(None, y, low, down.mT, groups, y)  # type: ignore[no-any-return]
    groups.each(lambda y, low, down: y.addmm_(low, down), {"y": y}, {"low": low}, {"down": _downs(groups, down)})
    return y


def rank_gradient(
    dy: torch.Tensor, low: torch.Tensor, ends: tuple[int, ...], groups: Groups | None
) -> torch.Tensor:  # fmt: skip
    """The gradient of `up`."""
    op = _on(dy, "rank_gradient", groups)
    if groups is None:
        return op(dy, low, ends)  # type: ignore[no-any-return]
    if _is_together(dy, groups):
        return op(dy, low, groups, is_up=True)  # type: ignore[no-any-return]
    found = groups.summed(groups.each(op, {"dy": dy}, {"low": low}, {}, ends=ends), is_up=True)
    assert found is not None
    return found


def down_gradient(low: torch.Tensor, x: torch.Tensor, groups: Groups | None) -> torch.Tensor:
    """The gradient [n R, I] of `down` from that of a projection, low [M, n R], of x [M, I]."""
    op = _on(x, "rank_gradient", groups)
    if groups is None:
        return op(low, x, (low.shape[1],))  # type: ignore[no-any-return]
    if _is_together(x, groups):
        return op(low, x, groups, is_up=False)  # type: ignore[no-any-return]
    one = groups.each(lambda x, low: op(low, x, (low.shape[1],)), {"x": x}, {"low": low}, {})
    found = groups.summed(one, is_up=False)
    assert found is not None
    return found


def drop_rows(x: torch.Tensor, drops: dropout.Dropout, site: int, **options: Any) -> torch.Tensor:
    return _on(x, "drop_rows")(x, drops, site, **options)  # type: ignore[no-any-return]


def rotate(
    qkv: torch.Tensor, low: Matrix, up: Matrix, heads: reference.Heads, rotation: reference.Rotation,
    groups: Groups | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    op = _on(qkv, "rotate", groups)
    if groups is None or _is_together(qkv, groups):
        return op(qkv, low, up, heads, rotation, **_told(groups))  # type: ignore[no-any-return]
    rows = {"qkv": qkv, "cos": rotation.cos, "sin": rotation.sin}

    def one(cos: torch.Tensor, sin: torch.Tensor, **own: Matrix) -> Any:
        return op(**own, heads=heads, rotation=rotation._replace(cos=cos, sin=sin))

    q, k, v = zip(*groups.each(one, rows, {"low": low}, {"up": _ups(groups, up)}), strict=True)
    return torch.cat(q), torch.cat(k), torch.cat(v)


def rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], qkv: Matrix, low: Matrix, up: Matrix,
    heads: reference.Heads, rotation: reference.Rotation, factor: Matrix = None, groups: Groups | None = None,
) -> tuple[torch.Tensor, Matrix, Matrix]:  # fmt: skip
    op = _on(grads[0], "rotate_backward", groups)
    if groups is None or _is_together(grads[0], groups):
        return op(grads, qkv, low, up, heads, rotation, factor, **_told(groups))  # type: ignore[no-any-return]
    rows = {"dq": grads[0], "dk": grads[1], "dv": grads[2], "qkv": qkv, "cos": rotation.cos, "sin": rotation.sin}

    def one(dq: Matrix, dk: Matrix, dv: Matrix, cos: torch.Tensor, sin: torch.Tensor, **own: Matrix) -> Any:
        turned = rotation._replace(cos=cos, sin=sin)
        return op((dq, dk, dv), **own, heads=heads, rotation=turned, factor=factor)

    found = groups.each(one, rows, {"low": low}, {"up": _ups(groups, up)})
    dy, largest, up_grad = zip(*found, strict=True)
    return torch.cat(dy), None if largest[0] is None else torch.cat(largest), groups.summed(up_grad, is_up=True)


def swiglu(
    gate_up: torch.Tensor, low: Matrix, up: Matrix, *, down: Matrix, quantise: bool, groups: Groups | None = None
) -> Rows:  # fmt: skip
    op = _on(gate_up, "swiglu", groups)
    if groups is None or _is_together(gate_up, groups):
        return op(gate_up, low, up, down=down, quantise=quantise, **_told(groups))  # type: ignore[no-any-return]
    stacks = {"up": _ups(groups, up), "down": _inward(groups, down)}
    return groups.joined(groups.each(op, {"gate_up": gate_up}, {"low": low}, stacks, quantise=quantise))


def swiglu_backward(
    dh: torch.Tensor, gate_up: torch.Tensor, low: Matrix, up: Matrix, *, low_dh: Matrix, down: Matrix,
    factor: Matrix, quantise: bool, groups: Groups | None = None,
) -> SwigluGrads:  # fmt: skip
    op = _on(dh, "swiglu_backward", groups)
    rows, lows = {"dh": dh, "gate_up": gate_up}, {"low": low, "low_dh": low_dh}
    options = {"factor": factor, "quantise": quantise}
    if groups is None:
        return op(**rows, **lows, up=up, down=down, **options)  # type: ignore[no-any-return]
    if _is_together(dh, groups):
        return op(**rows, **lows, up=up, down=down, groups=groups, **options)  # type: ignore[no-any-return]
    stacks = {"up": _ups(groups, up), "down": _downs(groups, down)}
    parts, up_grad, down_grad = zip(*groups.each(op, rows, lows, stacks, **options), strict=True)
    return SwigluGrads(
        groups.joined(parts), groups.summed(up_grad, is_up=True), groups.summed(down_grad, is_up=False)
    )  # fmt: skip


def cross_entropy_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _on(logits, "cross_entropy_rows")(logits, targets)  # type: ignore[no-any-return]
