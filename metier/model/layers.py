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
    adapter. Of several they are stacked, [J, n R, I] and [J, O, R], with R the largest rank and zeros beyond a smaller.
    """

    weight: FrozenWeight
    ends: tuple[int, ...]
    names: tuple[str, ...]
    parts: list[Part] = field(default_factory=list)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None

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
        self.down = self.up = None
        if not self.parameters:
            return []
        count, rank = len(self.parts), self.rank
        down = torch.zeros(count, len(self.ends) * rank, self.weight.shape[1], dtype=dtype, device=device)
        up = torch.zeros(count, self.weight.shape[0], rank, dtype=dtype, device=device)
        found = []
        for number, part in enumerate(self.parts):
            for j, pair in enumerate(part.masters):
                if pair is not None:
                    start = self.ends[j - 1] if j else 0
                    found.append((down[number, j * rank : j * rank + part.rank], pair[0], 1.0))
                    found.append((up[number, start : self.ends[j], : part.rank], pair[1], part.scaling))
        self.down, self.up = (down, up) if count > 1 else (down[0], up[0])
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

    def up_gradients(self, dy: torch.Tensor, low: torch.Tensor | None, groups: Groups | None) -> Gradients:
        """The gradient of each layer's B [O, R] from dy [M, O] and low = x A^T [M, n R], fp32; adapter by adapter."""
        grads: Gradients = []
        for part, rows in self._rows(groups):
            for j, pair in enumerate(part.masters):
                if pair is None:
                    continue
                if rows is None:
                    grads.append(None)
                    continue
                assert low is not None
                start, column = self.ends[j - 1] if j else 0, j * self.rank
                own = low[rows, column : column + part.rank]
                grads.append(_mm32(dy[rows, start : self.ends[j]].T, own).mul_(part.scaling))
        return grads

    def down_gradients(self, low_dy: torch.Tensor | None, x: torch.Tensor, groups: Groups | None) -> Gradients:
        """The gradient of each layer's A [R, I] from low_dy = dy B [M, n R] and x [M, I], fp32; adapter by adapter."""
        grads: Gradients = []
        if low_dy is None:
            return grads
        for part, rows in self._rows(groups):
            owned = [j for j, pair in enumerate(part.masters) if pair is not None]
            if rows is None:
                grads += [None] * len(owned)
            elif owned:
                whole = _mm32(low_dy[rows].T, x[rows]).view(len(self.ends), self.rank, -1)
                grads += [whole[j, : part.rank] for j in owned]
        return grads

    def _rows(self, groups: Groups | None) -> list[tuple[Part, slice | None]]:
        """Each adapter and its rows in the pass; None for one that has none."""
        if groups is None:
            return [(part, slice(None)) for part in self.parts]
        return [(part, groups.rows_of(number)) for number, part in enumerate(self.parts)]


def _of(groups: Groups | None) -> dict[str, Groups]:
    """What an op is told of a pass of several adapters; of one adapter it is told nothing."""
    return {} if groups is None else {"groups": groups}


def _mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b with the sum, and the result, in fp32 (float64 stays)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _interleave(downs: Gradients, ups: Gradients) -> Gradients:
    return [grad for pair in zip(downs, ups, strict=True) for grad in pair]


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


def _norm_gradients(site: Site, low_dz: torch.Tensor | None, x: torch.Tensor, *, rstd: torch.Tensor,
                    weight: torch.Tensor, groups: Groups | None) -> Gradients:  # fmt: skip
    """A's gradient needs z = x * rstd * weight: dA = ((low_dz * rstd)^T x) * weight, and z is not formed again."""
    if low_dz is None:
        return []
    scaled = (low_dz * rstd[:, None]).to(x.dtype)
    return [None if g is None else g.mul_(weight) for g in site.down_gradients(scaled, x, groups)]


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
        dy, largest = ops.rotate_backward(
            (grads[0], grads[1], grads[2]), qkv, low, site.up, layer.heads, ctx.rotation, site.factor, **_of(groups)
        )
        ups = site.up_gradients(dy, low, groups)
        rows = site.gradient_rows(dy, groups, largest)
        downs = _norm_gradients(site, rows.low, x, rstd=rstd, weight=layer.input_norm, groups=groups)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ops.norm_backward(
                site.weight.matmul_t(rows), x, rstd=rstd, weight=layer.input_norm, low=rows.low, down=site.down,
                residual=grads[3], **_of(groups),
            )  # fmt: skip
        return dx, None, None, None, *_interleave(downs, ups)


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
        ups = site.up_gradients(dy, low, groups)
        rows = site.gradient_rows(dy, groups)
        d_attention = site.weight.matmul_t(rows)
        if rows.low is not None and groups is None:
            d_attention.addmm_(rows.low, site.down)
        elif rows.low is not None:
            for adapter, start, end in groups.spans:
                d_attention[start:end].addmm_(rows.low[start:end], site.down[adapter])
        return dy, d_attention, None, None, *_interleave(site.down_gradients(rows.low, attention, groups), ups)


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
        next_ups = next_site.up_gradients(dy, low_h, groups)
        next_rows = next_site.gradient_rows(dy, groups)
        result = ops.swiglu_backward(
            next_site.weight.matmul_t(next_rows), both, low, site.up, low_dh=next_rows.low, down=next_site.down,
            factor=site.factor, quantise=site.weight.eats_fp8, **_of(groups),
        )  # fmt: skip
        next_downs = next_site.down_gradients(next_rows.low, result.h, groups)
        ups = site.up_gradients(result.grad, low, groups)
        downs = _norm_gradients(site, result.rows.low, x, rstd=rstd, weight=layer.output_norm, groups=groups)
        dz = site.weight.matmul_t(result.rows)
        dx = ops.norm_backward(
            dz, x, rstd=rstd, weight=layer.output_norm, low=result.rows.low, down=site.down, residual=dy,
            **_of(groups),
        )  # fmt: skip
        return dx, None, None, None, *_interleave(downs, ups), *_interleave(next_downs, next_ups)


def run_layer(
    x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, *, keeps: bool,
    groups: Groups | None = None,
) -> torch.Tensor:  # fmt: skip
    """A decoder layer: x [M, I] -> [M, I]. Unless it `keeps` gate and up, backward computes them again."""
    q, k, v, x = _Queries.apply(x, layer, rotation, groups, *layer.qkv.parameters)  # type: ignore[no-untyped-call]
    attention = attend(q, k, v, documents).flatten(1)
    x = _Output.apply(x, attention, layer, groups, *layer.o.parameters)  # type: ignore[no-untyped-call]
    parameters = (*layer.gate_up.parameters, *layer.down.parameters)
    return _Mlp.apply(x, layer, keeps, groups, *parameters)  # type: ignore[no-any-return, no-untyped-call]
