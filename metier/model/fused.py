"""LLaMA-family training with its own forward and backward: what the transformers model computes, at the card's speed.

The layers' mathematics is transformers' (Llama, Mistral, Qwen2, Qwen3); what differs is what is kept and how often
memory is read (`metier.model.layers`).

Anything else (another architecture, dropout on the adapter's input, trained biases, sliding windows) takes the
transformers modules with plain LoRA layers; the results are equal to rounding (tests/model/test_fused.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from metier.kernels.attention import Documents, takes_flash
from metier.kernels.frozen import DenseWeight, Fp8Weight, stack
from metier.kernels.loss import Head, head_losses
from metier.kernels.reference import Groups, Heads, Rotation
from metier.model.graphs import GraphedPasses
from metier.model.layers import Layer, Part, Site, run_layer
from metier.model.lora import Adapter, LoRALinear, scaling_of
from metier.model.quantise import FrozenLinear

Recompute = Literal["none", "mlp", "layer"]
IMAGES_AT_ONCE = 56
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
    def loss_weights(self) -> torch.Tensor | None: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...


class FusedModel:
    """Trains adapters on `model`, the transformers model that they belong to and that generates.

    One adapter, or several at once (`hold`), each on rows of its own.
    """

    def __init__(self, model: Any, layers: list[Layer], recompute: Recompute, adapters: Sequence[Adapter]) -> None:
        self.model = model
        self.layers = layers
        self.recompute = recompute
        self.head = model.get_output_embeddings().weight
        self.decoder = model.get_decoder()
        heads = layers[0].heads
        self.is_flash = takes_flash(self.head.dtype, self.head.device, heads.size)
        self.layer_size = sum(site.weight.shape[0] * site.weight.shape[1] for site in layers[0].sites)
        self.hold(adapters)

    def hold(self, adapters: Sequence[Adapter]) -> None:
        """Trains `adapters` from now on, by their numbers in this order; their weights stay where they are."""
        sites = [site for layer in self.layers for site in layer.sites]
        for site in sites:
            site.parts = [_part(site, adapter) for adapter in adapters]
        self.num_adapters = len(adapters)
        self.images = [image for site in sites for image in site.images(self.head.dtype, self.head.device)]
        # The rotary module of these kinds asks the host how long the row is.
        is_static = getattr(self.decoder.rotary_emb, "rope_type", "default") not in ("dynamic", "longrope")
        self.graphs = (
            GraphedPasses(self, [p for site in sites for p in site.parameters])
            if (self.is_flash and is_static and len(adapters) == 1)
            else None
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the adapter's fp32 masters into the sites, scaled in fp32, a few at a time: the copies are memory."""
        for start in range(0, len(self.images), IMAGES_AT_ONCE):
            images, masters, scales = zip(*self.images[start : start + IMAGES_AT_ONCE], strict=True)
            torch._foreach_copy_(images, torch._foreach_mul(masters, scales))

    @property
    def training(self) -> bool:
        return bool(self.model.training)

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """Summed cross-entropy in nats (fp32 scalar) of one pass."""
        losses = self.losses(batch)
        return (losses if batch.loss_weights is None else losses * batch.loss_weights).sum()

    def losses(self, batch: Batch, spans: tuple[tuple[int, int, int], ...] = ()) -> torch.Tensor:
        """Cross-entropy in nats of each supervised position, [N] fp32, not weighted.

        `spans` are the adapters' rows, where there are several adapters (`metier.kernels.reference.Groups`).
        """
        documents = Documents.of(batch.lengths, batch.input_ids.device, is_flash=self.is_flash)
        groups = Groups(spans, self.num_adapters) if self.num_adapters > 1 else None
        hidden = self._hidden(batch.input_ids, batch.position_ids, documents, groups)
        return head_losses(hidden, batch.loss_positions, batch.loss_targets, self._last())

    def accumulate(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        """`loss_sum`, detached, after adding its gradient times `weight` (a scalar tensor) to the adapter's `.grad`."""
        is_weighted = batch.loss_weights is not None  # which no graph has a buffer for
        if self.graphs is not None and not is_weighted:
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
        """`loss_sum` of a pass of one adapter whose documents are laid out already and whose losses count alike."""
        return head_losses(self._hidden(input_ids, position_ids, documents), positions, targets, self._last()).sum()

    def _last(self) -> Head:
        norm = self.decoder.norm
        return Head(norm.weight, norm.variance_epsilon, self.head)

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: Documents, groups: Groups | None = None
    ) -> torch.Tensor:
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
                    self._layer, x, layer, rotation, documents, groups, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._layer(x, layer, rotation, documents, groups)
        return x  # type: ignore[no-any-return]

    def _layer(
        self, x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, groups: Groups | None
    ) -> torch.Tensor:
        return run_layer(x, layer, rotation, documents, keeps=self.recompute != "mlp", groups=groups)


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


def fuse(model: Any, *adapters: Adapter, recompute: Recompute = "none", fp8_copies: int = 2) -> FusedModel | None:
    """A `FusedModel` over `model` that trains `adapters`, or None where only the generic path is right.

    The weights of a site are stacked; the model's own layers become views of the stack. `fp8_copies` 1 keeps e4m3
    weights once and transposes them each time for dX.
    """
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if not is_fused_architecture(model.config.get_text_config()) or not all(can_fuse(a, head) for a in adapters):
        return None
    if not all(_is_even(module) for module in model.get_decoder().layers):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    layers = [_layer_of(module, model.config.get_text_config(), names) for module in model.get_decoder().layers]
    for layer in layers:
        for site in layer.sites:
            if isinstance(site.weight, Fp8Weight) and fp8_copies == 2:
                site.weight.keep_transposed()
    return FusedModel(model, layers, recompute, adapters)


def can_fuse(adapter: Adapter, head: str = "lm_head") -> bool:
    """Whether the fused path trains such an adapter: no dropout, no trained biases, no adapter on the output head."""
    return adapter.config.dropout == 0 and not adapter.biases and head not in adapter.layers


def _is_even(module: Any) -> bool:
    """Whether the layers of a site are kept in one form."""
    attention, mlp = module.self_attn, module.mlp
    sites = ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj])
    return all(len({type(getattr(m, "base", m)) for m in site}) == 1 for site in sites)


def _layer_of(module: Any, config: Any, names: dict[int, str]) -> Layer:
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
        _site(projections, names), _site([attention.o_proj], names),
        _site([mlp.gate_proj, mlp.up_proj], names), _site([mlp.down_proj], names),
    )  # fmt: skip


def _site(modules: list[Any], names: dict[int, str]) -> Site:
    plain = [m.base if isinstance(m, LoRALinear) else m for m in modules]
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
    return Site(weight, tuple(ends), tuple(names[id(module)] for module in modules))


def _part(site: Site, adapter: Adapter) -> Part:
    layers = [adapter.layers.get(name) for name in site.names]
    masters = [None if layer is None else (layer.lora_a, layer.lora_b) for layer in layers]
    return Part(masters, scaling_of(adapter.config), adapter.config.rank)
