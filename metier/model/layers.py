"""A decoder layer's forward and backward over frozen weights, as three autograd functions.

A site is one or more linear layers that share their input: q/k/v, o, gate/up, down. Per site: one product with the
frozen weight, x A^T computed while the input is normalised or quantised, and s x A^T B^T added where the output is read
next. No gradient of a frozen weight is formed, and nothing is kept that is cheap to compute again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from metier.kernels import ops
from metier.kernels.attention import Documents, attend
from metier.kernels.dropout import Dropout
from metier.kernels.groups import Groups
from metier.kernels.reference import Heads, Rotation, Rows
from metier.model.sites import Image, Site, refresh


@dataclass
class Layer:
    """A decoder layer: two norms and four sites."""

    input_norm: torch.Tensor
    output_norm: torch.Tensor
    eps: float
    heads: Heads
    bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    qkv: Site
    o: Site
    gate_up: Site
    down: Site
    images: list[Image] = field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, Site, Site, Site]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class Treatment:
    """What else a pass is told of its rows: whose they are, of several adapters, or what drops out, of one."""

    groups: Groups | None = None
    dropout: Dropout | None = None


def _rows(
    x: torch.Tensor, site: Site, treatment: Treatment, *, factor: torch.Tensor | None = None, eps: float | None = None
) -> Rows:  # fmt: skip
    """x [M, I], after the norm with weights `factor` where `eps` is given, as the site's products read it."""
    down = site.down_t if treatment.dropout is None else None
    rows = ops.project_rows(
        x, factor=factor, down=down, segments=() if down is None else (x.shape[1],), eps=eps,
        quantise=site.weight.eats_fp8, groups=treatment.groups,
    )  # fmt: skip
    if treatment.dropout is None:
        return rows
    norm = {} if rows.rstd is None or factor is None else {"rstd": rows.rstd, "factor": factor}
    return rows._replace(low=site.project_dropped(x, treatment.dropout, **norm))


def _norm_backward(
    dz: torch.Tensor, x: torch.Tensor, site: Site, treatment: Treatment, *, rstd: torch.Tensor, weight: torch.Tensor,
    low: torch.Tensor | None, projected: torch.Tensor | None, residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`ops.norm_backward` for a site's input; with dropout the low-rank part of dz comes first, apart."""
    if treatment.dropout is None:
        return ops.norm_backward(
            dz, x, rstd=rstd, weight=weight, low=low, down=site.down, projected=projected, residual=residual,
            groups=treatment.groups,
        )  # fmt: skip
    down_grad = site.dropped_backward(low, treatment.dropout, dz, x, rstd=rstd, factor=weight)
    dx, _ = ops.norm_backward(dz, x, rstd=rstd, weight=weight, low=None, down=None, projected=None, residual=residual)
    return dx, down_grad


def _activated(both: torch.Tensor, low: torch.Tensor | None, site: Site) -> torch.Tensor:
    """h [M, F] from gate and up, in the model's dtype."""
    dense = ops.swiglu(both, low, site.up, down=None, quantise=False).dense
    assert dense is not None
    return dense


class _Queries(torch.autograd.Function):
    """x [M, I] -> q, k, v after norm, product, rotation; and x: its other reader's gradient comes back here."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, rotation: Rotation, treatment: Treatment, *_: torch.Tensor
    ) -> Any:  # fmt: skip
        rotation = rotation._replace(bias=layer.bias, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=layer.eps)
        rows = _rows(x, layer.qkv, treatment, factor=layer.input_norm, eps=layer.eps)
        qkv = layer.qkv.weight.matmul(rows)
        q, k, v = ops.rotate(qkv, rows.low, layer.qkv.up, layer.heads, rotation, groups=treatment.groups)
        ctx.save_for_backward(x, rows.rstd, rows.low, qkv if layer.q_norm is not None else None)
        ctx.layer, ctx.rotation, ctx.treatment = layer, rotation, treatment
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, qkv = ctx.saved_tensors
        layer, site, treatment = ctx.layer, ctx.layer.qkv, ctx.treatment
        groups = treatment.groups
        dy, largest, up_grad = ops.rotate_backward(
            (grads[0], grads[1], grads[2]),
            qkv,
            low,
            site.up,
            layer.heads,
            ctx.rotation,
            site.factor,
            groups=groups,
        )
        rows = site.gradient_rows(dy, groups, largest)
        dx, down_grad = None, None
        if ctx.needs_input_grad[0]:
            dx, down_grad = _norm_backward(
                site.weight.matmul_t(rows), x, site, treatment, rstd=rstd, weight=layer.input_norm, low=rows.low,
                projected=low, residual=grads[3],
            )  # fmt: skip
        elif treatment.dropout is not None:
            down_grad = site.dropped_backward(rows.low, treatment.dropout, None, x, rstd=rstd, factor=layer.input_norm)
        elif rows.low is not None:
            scaled = (rows.low * rstd[:, None]).to(x.dtype)
            down_grad = ops.down_gradient(scaled, x, groups) * layer.input_norm
        return dx, None, None, None, *site.gradients(down_grad, up_grad, groups)


class _Output(torch.autograd.Function):
    """x [M, I] and attention's output [M, Hq D] -> x + o_proj(attention)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, attention: torch.Tensor, layer: Layer, treatment: Treatment, *_: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        site, groups = layer.o, treatment.groups
        rows = _rows(attention, site, treatment)
        ctx.save_for_backward(attention, rows.low)
        ctx.layer, ctx.treatment = layer, treatment
        return ops.add_low_rank(x, site.weight.matmul(rows), rows.low, site.up, groups=groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attention, low = ctx.saved_tensors
        site, dy, treatment = ctx.layer.o, grads[0], ctx.treatment
        groups = treatment.groups
        up_grad, down_grad = site.rank_gradient(dy, low, groups), None
        rows = site.gradient_rows(dy, groups)
        d_attention = site.weight.matmul_t(rows)
        if treatment.dropout is not None:
            down_grad = site.dropped_backward(rows.low, treatment.dropout, d_attention, attention)
        elif rows.low is not None:
            ops.add_low_rank_(d_attention, rows.low, site.down, groups)
            down_grad = ops.down_gradient(rows.low, attention, groups)
        return dy, d_attention, None, None, *site.gradients(down_grad, up_grad, groups)


class _Mlp(torch.autograd.Function):
    """x [M, I] -> x, after leaving h = silu(gate(z)) * up(z), z the norm of x, in `found` for `_Down`.

    `keeps` gate and up, or computes them again. Its backward is that of both: it is given `_Down`'s gradient as it is.
    Cut in two, since recomputation ends with the last tensor that is kept: the down product is not computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, keeps: bool, treatment: Treatment, found: list[Rows],
        *_: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        rows = _rows(x, layer.gate_up, treatment, factor=layer.output_norm, eps=layer.eps)
        both = layer.gate_up.weight.matmul(rows)
        if treatment.dropout is None:
            h = ops.swiglu(
                both, rows.low, layer.gate_up.up, down=layer.down.down_t, quantise=layer.down.weight.eats_fp8,
                groups=treatment.groups,
            )  # fmt: skip
        else:
            h = _rows(_activated(both, rows.low, layer.gate_up), layer.down, treatment)
        found.append(h)
        ctx.save_for_backward(x, rows.rstd, rows.low, h.low, both if keeps else None)
        ctx.layer, ctx.treatment = layer, treatment
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, low_h, both = ctx.saved_tensors
        layer, dy, treatment = ctx.layer, grads[0], ctx.treatment
        groups, dropout = treatment.groups, treatment.dropout
        site, next_site = layer.gate_up, layer.down
        if both is None:
            both = site.weight.matmul(_rows(x, site, treatment, factor=layer.output_norm, eps=layer.eps))
        next_up = next_site.rank_gradient(dy, low_h, groups)
        next_rows = next_site.gradient_rows(dy, groups)
        dh, next_down, next_low, next_grad = (
            next_site.weight.matmul_t(next_rows), next_site.down, next_rows.low, None
        )  # fmt: skip
        if dropout is not None:
            next_grad = next_site.dropped_backward(next_low, dropout, dh, _activated(both, low, site))
            next_down = next_low = None
        result = ops.swiglu_backward(
            dh, both, low, site.up, low_dh=next_low, down=next_down, factor=site.factor,
            quantise=site.weight.eats_fp8, groups=groups,
        )  # fmt: skip
        del both  # a third of what a recomputed layer holds, and read for the last time
        dx, down_grad = _norm_backward(
            site.weight.matmul_t(result.rows), x, site, treatment, rstd=rstd, weight=layer.output_norm,
            low=result.rows.low, projected=low, residual=dy,
        )  # fmt: skip
        here = site.gradients(down_grad, result.up, groups)
        below = next_site.gradients(result.down if dropout is None else next_grad, next_up, groups)
        return dx, None, None, None, None, *here, *below


class _Down(torch.autograd.Function):
    """x [M, I] -> x + down(h), h taken from `found`; the gradient goes back to `_Mlp` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer, treatment: Treatment, found: list[Rows]) -> torch.Tensor:
        ctx.layer, ctx.treatment = layer, treatment
        h, site = found.pop(), layer.down
        return ops.add_low_rank(x, site.weight.matmul(h), h.low, site.up, groups=treatment.groups)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.treatment.groups is not None:
            refresh(ctx.layer.images)  # a layer's backward begins here
        return grads[0], None, None, None


def run_layer(
    x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, *, keeps: bool,
    treatment: Treatment,
) -> torch.Tensor:  # fmt: skip
    """A decoder layer: x [M, I] -> [M, I]. Unless it `keeps` gate and up, backward computes them again.

    Of several adapters the sites' memory is shared with other layers and filled here, and for backward once more.
    """
    if treatment.groups is not None:
        refresh(layer.images)
    q, k, v, x = _Queries.apply(x, layer, rotation, treatment, *layer.qkv.inputs)  # type: ignore[no-untyped-call]
    attention = attend(q, k, v, documents).flatten(1)
    x = _Output.apply(x, attention, layer, treatment, *layer.o.inputs)  # type: ignore[no-untyped-call]
    parameters = (*layer.gate_up.inputs, *layer.down.inputs)
    found: list[Rows] = []
    x = _Mlp.apply(x, layer, keeps, treatment, found, *parameters)  # type: ignore[no-untyped-call]
    return _Down.apply(x, layer, treatment, found)  # type: ignore[no-any-return, no-untyped-call]
