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
from metier.kernels.reference import Heads, Rotation, Rows, rank_gradient


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

    def up_gradients(self, whole: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradient of each layer's B [O, R] from that of `up`, fp32 [O, R], which is overwritten."""
        if whole is None:
            return []
        whole.mul_(self.scaling)
        starts = (0, *self.ends)
        return [whole[starts[j] : self.ends[j]] for j, pair in enumerate(self.masters) if pair is not None]

    def down_gradients(self, whole: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradient of each layer's A [R, I] from that of `down`, fp32 [n R, I]."""
        if whole is None:
            return []
        parts = whole.view(len(self.ends), self.rank, -1)
        return [parts[j] for j, pair in enumerate(self.masters) if pair is not None]

    def rank_gradient(self, dy: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor | None:
        """The gradient of `up` from dy [M, O] and low = x A^T [M, n R]."""
        return None if low is None else rank_gradient(dy, low, self.ends)


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
        dy, largest, up_grad = ops.rotate_backward(
            (grads[0], grads[1], grads[2]), qkv, low, site.up, layer.heads, ctx.rotation, site.factor
        )
        rows = site.gradient_rows(dy, largest)
        dx, down_grad = None, None
        if ctx.needs_input_grad[0]:
            dx, down_grad = ops.norm_backward(
                site.weight.matmul_t(rows), x, rstd=rstd, weight=layer.input_norm, low=rows.low, down=site.down,
                projected=low, residual=grads[3],
            )  # fmt: skip
        elif rows.low is not None:
            scaled = (rows.low * rstd[:, None]).to(x.dtype)
            down_grad = rank_gradient(scaled, x, (scaled.shape[1],)) * layer.input_norm
        return dx, None, None, *_interleave(site.down_gradients(down_grad), site.up_gradients(up_grad))


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
        ups = site.up_gradients(site.rank_gradient(dy, low))
        rows = site.gradient_rows(dy)
        d_attention = site.weight.matmul_t(rows)
        downs: list[torch.Tensor | None] = []
        if rows.low is not None:
            d_attention.addmm_(rows.low, site.down)
            downs = site.down_gradients(rank_gradient(rows.low, attention, (site.rank,)))
        return dy, d_attention, None, *_interleave(downs, ups)


class _Mlp(torch.autograd.Function):
    """x [M, I] -> x + down(silu(gate(z)) * up(z)), z the norm of x. `keeps` gate and up, or computes them again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer, keeps: bool, *_: torch.Tensor) -> torch.Tensor:
        y, rows, low_h, both = _mlp_forward(x, layer)
        ctx.save_for_backward(x, rows.rstd, rows.low, low_h, both if keeps else None)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, low, low_h, both = ctx.saved_tensors
        layer = ctx.layer
        if both is None:
            both = layer.gate_up.weight.matmul(_norm(x, layer.output_norm, layer.eps, layer.gate_up))
        dx, found = _mlp_backward(grads[0], layer, x, Rows(None, low=low, rstd=rstd), low_h, both)
        return dx, None, None, *found


def _mlp_forward(x: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, Rows, torch.Tensor | None, torch.Tensor]:
    """The MLP's output, its input after the norm, the projection of its hidden values, and gate and up."""
    rows = _norm(x, layer.output_norm, layer.eps, layer.gate_up)
    both = layer.gate_up.weight.matmul(rows)
    h = ops.swiglu(both, rows.low, layer.gate_up.up, down=layer.down.down_t, quantise=layer.down.weight.eats_fp8)
    return ops.add_low_rank(x, layer.down.weight.matmul(h), h.low, layer.down.up), rows, h.low, both


def _mlp_backward(
    dy: torch.Tensor, layer: Layer, x: torch.Tensor, rows: Rows, low_h: torch.Tensor | None, both: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The gradients of x and of the parameters; of `rows` low and rstd are read, and `both` is overwritten."""
    site, next_site = layer.gate_up, layer.down
    assert rows.rstd is not None
    next_ups = next_site.up_gradients(next_site.rank_gradient(dy, low_h))
    next_rows = next_site.gradient_rows(dy)
    result = ops.swiglu_backward(
        next_site.weight.matmul_t(next_rows), both, rows.low, site.up, low_dh=next_rows.low, down=next_site.down,
        factor=site.factor, quantise=site.weight.eats_fp8,
    )  # fmt: skip
    dx, down_grad = ops.norm_backward(
        site.weight.matmul_t(result.rows), x, rstd=rows.rstd, weight=layer.output_norm, low=result.rows.low,
        down=site.down, projected=rows.low, residual=dy,
    )  # fmt: skip
    here = _interleave(site.down_gradients(down_grad), site.up_gradients(result.up))
    return dx, [*here, *_interleave(next_site.down_gradients(result.down), next_ups)]


def _attention_block(x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents) -> torch.Tensor:
    """x + o_proj(attention(norm(x))), [M, I]."""
    q, k, v, x = _Queries.apply(x, layer, rotation, *layer.qkv.parameters)  # type: ignore[no-untyped-call]
    attention = attend(q, k, v, documents).flatten(1)
    return _Output.apply(x, attention, layer, *layer.o.parameters)  # type: ignore[no-any-return, no-untyped-call]


def run_layer(x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, *, keeps: bool) -> torch.Tensor:
    """A decoder layer: x [M, I] -> [M, I]. Unless it `keeps` gate and up, backward computes them again."""
    x = _attention_block(x, layer, rotation, documents)
    parameters = (*layer.gate_up.parameters, *layer.down.parameters)
    return _Mlp.apply(x, layer, keeps, *parameters)  # type: ignore[no-any-return, no-untyped-call]
