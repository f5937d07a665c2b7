"""A decoder layer's forward and backward over frozen weights, as three autograd functions.

A site is one or more linear layers that share their input: q/k/v, o, gate/up, down. Per site: one product with the
frozen weight, x A^T computed while the input is normalised or quantised, and s x A^T B^T added where the output is read
next. No gradient of a frozen weight is formed, and nothing is kept that is cheap to compute again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metier.kernels import ops
from metier.kernels.attention import Documents, attend
from metier.kernels.frozen import FrozenWeight
from metier.kernels.reference import Heads, Rotation, Rows


@dataclass
class Site:
    """Linear layers that share their input, with the adapter's weights in the form in which products read them.

    `ends` are the layers' ends in the output. down [n R, I] holds their A, up [O, R] their B times the scaling, both in
    the model's dtype; None where none of the layers has an adapter. `masters` are the fp32 A and B, one pair a layer.
    """

    weight: FrozenWeight
    ends: tuple[int, ...]
    masters: list[tuple[nn.Parameter, nn.Parameter] | None]
    scaling: float
    rank: int
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for pair in self.masters if pair is not None for p in pair]

    @property
    def down_t(self) -> torch.Tensor | None:
        return None if self.down is None else self.down.T

    def images(self, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor, nn.Parameter, float]]:
        """Makes `down` and `up`; where each master is copied to, and by what it is multiplied."""
        if not self.parameters:
            return []
        self.down = torch.zeros(len(self.ends) * self.rank, self.weight.shape[1], dtype=dtype, device=device)
        self.up = torch.zeros(self.weight.shape[0], self.rank, dtype=dtype, device=device)
        found = []
        for j, pair in enumerate(self.masters):
            if pair is not None:
                start = self.ends[j - 1] if j else 0
                found.append((self.down[j * self.rank : (j + 1) * self.rank], pair[0], 1.0))
                found.append((self.up[start : self.ends[j]], pair[1], self.scaling))
        return found

    @property
    def factor(self) -> torch.Tensor | None:
        """What dy is multiplied by before it is quantised for dX."""
        return self.weight.column_scale if self.weight.eats_fp8 else None

    def gradient_rows(self, dy: torch.Tensor, largest: torch.Tensor | None = None) -> Rows:
        """dy [M, O] as the product for dX reads it, with its projection on the rank."""
        return ops.project_rows(
            dy, factor=self.factor, down=self.up, segments=self.ends if self.up is not None else (),
            quantise=self.weight.eats_fp8, largest=largest,
        )  # fmt: skip

    def up_gradients(self, dy: torch.Tensor, low: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradient of each layer's B [O, R] from dy [M, O] and low = x A^T [M, n R], fp32."""
        grads: list[torch.Tensor | None] = []
        for j, pair in enumerate(self.masters):
            if pair is not None:
                assert low is not None
                start = self.ends[j - 1] if j else 0
                part = low[:, j * self.rank : (j + 1) * self.rank]
                grads.append(_mm32(dy[:, start : self.ends[j]].T, part).mul_(self.scaling))
        return grads

    def down_gradients(self, low_dy: torch.Tensor | None, x: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradient of each layer's A [R, I] from low_dy = dy B [M, n R] and x [M, I], fp32."""
        if low_dy is None:
            return []
        whole = _mm32(low_dy.T, x)
        parts = whole.view(len(self.ends), self.rank, -1)
        return [parts[j] for j, pair in enumerate(self.masters) if pair is not None]


def _mm32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b with the sum, and the result, in fp32 (float64 stays)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


def _interleave(downs: list[torch.Tensor | None], ups: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
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


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, site: Site) -> Rows:
    segments = (x.shape[1],) if site.down is not None else ()
    return ops.project_rows(
        x, factor=weight, down=site.down_t, segments=segments, eps=eps, quantise=site.weight.eats_fp8
    )


def _norm_gradients(site: Site, low_dz: torch.Tensor | None, x: torch.Tensor, rstd: torch.Tensor,
                    weight: torch.Tensor) -> list[torch.Tensor | None]:  # fmt: skip
    """A's gradient needs z = x * rstd * weight: dA = ((low_dz * rstd)^T x) * weight, and z is not formed again."""
    if low_dz is None:
        return []
    scaled = (low_dz * rstd[:, None]).to(x.dtype)
    return [None if g is None else g.mul_(weight) for g in site.down_gradients(scaled, x)]


class _Queries(torch.autograd.Function):
    """x [M, I] -> q, k, v after norm, product, rotation; and x: its other reader's gradient comes back here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer, rotation: Rotation, *_: torch.Tensor) -> Any:
        rotation = rotation._replace(bias=layer.bias, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=layer.eps)
        rows = _norm(x, layer.input_norm, layer.eps, layer.qkv)
        qkv = layer.qkv.weight.matmul(rows)
        q, k, v = ops.rotate(qkv, rows.low, layer.qkv.up, layer.heads, rotation)
        ctx.save_for_backward(x, rows.rstd, rows.low, qkv if layer.q_norm is not None else None)
        ctx.layer, ctx.rotation = layer, rotation
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, qkv = ctx.saved_tensors
        layer, site = ctx.layer, ctx.layer.qkv
        dy, largest = ops.rotate_backward(
            (grads[0], grads[1], grads[2]), qkv, low, site.up, layer.heads, ctx.rotation, site.factor
        )
        ups = site.up_gradients(dy, low)
        rows = site.gradient_rows(dy, largest)
        downs = _norm_gradients(site, rows.low, x, rstd, layer.input_norm)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ops.norm_backward(
                site.weight.matmul_t(rows), x, rstd=rstd, weight=layer.input_norm, low=rows.low, down=site.down,
                residual=grads[3],
            )  # fmt: skip
        return dx, None, None, *_interleave(downs, ups)


class _Output(torch.autograd.Function):
    """x [M, I] and attention's output [M, Hq D] -> x + o_proj(attention)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, attention: torch.Tensor, layer: Layer, *_: torch.Tensor) -> torch.Tensor:
        site = layer.o
        segments = (attention.shape[1],) if site.down is not None else ()
        rows = ops.project_rows(attention, down=site.down_t, segments=segments, quantise=site.weight.eats_fp8)
        ctx.save_for_backward(attention, rows.low)
        ctx.layer = layer
        return ops.add_low_rank(x, site.weight.matmul(rows), rows.low, site.up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        attention, low = ctx.saved_tensors
        site, dy = ctx.layer.o, grads[0]
        ups = site.up_gradients(dy, low)
        rows = site.gradient_rows(dy)
        d_attention = site.weight.matmul_t(rows)
        if rows.low is not None:
            d_attention.addmm_(rows.low, site.down)
        return dy, d_attention, None, *_interleave(site.down_gradients(rows.low, attention), ups)


class _Mlp(torch.autograd.Function):
    """x [M, I] -> x + down(silu(gate(z)) * up(z)), z the norm of x. `keeps` gate and up, or computes them again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer, keeps: bool, *_: torch.Tensor) -> torch.Tensor:
        rows = _norm(x, layer.output_norm, layer.eps, layer.gate_up)
        both = layer.gate_up.weight.matmul(rows)
        h = ops.swiglu(both, rows.low, layer.gate_up.up, down=layer.down.down_t, quantise=layer.down.weight.eats_fp8)
        ctx.save_for_backward(x, rows.rstd, rows.low, h.low, both if keeps else None)
        ctx.layer = layer
        return ops.add_low_rank(x, layer.down.weight.matmul(h), h.low, layer.down.up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, low_h, both = ctx.saved_tensors
        layer, dy = ctx.layer, grads[0]
        site, next_site = layer.gate_up, layer.down
        if both is None:
            both = site.weight.matmul(_norm(x, layer.output_norm, layer.eps, site))
        next_ups = next_site.up_gradients(dy, low_h)
        next_rows = next_site.gradient_rows(dy)
        result = ops.swiglu_backward(
            next_site.weight.matmul_t(next_rows), both, low, site.up, low_dh=next_rows.low, down=next_site.down,
            factor=site.factor, quantise=site.weight.eats_fp8,
        )  # fmt: skip
        next_downs = next_site.down_gradients(next_rows.low, result.h)
        ups = site.up_gradients(result.grad, low)
        downs = _norm_gradients(site, result.rows.low, x, rstd, layer.output_norm)
        dz = site.weight.matmul_t(result.rows)
        dx = ops.norm_backward(
            dz, x, rstd=rstd, weight=layer.output_norm, low=result.rows.low, down=site.down, residual=dy
        )
        return dx, None, None, *_interleave(downs, ups), *_interleave(next_downs, next_ups)


def run_layer(x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, *, keeps: bool) -> torch.Tensor:
    """A decoder layer: x [M, I] -> [M, I]. Unless it `keeps` gate and up, backward computes them again."""
    q, k, v, x = _Queries.apply(x, layer, rotation, *layer.qkv.parameters)  # type: ignore[no-untyped-call]
    attention = attend(q, k, v, documents).flatten(1)
    x = _Output.apply(x, attention, layer, *layer.o.parameters)  # type: ignore[no-untyped-call]
    parameters = (*layer.gate_up.parameters, *layer.down.parameters)
    return _Mlp.apply(x, layer, keeps, *parameters)  # type: ignore[no-any-return, no-untyped-call]
