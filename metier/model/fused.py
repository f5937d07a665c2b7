"""LLaMA-family training with its own forward and backward: what the transformers model computes, at the card's speed.

The layers' mathematics is transformers' (Llama, Mistral, Qwen2, Qwen3); what differs is what is kept and how often
memory is read. A site is one or more linear layers that share their input: q/k/v, o, gate/up, down. Per site: one
product with the frozen weight, x A^T computed while the input is normalised or quantised, and s x A^T B^T added where
the output is read next. No gradient of a frozen weight is formed, and nothing is kept that is cheap to compute again.

Anything else (another architecture, dropout on the adapter's input, trained biases, sliding windows) takes the
transformers modules with plain LoRA layers; the results are equal to rounding (tests/model/test_fused.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metier.kernels import ops
from metier.kernels.attention import Documents, attend, takes_flash
from metier.kernels.frozen import DenseWeight, Fp8Weight, FrozenWeight, stack
from metier.kernels.loss import Head, head_loss
from metier.kernels.reference import Heads, Rotation, Rows
from metier.model.graphs import MAX_WORK, GraphedPasses
from metier.model.lora import Adapter, LoRALinear
from metier.model.quantise import FrozenLinear

Recompute = Literal["none", "mlp", "layer"]
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class Batch(Protocol):
    """What a pass is given: see `metier.training.pack.PackedBatch`."""

    @property
    def input_ids(self) -> torch.Tensor: ...
    @property
    def position_ids(self) -> torch.Tensor: ...
    @property
    def loss_positions(self) -> torch.Tensor: ...
    @property
    def loss_targets(self) -> torch.Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...


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


class FusedModel:
    """Trains the adapter on `model`, the transformers model that it is attached to and that generates."""

    def __init__(self, model: Any, layers: list[Layer], recompute: Recompute) -> None:
        self.model = model
        self.layers = layers
        self.recompute = recompute
        self.head = model.get_output_embeddings().weight
        self.decoder = model.get_decoder()
        heads = layers[0].heads
        self.is_flash = takes_flash(self.head.dtype, self.head.device, heads.size)
        sites = [site for layer in layers for site in layer.sites]
        self.images = [image for site in sites for image in site.images(self.head.dtype, self.head.device)]
        self.layer_size = sum(site.weight.shape[0] * site.weight.shape[1] for site in layers[0].sites)
        # The rotary module of these kinds asks the host how long the row is.
        is_static = getattr(self.decoder.rotary_emb, "rope_type", "default") not in ("dynamic", "longrope")
        self.graphs = (
            GraphedPasses(self, [p for site in sites for p in site.parameters])
            if (self.is_flash and is_static)
            else None
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the adapter's fp32 masters into the sites."""
        scaled = torch._foreach_mul([master for _, master, _ in self.images], [scale for *_, scale in self.images])
        torch._foreach_copy_([image for image, *_ in self.images], scaled)

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy in nats (fp32 scalar) of one pass."""
        documents = Documents.of(batch.lengths, batch.input_ids.device, is_flash=self.is_flash)
        return self.loss_of(batch.input_ids, batch.position_ids, documents, batch.loss_positions, batch.loss_targets)

    def accumulate(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        """`loss_sum`, detached, after adding its gradient times `weight` (a scalar tensor) to the adapter's `.grad`."""
        if self.graphs is not None and batch.input_ids.shape[1] * self.layer_size <= MAX_WORK:
            loss = self.graphs.accumulate(batch, weight)
            if loss is not None:
                return loss
        loss = self.loss_sum(batch)
        torch.autograd.backward(loss * weight)
        return loss.detach()

    def loss_of(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: Documents,
        positions: torch.Tensor, targets: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """`loss_sum` of a pass whose documents are laid out already."""
        norm = self.decoder.norm
        head = Head(norm.weight, norm.variance_epsilon, self.head)
        return head_loss(self._hidden(input_ids, position_ids, documents), positions, targets, head)

    def _hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: Documents) -> torch.Tensor:
        """The last layer's output before the final norm, [M, I]."""
        self.refresh()
        x = self.model.get_input_embeddings()(input_ids)[0]
        # The module reads the dtype and the device of its first argument alone.
        wide = torch.empty(1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        cos, sin = self.decoder.rotary_emb(wide, position_ids)
        half = cos.shape[-1] // 2
        rotation = Rotation(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        for layer in self.layers:
            if self.recompute == "layer" and torch.is_grad_enabled():
                x = checkpoint(
                    self._layer, x, layer, rotation, documents, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._layer(x, layer, rotation, documents)
        return x  # type: ignore[no-any-return]

    def _layer(self, x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents) -> torch.Tensor:
        q, k, v, x = _Queries.apply(x, layer, rotation, *layer.qkv.parameters)  # type: ignore[no-untyped-call]
        attention = attend(q, k, v, documents).flatten(1)
        x = _Output.apply(x, attention, layer, *layer.o.parameters)  # type: ignore[no-untyped-call]
        keeps = self.recompute != "mlp"
        parameters = (*layer.gate_up.parameters, *layer.down.parameters)
        return _Mlp.apply(x, layer, keeps, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def is_fused_architecture(config: Any) -> bool:
    """Whether the fused path knows the model of this (text) config; see `fuse` for the rest."""
    window = getattr(config, "sliding_window", None)
    is_windowed = window is not None and getattr(config, "use_sliding_window", True)
    return (
        config.model_type in ARCHITECTURES
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and not (config.model_type != "qwen2" and getattr(config, "attention_bias", False))
        and not is_windowed
    )


def fuse(model: Any, adapter: Adapter, *, recompute: Recompute = "none", fp8_copies: int = 2) -> FusedModel | None:
    """A `FusedModel` over `model`, or None where only the generic path is right.

    The weights of a site are stacked; the model's own layers become views of the stack. `fp8_copies` 1 keeps e4m3
    weights once and transposes them each time for dX.
    """
    is_plain = adapter.config.dropout == 0 and not adapter.biases
    if not is_plain or not is_fused_architecture(model.config.get_text_config()):
        return None
    if isinstance(model.get_output_embeddings(), LoRALinear):
        return None
    if not all(_is_even(module) for module in model.get_decoder().layers):
        return None
    layers = [_layer_of(module, model.config.get_text_config(), adapter) for module in model.get_decoder().layers]
    for layer in layers:
        for site in layer.sites:
            if isinstance(site.weight, Fp8Weight) and fp8_copies == 2:
                site.weight.keep_transposed()
    return FusedModel(model, layers, recompute)


def _is_even(module: Any) -> bool:
    """Whether the layers of a site are kept in one form."""
    attention, mlp = module.self_attn, module.mlp
    sites = ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj])
    return all(len({type(getattr(m, "base", m)) for m in site}) == 1 for site in sites)


def _layer_of(module: Any, config: Any, adapter: Adapter) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    size = attention.head_dim
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, size)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [p.bias for p in projections]
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        module.input_layernorm.weight, module.post_attention_layernorm.weight,
        module.input_layernorm.variance_epsilon, heads,
        None if biases[0] is None else torch.cat([b.detach() for b in biases]),
        None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
        _site(projections, adapter), _site([attention.o_proj], adapter),
        _site([mlp.gate_proj, mlp.up_proj], adapter), _site([mlp.down_proj], adapter),
    )  # fmt: skip


def _site(modules: list[Any], adapter: Adapter) -> Site:
    plain = [m.base if isinstance(m, LoRALinear) else m for m in modules]
    masters = [(m.lora_a, m.lora_b) if isinstance(m, LoRALinear) else None for m in modules]
    weights = [m.frozen if isinstance(m, FrozenLinear) else DenseWeight(m.weight.detach()) for m in plain]
    weight = stack(weights)
    ends, end = [], 0
    for linear in plain:
        start, end = end, end + linear.out_features
        ends.append(end)
        if len(plain) == 1:
            continue
        if isinstance(linear, FrozenLinear):
            if isinstance(weight, Fp8Weight):
                linear.frozen = weight.rows(start, end)
        elif isinstance(weight, DenseWeight):
            linear.weight.data = weight.weight[start:end]
    scaling = next((m.scaling for m in modules if isinstance(m, LoRALinear)), 1.0)
    return Site(weight, tuple(ends), masters, scaling, adapter.config.rank)
