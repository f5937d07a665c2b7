"""A decoder layer's forward and backward over frozen weights, as three autograd functions.

A site is one or more linear layers that share their input: q/k/v, o, gate/up, down. Per site: one product with the
frozen weight, x A^T computed while the input is normalised or quantised, and s x A^T B^T added where the output is read
next. No gradient of a frozen weight is formed, and nothing is kept that is cheap to compute again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from metier.kernels import ops
from metier.kernels.attention import Documents, attend
from metier.kernels.dropout import Dropout
from metier.kernels.frozen import FrozenWeight
from metier.kernels.groups import Groups
from metier.kernels.reference import Heads, Rotation, Rows

Gradients = list[torch.Tensor | None]


@dataclass
class Part:
    """One adapter at a site: its fp32 A [R, I] and B [O, R] for each of the layers, or None where it has none.

    `numbers` are those layers' in the adapter, which decide dropout's masks.
    """

    masters: list[tuple[nn.Parameter, nn.Parameter] | None]
    scaling: float
    rank: int
    numbers: list[int]


@dataclass
class Site:
    """Linear layers that share their input, with the adapters' weights in the form in which products read them.

    `ends` are the layers' ends in the output, `names` the layers' in the model. Of one adapter, down [n R, I] holds the
    layers' A, up [O, R] their B times the scaling, both in the model's dtype; None where none of the layers has an
    adapter. Of several they lie one behind the other, each in its own rank (`metier.kernels.groups`), and `totals` are
    the sums of their gradients, with `places` for each parameter and what its sum is multiplied by. `inputs` are the
    parameters that a pass hangs on.
    """

    weight: FrozenWeight
    ends: tuple[int, ...]
    names: tuple[str, ...]
    parts: list[Part] = field(default_factory=list)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    inputs: list[nn.Parameter] = field(default_factory=list)
    totals: tuple[torch.Tensor, ...] | None = None
    places: list[tuple[nn.Parameter, torch.Tensor, float]] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts for pair in part.masters if pair is not None for p in pair]

    @property
    def down_t(self) -> torch.Tensor | None:
        return None if self.down is None else self.down.mT

    def images(self, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor, nn.Parameter, float]]:
        """Makes `down` and `up`; where each master is copied to, and by what it is multiplied."""
        self.down = self.up = self.totals = None
        self.places = []
        parameters, is_one = self.parameters, len(self.parts) == 1
        self.inputs = parameters if is_one else parameters[:1]
        if not parameters:
            return []
        ranks, (size, width) = [part.rank for part in self.parts], self.weight.shape
        shapes = (len(self.ends) * sum(ranks), width), (size, ranks[0]) if is_one else (size * sum(ranks),)
        self.down, self.up = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
        if not is_one:
            wide = torch.promote_types(dtype, torch.float32)
            self.totals = tuple(torch.zeros(shape, dtype=wide, device=device) for shape in shapes)
            self.places = self._places(*self.totals)
        return [(place, parameter, scale) for parameter, place, scale in self._places(self.down, self.up)]

    def _places(self, down: torch.Tensor, up: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor, float]]:
        """Each A and B with its place in what is laid out as `down` and `up`, and the scaling of it."""
        found, before, count = [], 0, len(self.ends)
        for part in self.parts:
            after = before + part.rank
            downs = down[count * before : count * after].chunk(count)
            block = up if up.dim() == 2 else up.view(-1, self.weight.shape[0])[before:after].view(-1, part.rank)
            for own, (start, end), pair in zip(downs, itertools.pairwise((0, *self.ends)), part.masters, strict=True):
                if pair is not None:
                    found += [(pair[0], own, 1.0), (pair[1], block[start:end], part.scaling)]
            before = after
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
            assert self.totals is not None
            torch._foreach_add_(self.totals, (down, up))
            return [None]
        up.mul_(self.parts[0].scaling)
        return [grad for _, grad, _ in self._places(down, up)]

    def project_dropped(self, x: torch.Tensor, dropout: Dropout, **norm: torch.Tensor) -> torch.Tensor | None:
        """The projection [M, n R] of one adapter's input, each layer's after a mask of its own; see `drop_rows`."""
        if self.down is None:
            return None
        numbers, downs = self.parts[0].numbers, self.down.chunk(len(self.ends))
        dropped = (ops.drop_rows(x, dropout, number, **norm) for number in numbers)
        return torch.cat([each @ down.mT for each, down in zip(dropped, downs, strict=True)], 1)

    def dropped_backward(
        self, low: torch.Tensor | None, dropout: Dropout, target: torch.Tensor | None, x: torch.Tensor,
        **norm: torch.Tensor,
    ) -> torch.Tensor | None:  # fmt: skip
        """The gradient of `down`, fp32, from that of `project_dropped`, low [M, n R]; x's is added to `target`."""
        if self.down is None or low is None:
            return None
        grads = []
        for number, own, down in zip(
            self.parts[0].numbers, low.chunk(len(self.ends), 1), self.down.chunk(len(self.ends)), strict=True
        ):
            own = own.contiguous()
            grads.append(ops.down_gradient(own, ops.drop_rows(x, dropout, number, **norm), None))
            if target is not None:
                ops.drop_rows(own @ down, dropout, number, into=target)
        return torch.cat(grads)

    def settle(self) -> None:
        """Hands `totals`, scaled, to the parameters of several adapters as their `.grad`."""
        scaled = [(total, scaling) for _, total, scaling in self.places if scaling != 1]
        if scaled:
            torch._foreach_mul_([total for total, _ in scaled], [scaling for _, scaling in scaled])
        for parameter, total, _ in self.places:
            parameter.grad = total.to(parameter.dtype)

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
        quantise=site.weight.eats_fp8, **_of(treatment.groups),
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
            **_of(treatment.groups),
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
        q, k, v = ops.rotate(qkv, rows.low, layer.qkv.up, layer.heads, rotation, **_of(treatment.groups))
        ctx.save_for_backward(x, rows.rstd, rows.low, qkv if layer.q_norm is not None else None)
        ctx.layer, ctx.rotation, ctx.treatment = layer, rotation, treatment
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, qkv = ctx.saved_tensors
        layer, site, treatment = ctx.layer, ctx.layer.qkv, ctx.treatment
        groups = treatment.groups
        dy, largest, up_grad = ops.rotate_backward(
            (grads[0], grads[1], grads[2]), qkv, low, site.up, layer.heads, ctx.rotation, site.factor, **_of(groups)
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
        return ops.add_low_rank(x, site.weight.matmul(rows), rows.low, site.up, **_of(groups))

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
                **_of(treatment.groups),
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
            quantise=site.weight.eats_fp8, **_of(groups),
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
    def forward(ctx: Any, x: torch.Tensor, site: Site, treatment: Treatment, found: list[Rows]) -> torch.Tensor:
        h = found.pop()
        return ops.add_low_rank(x, site.weight.matmul(h), h.low, site.up, **_of(treatment.groups))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], None, None, None


def run_layer(
    x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, *, keeps: bool,
    treatment: Treatment,
) -> torch.Tensor:  # fmt: skip
    """A decoder layer: x [M, I] -> [M, I]. Unless it `keeps` gate and up, backward computes them again."""
    q, k, v, x = _Queries.apply(x, layer, rotation, treatment, *layer.qkv.inputs)  # type: ignore[no-untyped-call]
    attention = attend(q, k, v, documents).flatten(1)
    x = _Output.apply(x, attention, layer, treatment, *layer.o.inputs)  # type: ignore[no-untyped-call]
    parameters = (*layer.gate_up.inputs, *layer.down.inputs)
    found: list[Rows] = []
    x = _Mlp.apply(x, layer, keeps, treatment, found, *parameters)  # type: ignore[no-untyped-call]
    return _Down.apply(x, layer.down, treatment, found)  # type: ignore[no-any-return, no-untyped-call]
