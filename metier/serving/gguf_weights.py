"""Merged weights or a LoRA adapter -> a GGUF file that llama.cpp and Ollama load, and an adapter's way back.

The format is GGUF version 3 (ggml's docs/gguf.md); names and rotary layout are llama.cpp's. LLaMA's query and key
rows are permuted: its checkpoints keep the two halves of each rotary pair apart, llama.cpp's `llama` keeps them
side by side. Matrices are stored in the asked form, vectors in fp32; in the 4-bit forms the embeddings and the
output head, which suffer most, are kept in 8 bits.

Limits: LLaMA, Mistral, Qwen2 and Qwen3; rotary scaling of the kinds default, linear and llama3; a whole model's
quantised tensors are held in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from metier.artifacts import disk_errors
from metier.errors import ModelError
from metier.model.lora import PREFIX, Adapter, scaling_of
from metier.model.specialist import Specialist
from metier.serving.gguf_tokenizer import add_tokenizer
from metier.serving.merge import Weight

Array = npt.NDArray[Any]
Q = gguf.GGMLQuantizationType

# transformers' model_type and llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FORMS = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q8_0": Q.Q8_0, "q4_0": Q.Q4_0, "q4_1": Q.Q4_1}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def why_not(config: Any) -> str | None:
    """Why a model of this transformers configuration cannot be written, or None."""
    if config.model_type not in ARCHITECTURES:
        return f"GGUF is written for {', '.join(ARCHITECTURES)}, and the base is a `{config.model_type}`"
    kind = _rope(config)["rope_type"]
    if kind not in ("default", "linear", "llama3"):
        return f"GGUF is written with rotary scaling default, linear or llama3, and the base has `{kind}`"
    if getattr(config, "mlp_bias", False):
        return "the base has bias terms in its MLP, which llama.cpp's files of this kind do not hold"
    return None


def write_model(path: Path, weights: Iterable[Weight], reference: Specialist, *, form: str, name: str) -> int:
    """Writes a whole model with its tokenizer and chat template, and returns the number of tensors.

    `form` is one of `FORMS`. Raises `ModelError` for what cannot be written and `RunError` for a full disk.
    """
    config = reference.base.config
    if reason := why_not(config):
        raise ModelError(reason)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_name(name)
    _add_shape(writer, config)
    add_tokenizer(writer, reference.renderer, config.vocab_size)
    writer.add_file_type(FILE_TYPES[form])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    number = 0
    for weight in weights:
        target = gguf_name(weight.name)
        array = to_llama_cpp(target, weight.value.cpu().numpy(), config)
        _add(writer, target, array, _storage(target, array, form))
        number += 1
    if (factors := rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
        number += 1
    _write(writer, path)
    return number


def write_adapter(path: Path, adapter: Adapter, config: Any, *, name: str) -> int:
    """Writes the adapter alone, its matrices in fp32, and returns the number of tensors. Raises as `write_model`."""
    if reason := why_not(config):
        raise ModelError(reason)
    if adapter.biases:
        raise ModelError("a GGUF adapter holds no bias terms, and this one trained some", hint="write a merged form")
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    # llama.cpp scales by alpha / rank, so rsLoRA's alpha / sqrt(rank) is written as the alpha that gives the same.
    writer.add_float32("adapter.lora.alpha", scaling_of(adapter.config) * adapter.config.rank)
    for module, layer in adapter.layers.items():
        target = gguf_name(f"{module}.weight")
        writer.add_tensor(f"{target}.lora_a", layer.lora_a.detach().float().cpu().numpy())
        rows = to_llama_cpp(target, layer.lora_b.detach().float().cpu().numpy(), config)
        writer.add_tensor(f"{target}.lora_b", rows)
    _write(writer, path)
    return 2 * len(adapter.layers)


def read_adapter(path: Path, config: Any) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of a GGUF adapter under PEFT's names, and its scaling: what llama.cpp would add to the base.

    Raises `ModelError` when the file is no LoRA adapter of this kind of model, or is damaged.
    """
    try:
        reader = gguf.GGUFReader(path)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ModelError(f"`{path}` is no GGUF adapter, or is damaged") from error
    modules = {gguf_name(f"{m}.weight"): m for m in _modules(config)}
    tensors, rank = {}, 0
    for name, array in arrays.items():
        target, _, part = name.rpartition(".")
        if target not in modules or part not in ("lora_a", "lora_b"):
            raise ModelError(f"`{path}` has a tensor `{name}`, which is no part of a LoRA adapter of this model")
        letter = {"lora_a": "A", "lora_b": "B"}[part]
        rank = array.shape[0] if letter == "A" else rank
        rows = array if letter == "A" else from_llama_cpp(target, array, config)
        tensors[f"{PREFIX}{modules[target]}.lora_{letter}.weight"] = torch.from_numpy(rows.copy())
    return tensors, alpha / max(rank, 1)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor. Raises `ModelError` for one that has none."""
    owner, _, kind = name.rpartition(".")
    if owner in OUTER:
        return f"{OUTER[owner]}.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", owner)
    if found is None or found[2] not in LAYER:
        raise ModelError(f"`{name}` has no place in a GGUF file of this kind")
    return f"blk.{found[1]}.{LAYER[found[2]]}.{kind}"


def to_llama_cpp(name: str, array: Array, config: Any) -> Array:
    """Rows [H * 2 * D/2, ...] of queries and keys -> [H * D/2 * 2, ...] in llama.cpp's `llama`; others as they are."""
    heads = _rotary_heads(name, config)
    if heads is None:
        return array
    return np.ascontiguousarray(array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape))


def from_llama_cpp(name: str, array: Array, config: Any) -> Array:
    """The inverse of `to_llama_cpp`."""
    heads = _rotary_heads(name, config)
    if heads is None:
        return array
    return np.ascontiguousarray(array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape))


def rope_factors(config: Any) -> Array | None:
    """What each rotary frequency is divided by under LLaMA 3's scaling, fp32 [D/2]; None for the other kinds.

    The method is LLaMA 3.1's: short wave lengths stay, long ones are divided by `factor`, between them a line.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = _head_size(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)
    factors: Array = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def _add_shape(writer: Any, config: Any) -> None:
    size, rope = _head_size(config), _rope(config)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # llama.cpp's `llama` has no sliding window: within one window the two are the same model.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _storage(name: str, array: Array, form: str) -> Any:
    if array.ndim == 1:
        return Q.F32
    kind = FORMS[form]
    if form.startswith("q4") and name in ("token_embd.weight", "output.weight"):
        kind = Q.Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if array.shape[-1] % block == 0 else Q.F16


def _add(writer: Any, name: str, array: Array, kind: Any) -> None:
    if kind == Q.F16 and float(np.abs(array).max()) > float(np.finfo(np.float16).max):
        raise ModelError(f"`{name}` holds numbers beyond fp16's range", hint="write the bf16 form")
    data = gguf.quants.quantize(np.ascontiguousarray(array, dtype=np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind if data.dtype == np.uint8 else None)


def _write(writer: Any, path: Path) -> None:
    with disk_errors(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    return {"rope_type": "default", "rope_theta": 10_000.0} | rope


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_heads(name: str, config: Any) -> int | None:
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else None


def _modules(config: Any) -> list[str]:
    inner = [f"model.layers.{n}.{module}" for n in range(config.num_hidden_layers) for module in LAYER]
    return [*inner, *OUTER]
