"""A decoder layer's forward and backward over frozen weights, as three autograd functions.

A site is one or more linear layers that share their input: q/k/v, o, gate/up, down. Per site: one product with the
frozen weight, x A^T computed while the input is normalised or quantised, and s x A^T B^T added where the output is read
next. No gradient of a frozen weight is formed, and nothing is kept that is cheap to compute again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from metier.kernels import ops
from metier.kernels.attention import Documents, attend
from metier.kernels.frozen import FrozenWeight
from metier.kernels.reference import Groups, Heads, Rotation, Rows

Gradients = list[torch.Tensor | None]


@dataclass
class Part:
    """One adapter at a site: its fp32 A [R, I] and B [O, R] for each of the layers, or None where it has none."""

    masters: list[tuple[nn.Parameter, nn.Parameter] | None]
    scaling: float
    rank: int


@dataclass
class Site:
    """Linear layers that share their input, with the adapters' weights in the form in which products read them.

    `ends` are the layers' ends in the output, `names` the layers' in the model. Of one adapter, down [n R, I] holds the
    layers' A, up [O, R] their B times the scaling, both in the model's dtype; None where none of the layers has an
    adapter. Of several they are stacked, [J, n R, I] and [J, O, R], with R the largest rank and zeros beyond a smaller,
    and `totals` are the sums of their gradients. `inputs` are the parameters that a pass hangs on.
    """

    weight: FrozenWeight
    ends: tuple[int, ...]
    names: tuple[str, ...]
    parts: list[Part] = field(default_factory=list)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    inputs: list[nn.Parameter] = field(default_factory=list)
    totals: tuple[torch.Tensor, ...] | None = None
    scalings: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return max(part.rank for part in self.parts)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for pair in part.masters if pair is not None for p in pair]

    @property
    def down_t(self) -> torch.Tensor | None:
        return None if self.down is None else self.down.mT

    def images(self, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor, nn.Parameter, float]]:
        """Makes `down` and `up`; where each master is copied to, and by what it is multiplied."""
        self.down = self.up = self.totals = self.scalings = None
        parameters, count = self.parameters, len(self.parts)
        self.inputs = parameters if count == 1 else parameters[:1]
        if not parameters:
            return []
        shapes = (count, len(self.ends) * self.rank, self.weight.shape[1]), (count, self.weight.shape[0], self.rank)
        down, up = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        found = []
        for number, part in enumerate(self.parts):
            places = self._places(part, down[number], up[number])
            scales = (1.0, part.scaling) * (len(places) // 2)
            found += [(place, parameter, scale) for (parameter, place), scale in zip(places, scales, strict=True)]
        self.down, self.up = (down, up) if count > 1 else (down[0], up[0])
        if count > 1:
            wide = torch.promote_types(dtype, torch.float32)
            self.totals = tuple(torch.zeros(shape, dtype=wide, device=device) for shape in shapes)
            scalings = [part.scaling for part in self.parts]
            self.scalings = torch.tensor(scalings, dtype=wide, device=device)[:, None, None]
        return found

    def _places(self, part: Part, down: torch.Tensor, up: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The A and B of each layer that an adapter has, with their places in its `down` and `up`."""
        found, start = [], 0
        for j, (end, pair) in enumerate(zip(self.ends, part.masters, strict=True)):
            if pair is not None:
                found.append((pair[0], down[j * self.rank : j * self.rank + part.rank]))
                found.append((pair[1], up[start:end, : part.rank]))
            start = end
        return found

    @property
    def factor(self) -> torch.Tensor | None:
        """What dy is multiplied by before it is quantised for dX."""
        return self.weight.column_scale if self.weight.eats_fp8 else None

    def gradient_rows(
        self, dy: torch.Tensor, groups: Groups | None, largest: torch.Tensor | None = None
    ) -> Rows:  # fmt: skip
        """dy [M, O] as the product for dX reads it, with its projection on the rank."""
        return ops.project_rows(
            dy, factor=self.factor, down=self.up, segments=self.ends if self.up is not None else (),
            quantise=self.weight.eats_fp8, largest=largest, **_of(groups),
        )  # fmt: skip

    def gradients(self, down: torch.Tensor | None, up: torch.Tensor | None, groups: Groups | None) -> Gradients:
        """What backward returns for `inputs`, from the gradients of `down` and `up`, fp32 and of their shapes.

        Those of several adapters are added to `totals`, all at once.
        """
        if not self.inputs:
            return []
        assert down is not None and up is not None
        if groups is not None:
            assert self.totals is not None and self.scalings is not None
            self.totals[0].add_(down)
            self.totals[1].addcmul_(up, self.scalings)
            return [None]
        up.mul_(self.parts[0].scaling)
        return [grad for _, grad in self._places(self.parts[0], down, up)]

    def settle(self) -> None:
        """Hands `totals` to the parameters of several adapters as their `.grad`."""
        if self.totals is None:
            return
        for part, down, up in zip(self.parts, *self.totals, strict=True):
            for parameter, grad in self._places(part, down, up):
                parameter.grad = grad.to(parameter.dtype).contiguous()

    def rank_gradient(self, dy: torch.Tensor, low: torch.Tensor | None, groups: Groups | None) -> torch.Tensor | None:
        """The gradient of `up` from dy [M, O] and low = x A^T [M, n R]."""
        return None if low is None else ops.rank_gradient(dy, low, self.ends, groups)


def _of(groups: Groups | None) -> dict[str, Groups]:
    """What an op is told of a pass of several adapters; of one adapter it is told nothing."""
    return {} if groups is None else {"groups": groups}


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

    @property
    def sites(self) -> tuple[Site, Site, Site, Site]:
        return self.qkv, self.o, self.gate_up, self.down


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, site: Site, groups: Groups | None) -> Rows:
    segments = (x.shape[1],) if site.down is not None else ()
    return ops.project_rows(
        x, factor=weight, down=site.down_t, segments=segments, eps=eps, quantise=site.weight.eats_fp8, **_of(groups)
    )


class _Queries(torch.autograd.Function):
    """x [M, I] -> q, k, v after norm, product, rotation; and x: its other reader's gradient comes back here."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, rotation: Rotation, groups: Groups | None, *_: torch.Tensor
    ) -> Any:  # fmt: skip
        rotation = rotation._replace(bias=layer.bias, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=layer.eps)
        rows = _norm(x, layer.input_norm, layer.eps, layer.qkv, groups)
        qkv = layer.qkv.weight.matmul(rows)
        q, k, v = ops.rotate(qkv, rows.low, layer.qkv.up, layer.heads, rotation, **_of(groups))
        ctx.save_for_backward(x, rows.rstd, rows.low, qkv if layer.q_norm is not None else None)
        ctx.layer, ctx.rotation, ctx.groups = layer, rotation, groups
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, qkv = ctx.saved_tensors
        layer, site, groups = ctx.layer, ctx.layer.qkv, ctx.groups
        dy, largest, up_grad = ops.rotate_backward(
            (grads[0], grads[1], grads[2]), qkv, low, site.up, layer.heads, ctx.rotation, site.factor, **_of(groups)
        )
        rows = site.gradient_rows(dy, groups, largest)
        dx, down_grad = None, None
        if ctx.needs_input_grad[0]:
            dx, down_grad = ops.norm_backward(
                site.weight.matmul_t(rows), x, rstd=rstd, weight=layer.input_norm, low=rows.low, down=site.down,
                projected=low, residual=grads[3], **_of(groups),
            )  # fmt: skip
        elif rows.low is not None:
            scaled = (rows.low * rstd[:, None]).to(x.dtype)
            down_grad = ops.rank_gradient(scaled, x, (scaled.shape[1],), groups) * layer.input_norm
        return dx, None, None, None, *site.gradients(down_grad, up_grad, groups)


class _Output(torch.autograd.Function):
    """x [M, I] and attention's output [M, Hq D] -> x + o_proj(attention)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, attention: torch.Tensor, layer: Layer, groups: Groups | None, *_: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        site = layer.o
        segments = (attention.shape[1],) if site.down is not None else ()
        rows = ops.project_rows(
            attention, down=site.down_t, segments=segments, quantise=site.weight.eats_fp8, **_of(groups)
        )
        ctx.save_for_backward(attention, rows.low)
        ctx.layer, ctx.groups = layer, groups
        return ops.add_low_rank(x, site.weight.matmul(rows), rows.low, site.up, **_of(groups))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attention, low = ctx.saved_tensors
        site, dy, groups = ctx.layer.o, grads[0], ctx.groups
        up_grad, down_grad = site.rank_gradient(dy, low, groups), None
        rows = site.gradient_rows(dy, groups)
        d_attention = site.weight.matmul_t(rows)
        if rows.low is not None:
            ops.add_low_rank_(d_attention, rows.low, site.down, groups)
            down_grad = ops.rank_gradient(rows.low, attention, (site.rank,), groups)
        return dy, d_attention, None, None, *site.gradients(down_grad, up_grad, groups)


class _Mlp(torch.autograd.Function):
    """x [M, I] -> x + down(silu(gate(z)) * up(z)), z the norm of x. `keeps` gate and up, or computes them again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Layer, keeps: bool, groups: Groups | None, *_: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        rows = _norm(x, layer.output_norm, layer.eps, layer.gate_up, groups)
        both = layer.gate_up.weight.matmul(rows)
        h = ops.swiglu(
            both, rows.low, layer.gate_up.up, down=layer.down.down_t, quantise=layer.down.weight.eats_fp8,
            **_of(groups),
        )  # fmt: skip
        ctx.save_for_backward(x, rows.rstd, rows.low, h.low, both if keeps else None)
        ctx.layer, ctx.groups = layer, groups
        return ops.add_low_rank(x, layer.down.weight.matmul(h), h.low, layer.down.up, **_of(groups))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, low_h, both = ctx.saved_tensors
        layer, dy, groups = ctx.layer, grads[0], ctx.groups
        site, next_site = layer.gate_up, layer.down
        if both is None:
            both = site.weight.matmul(_norm(x, layer.output_norm, layer.eps, site, groups))
        next_up = next_site.rank_gradient(dy, low_h, groups)
        next_rows = next_site.gradient_rows(dy, groups)
        result = ops.swiglu_backward(
            next_site.weight.matmul_t(next_rows), both, low, site.up, low_dh=next_rows.low, down=next_site.down,
            factor=site.factor, quantise=site.weight.eats_fp8, **_of(groups),
        )  # fmt: skip
        dx, down_grad = ops.norm_backward(
            site.weight.matmul_t(result.rows), x, rstd=rstd, weight=layer.output_norm, low=result.rows.low,
            down=site.down, projected=low, residual=dy, **_of(groups),
        )  # fmt: skip
        here = site.gradients(down_grad, result.up, groups)
        return dx, None, None, None, *here, *next_site.gradients(result.down, next_up, groups)


def run_layer(
    x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, *, keeps: bool,
    groups: Groups | None = None,
) -> torch.Tensor:  # fmt: skip
    """A decoder layer: x [M, I] -> [M, I]. Unless it `keeps` gate and up, backward computes them again."""
    q, k, v, x = _Queries.apply(x, layer, rotation, groups, *layer.qkv.inputs)  # type: ignore[no-untyped-call]
    attention = attend(q, k, v, documents).flatten(1)
    x = _Output.apply(x, attention, layer, groups, *layer.o.inputs)  # type: ignore[no-untyped-call]
    parameters = (*layer.gate_up.inputs, *layer.down.inputs)
    return _Mlp.apply(x, layer, keeps, groups, *parameters)  # type: ignore[no-any-return, no-untyped-call]
