"""A model's memory in training, from its configuration alone.

It is counted, not fitted: what autograd keeps for backward is written down per decoder layer as multiples of the
layer's widths (`SAVED`), for each path that a model may take. The tests count the real tensors.

Limits: dense decoder models; a mixture of experts is not described.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metier.model.fused import is_fused_architecture
from metier.model.lora import target_names
from metier.model.shards import decoder_layers
from metier.recipe import AdapterConfig

# Keeps e4m3 weights once and transposes them at each use, where `fp8` keeps the transposed ones too.
LEAN_FP8 = "fp8, one copy"
# Bytes of one frozen weight: nf4 has an 8-bit scale for 64 and an fp32 one for 64 x 256; fp8 one scale a row.
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 2.0, LEAN_FP8: 1.0, "nf4": 0.516}
LOSS_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Saved:
    """What a path keeps of a token in one decoder layer, as multiples of widths; the sizes are in elements.

    `norm_input_fp32`: the norm's input is kept as an fp32 copy; `repeats_kv`: keys and values are kept once for every
    query head; `dense_mask`: attention keeps a mask of tokens x tokens; `gated_mlp` and `plain_mlp`: multiples of
    the MLP's width; `chunked_loss`: logits live a chunk at a time.
    """

    norm_input_fp32: bool
    normed: float
    repeats_kv: bool
    dense_mask: bool
    gated_mlp: float
    plain_mlp: float
    chunked_loss: bool


# generic: transformers' own layers with plain LoRA linears.
# fused: metier's kernels, which compute norms, SwiGLU and X A^T again.
SAVED = {
    "generic": Saved(
        norm_input_fp32=True, normed=1, repeats_kv=True, dense_mask=True, gated_mlp=4, plain_mlp=2,
        chunked_loss=False,
    ),
    "fused": Saved(
        norm_input_fp32=False, normed=0, repeats_kv=False, dense_mask=False, gated_mlp=2, plain_mlp=2,
        chunked_loss=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A model in numbers: the path it takes, widths, counts of weights, and what the adapter adds."""

    architecture: str
    path: str
    num_layers: int
    hidden: int
    query: int
    key_value: int
    heads: int
    mlp: int
    mlp_is_gated: bool
    mlp_saved: float | None
    num_norms: int
    has_rms_norms: bool
    has_qk_norm: bool
    vocabulary: int
    layer_weights: int
    other_weights: int
    adapter_weights: int
    adapted_inputs: int
    adapted_norms: int
    adapts_down: bool
    rank_sum: int


def shape_of(model: Any, adapter: AdapterConfig) -> Shape:
    """The numbers of `model`, a transformers model without adapter, empty (`metier.model.load.empty_model`) or not.

    Raises `ModelError` for target modules that it does not have.
    """
    import torch

    config = model.config.get_text_config()
    layers = decoder_layers(model)
    layer = layers[0]
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    norms = [m for m in layer.modules() if type(m).__name__.endswith("Norm")]
    hidden = int(config.hidden_size)
    on_hidden = [m for m in norms if next(m.parameters()).shape[-1] == hidden]
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    mlp_in = sum(m.out_features for n, m in linears.items() if m.in_features == hidden and "attn" not in n)
    width = max(m.in_features for n, m in linears.items() if "attn" not in n)
    in_layers = sum(p.numel() for m in layers for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    names = target_names(model, adapter.target_modules)
    adapted = [model.get_submodule(name) for name in names]
    # A layer's two blocks each read one normed input; a linear layer without adapter keeps nothing of it.
    on_normed = {"attn" in n for n, m in zip(names, adapted, strict=True) if m.in_features == hidden and not _is_out(n)}
    # gelu_new is written in elementary operations, each of which keeps its input.
    is_spelled_out = getattr(config, "hidden_act", "") == "gelu_new"
    return Shape(
        architecture=type(model).__name__, path=path_of(model, adapter), num_layers=config.num_hidden_layers,
        hidden=hidden, query=heads * head_dim, key_value=kv_heads * head_dim, heads=heads,
        mlp=width, mlp_is_gated=mlp_in >= 2 * width, mlp_saved=5 if is_spelled_out else None,
        num_norms=len(on_hidden), has_rms_norms="RMS" in type(norms[0]).__name__,
        has_qk_norm=len(norms) > len(on_hidden), vocabulary=config.vocab_size,
        layer_weights=in_layers, other_weights=total - in_layers,
        adapter_weights=sum(adapter.rank * (m.in_features + m.out_features) for m in adapted),
        adapted_inputs=sum(m.in_features for m in adapted), rank_sum=adapter.rank * len(adapted),
        adapted_norms=min(len(on_normed), len(on_hidden)),
        adapts_down=any(m.in_features == width and "attn" not in n for n, m in zip(names, adapted, strict=True)),
    )  # fmt: skip


def _is_out(name: str) -> bool:
    """Whether the linear layer reads attention's output, not a norm's."""
    return name.endswith(("o_proj", "self_attn.dense", "out_proj"))


def path_of(model: Any, adapter: AdapterConfig) -> str:
    """`fused` where metier's own forward and backward compute the layers, else `generic`."""
    return "fused" if adapter.bias == "none" and is_fused_architecture(model.config.get_text_config()) else "generic"


def layer_bytes(shape: Shape, element: int, tokens: int, *, dropout: bool = False) -> float:
    """Bytes that backward needs of one decoder layer, for one pass of `tokens` tokens; `element` bytes a number."""
    saved = SAVED[shape.path]
    norm_input = 4 if saved.norm_input_fp32 and shape.has_rms_norms else element
    key_value = shape.query if saved.repeats_kv else shape.key_value
    multiple = saved.gated_mlp if shape.mlp_is_gated else shape.mlp_saved or saved.plain_mlp
    if shape.path == "generic" and not shape.adapts_down:
        multiple -= 1
    elements = shape.adapted_norms * saved.normed * shape.hidden
    # Query and output, keys and values.
    elements += 2 * (shape.query + key_value)
    elements += multiple * shape.mlp + shape.rank_sum / shape.num_layers
    per_token = elements * element + shape.num_norms * shape.hidden * norm_input + 4 * shape.heads
    if shape.has_qk_norm and saved.norm_input_fp32:
        per_token += 4 * (shape.query + shape.key_value)
    elif shape.has_qk_norm:
        per_token += (shape.query + 2 * shape.key_value) * element
    if dropout and shape.path == "generic":
        per_token += shape.adapted_inputs / shape.num_layers * (element + 1)
    if saved.dense_mask:
        per_token += tokens * element
    return tokens * per_token


def activation_bytes(shape: Shape, element: int, tokens: int, *, recompute: str, dropout: bool = False) -> float:
    """Bytes kept for backward: everything, or with recomputation the layers' inputs and one layer in full.

    The first layer's input needs no gradient, so its norm keeps nothing: the final norm stands for it.
    """
    one = layer_bytes(shape, element, tokens, dropout=dropout)
    gate_up = 2 * shape.mlp * element * tokens
    # A and B, cast to the base's precision for the products.
    copies = shape.adapter_weights * element if shape.path == "generic" else 0
    if recompute == "none":
        return shape.num_layers * one + copies
    if recompute == "mlp" and shape.path == "fused":
        return shape.num_layers * (one - gate_up) + gate_up + copies
    return kept_inputs_bytes(shape, element, tokens) + one + copies / shape.num_layers


def kept_inputs_bytes(shape: Shape, element: int, tokens: int) -> float:
    """Bytes that forward leaves with recomputation: each layer's input, the final norm's, and the shared mask."""
    saved = SAVED[shape.path]
    final = (4 if shape.has_rms_norms else element) if saved.norm_input_fp32 else 0
    mask = tokens if saved.dense_mask else 0
    return tokens * (shape.num_layers * shape.hidden * element + shape.hidden * final + mask)


def loss_bytes(shape: Shape, element: int, loss_tokens: int) -> float:
    """Bytes at the loss: forward's softmax and backward's gradient in fp32, and the logits; or one chunk of them."""
    if SAVED[shape.path].chunked_loss:
        return min(LOSS_CHUNK, loss_tokens) * shape.vocabulary * (element + 4) + loss_tokens * shape.hidden * element
    return loss_tokens * shape.vocabulary * (8 + element)
