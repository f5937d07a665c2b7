"""LLaMA-family training with its own forward and backward: what the transformers model computes, at the card's speed.

The layers' mathematics is transformers' (Llama, Mistral, Qwen2, Qwen3); what differs is what is kept and how often
memory is read (`metier.model.layers`).

Anything else (another architecture, trained biases, sliding windows) takes the transformers modules with plain LoRA
layers; the results are equal to rounding (tests/model/test_fused.py).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from metier.kernels.attention import Documents, takes_flash
from metier.kernels.dropout import Dropout
from metier.kernels.frozen import DenseWeight, Fp8Weight, joined, stack
from metier.kernels.groups import MAX_GROUPED_RANK, Groups
from metier.kernels.loss import Head, head_losses
from metier.kernels.reference import Heads, Rotation
from metier.model.graphs import GraphedPasses
from metier.model.layers import Layer, Treatment, run_layer
from metier.model.lora import Adapter, LoRALinear, scaling_of
from metier.model.quantise import FrozenLinear
from metier.model.shards import shards_of
from metier.model.sites import Part, Site, refresh

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
    def loss_weights(self) -> torch.Tensor | None: ...
    @property
    def row_keys(self) -> torch.Tensor | None: ...
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
        self.shards = shards_of(model)
        heads = layers[0].heads
        self.is_flash = takes_flash(self.head.dtype, self.head.device, heads.size)
        self.layer_size = sum(site.weight.shape[0] * site.weight.shape[1] for site in layers[0].sites)
        self.hold(adapters)

    def hold(self, adapters: Sequence[Adapter]) -> None:
        """Trains `adapters` from now on, by their numbers in this order; their weights stay where they are."""
        sites = self._sites
        for site in sites:
            site.parts = [_part(site, adapter) for adapter in adapters]
        self.ranks = tuple(adapter.config.rank for adapter in adapters)
        self.dropout = adapters[0].config.dropout if len(adapters) == 1 else 0.0
        self._make_images()
        # The rotary module of these kinds asks the host how long the row is.
        is_static = getattr(self.decoder.rotary_emb, "rope_type", "default") not in ("dynamic", "longrope")
        self.only = 0
        self.is_grouped = len(adapters) > 1 and self.head.is_cuda and max(self.ranks) <= MAX_GROUPED_RANK
        own = [p for site in sites for p in site.parameters] if len(adapters) == 1 else []
        can_record = self.is_flash and is_static and not self.shards and (len(adapters) == 1 or self.is_grouped)
        self.graphs = GraphedPasses(self, own) if can_record else None

    @contextlib.contextmanager
    def alone(self, adapter: int) -> Iterator[None]:
        """Inside, passes that name no spans are this adapter's, by its number."""
        before, self.only = self.only, adapter
        try:
            yield
        finally:
            self.only = before

    def clear(self) -> None:
        """Sets the sums of several adapters' gradients to zero."""
        totals = [total for site in self._sites for total in site.totals or ()]
        if totals:
            torch._foreach_zero_(totals)

    def settle(self) -> None:
        """Makes the sums of several adapters' gradients the parameters' `.grad`."""
        for site in self._sites:
            site.settle()

    @property
    def _sites(self) -> list[Site]:
        return [site for layer in self.layers for site in layer.sites]

    def _make_images(self) -> None:
        """Memory for the adapters' masters as products read them: of several, for one layer at a time."""
        sizes = [[site.image_size for site in layer.sites] for layer in self.layers]
        starts = list(itertools.accumulate(map(sum, sizes), initial=0))
        # What one layer leaves empty would keep another's.
        if len(self.ranks) > 1 and all(site.is_full for site in self._sites):
            starts = [0] * len(sizes) + [max(map(sum, sizes))]
        room = torch.zeros(starts[-1], dtype=self.head.dtype, device=self.head.device)
        for layer, own, start in zip(self.layers, sizes, starts, strict=False):
            pieces = torch.split(room[start : start + sum(own)], own)
            layer.images = [image for site, piece in zip(layer.sites, pieces, strict=True)
                            for image in site.images(piece)]  # fmt: skip
        self.images = [image for layer in self.layers for image in layer.images]

    def refresh(self) -> None:
        """Copies the masters of one adapter into all sites; of several each layer does it."""
        if len(self.ranks) == 1:
            refresh(self.images)

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

        `spans` are the adapters' rows, where there are several adapters (`metier.kernels.groups.Groups`).
        """
        documents = Documents.of(batch.lengths, batch.input_ids.device, is_flash=self.is_flash)
        groups = self._groups(spans, batch.input_ids.shape[1])
        treatment = self._treatment(groups, batch.row_keys)
        hidden = self._hidden(batch.input_ids, batch.position_ids, documents, treatment)
        return head_losses(hidden, batch.loss_positions, batch.loss_targets, self._last())

    def accumulate(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        """`loss_sum`, detached, after adding its gradient times `weight` (a scalar tensor) to the adapter's `.grad`."""
        counts = batch.loss_weights
        weights = weight.expand(batch.loss_targets.shape) if counts is None else weight * counts
        losses = self.accumulate_each(batch, weights)
        return (losses if counts is None else losses * counts).sum()

    def accumulate_each(
        self, batch: Batch, weights: torch.Tensor, spans: tuple[tuple[int, int, int], ...] = ()
    ) -> torch.Tensor:  # fmt: skip
        """`losses`, detached, after adding the gradient of their sum times `weights` [N].

        It is added to the parameters' `.grad`, or, of several adapters, to sums that `settle` hands on.
        """
        if self.graphs is not None:
            found = self.graphs.accumulate(batch, weights, spans)
            if found is not None:
                return found
        losses = self.losses(batch, spans)
        torch.autograd.backward(losses, weights.to(losses.dtype))
        return losses.detach()

    def losses_of(self, inputs: dict[str, torch.Tensor], documents: Documents, groups: Groups | None) -> torch.Tensor:
        """`losses` of a pass that is laid out already (`metier.model.graphs`)."""
        treatment = self._treatment(groups, inputs.get("row_keys"))
        hidden = self._hidden(inputs["input_ids"], inputs["position_ids"], documents, treatment)
        return head_losses(hidden, inputs["positions"], inputs["targets"], self._last())

    @property
    def drops_out(self) -> bool:
        """Whether passes now are made with dropout."""
        return self.dropout > 0 and self.training

    def _treatment(self, groups: Groups | None, row_keys: torch.Tensor | None) -> Treatment:
        if not self.drops_out:
            return Treatment(groups)
        if row_keys is None:
            raise ValueError("dropout needs the pass's row_keys")
        return Treatment(groups, Dropout(self.dropout, row_keys))

    def _groups(self, spans: tuple[tuple[int, int, int], ...], num_rows: int) -> Groups | None:
        if len(self.ranks) < 2:
            return None
        groups = Groups(spans or ((self.only, 0, num_rows),), self.ranks)
        return groups.on(self.head.device) if self.is_grouped else groups

    def _last(self) -> Head:
        norm = self.decoder.norm
        return Head(norm.weight, norm.variance_epsilon, self.head)

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, documents: Documents, treatment: Treatment
    ) -> torch.Tensor:
        """The last layer's output before the final norm, [M, I]."""
        self.refresh()
        x = self.model.get_input_embeddings()(input_ids)[0]
        # The module reads the dtype and the device of its first argument alone.
        wide = torch.empty(1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        cos, sin = self.decoder.rotary_emb(wide, position_ids)
        half = cos.shape[-1] // 2
        rotation = Rotation(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        for number, layer in enumerate(self.layers):
            if self.shards:
                self.shards.need(number)
            if self.recompute == "layer" and torch.is_grad_enabled():
                x = checkpoint(
                    self._layer, x, layer, rotation, documents, treatment, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._layer(x, layer, rotation, documents, treatment)
            if self.shards:
                x = self.shards.until_backward(number, x)
        return x  # type: ignore[no-any-return]

    def _layer(
        self, x: torch.Tensor, layer: Layer, rotation: Rotation, documents: Documents, treatment: Treatment
    ) -> torch.Tensor:
        return run_layer(x, layer, rotation, documents, keeps=self.recompute != "mlp", treatment=treatment)


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
    is_known = is_fused_architecture(model.config.get_text_config())
    if not is_known or not all(can_fuse(a, head, alone=len(adapters) == 1) for a in adapters):
        return None
    if not all(_is_even(module) for module in model.get_decoder().layers):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    shards = shards_of(model)
    layers = []
    with shards.one_pass(backward=False) if shards else contextlib.nullcontext():
        for number, module in enumerate(model.get_decoder().layers):
            if shards:
                shards.need(number)
            layers.append(_layer_of(module, model.config.get_text_config(), names))
    for layer in layers:
        for site in layer.sites:
            if isinstance(site.weight, Fp8Weight) and fp8_copies == 2 and not shards:
                site.weight.keep_transposed()
    return FusedModel(model, layers, recompute, adapters)


def can_fuse(adapter: Adapter, head: str = "lm_head", *, alone: bool = False) -> bool:
    """Whether the fused path trains such an adapter: no trained biases, none on the output head, dropout only alone."""
    return (alone or adapter.config.dropout == 0) and not adapter.biases and head not in adapter.layers


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
        None if biases[0] is None else joined([b.detach() for b in biases]),
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
    numbers = [0 if layer is None else layer.number for layer in layers]
    return Part(masters, scaling_of(adapter.config), adapter.config.rank, numbers)
