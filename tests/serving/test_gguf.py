"""Tries to write a GGUF file that llama.cpp would read as another model, or that splits text into other ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, trainers

from metier.errors import ModelError
from metier.model.load import convert_gguf, load_base
from metier.model.lora import attach
from metier.model.specialist import Specialist
from metier.recipe import AdapterConfig
from metier.serving import gguf_weights
from metier.serving.gguf_tokenizer import pre_tokenizer
from metier.serving.merge import Weight, merged_weights
from tests.model.tiny import SENTENCES, Kind, save_tiny, tiny_model

CPU = torch.device("cpu")
TEXT = "Note: a lung, 12345 心 and  two spaces\n\tand a tab é😀"


def specialist(folder: Path, rank: int = 4, use_rslora: bool = False) -> Specialist:
    """The base in `folder` with an adapter of random weights."""
    base = load_base(folder, dtype=torch.float32, device=CPU)
    adapter = attach(base.model, AdapterConfig(rank=rank, alpha=8.0, use_rslora=use_rslora), seed=0)
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    return Specialist(base, adapter)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return found


@pytest.mark.parametrize(("kind", "use_rslora"), [("smollm2", False), ("smollm2", True), ("qwen2", False)])
def test_the_adapter_on_the_base_in_gguf_is_the_adapter(kind: Kind, use_rslora: bool, tmp_path: Path) -> None:
    # As llama.cpp adds it: alpha / rank B A onto the stored rows. The way back is transformers', not ours.
    ours = specialist(save_tiny(kind, tmp_path / "base"), use_rslora=use_rslora)
    assert ours.adapter is not None
    gguf_weights.write_adapter(tmp_path / "adapter.gguf", ours.adapter, ours.base.config, name="x")
    with ours.adapter.off():
        bare = [Weight(w.name, w.value - (0 if w.update is None else w.update), None) for w in merged_weights(ours)]
    gguf_weights.write_model(tmp_path / "base.gguf", bare, ours, form="f32", name="x")
    lora = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    alpha = gguf.GGUFReader(tmp_path / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    reader = gguf.GGUFReader(tmp_path / "base.gguf", "r+")
    for tensor in reader.tensors:
        if f"{tensor.name}.lora_a" in lora:
            a, b = lora[f"{tensor.name}.lora_a"], lora[f"{tensor.name}.lora_b"]
            tensor.data[:] += np.float32(alpha / a.shape[0]) * (b @ a)
    del reader
    convert_gguf(tmp_path / "base.gguf", tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = ours.renderer.encode(TEXT)
    assert torch.allclose(logits(plain, ids), logits(ours.base.model, ids), atol=2e-4)


def sentencepiece_base(folder: Path) -> Path:
    """A tiny LLaMA with a tokenizer like LLaMA 2's: SentencePiece BPE with bytes for what is not in it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=110, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text for text in SENTENCES if text.isascii()], trainer)
    pipeline = json.loads(tokenizer.to_str())
    words = pipeline["model"]["vocab"]
    for number in range(256):
        words[f"<0x{number:02X}>"] = len(words)
    backend = tokenizers.Tokenizer.from_str(json.dumps(pipeline))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template="{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
    )  # fmt: skip
    model, _ = tiny_model("llama2")
    model.resize_token_embeddings(len(fast))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_sentencepiece_vocabulary_gives_the_same_ids(tmp_path: Path) -> None:
    ours = specialist(sentencepiece_base(tmp_path / "base"))
    gguf_weights.write_model(tmp_path / "m.gguf", merged_weights(ours), ours, form="f16", name="x")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "plain")
    theirs = Specialist(load_base(tmp_path / "plain", dtype=torch.float32, device=CPU))
    for text in (*SENTENCES, TEXT):
        assert theirs.renderer.encode(text) == ours.renderer.encode(text), text
    assert theirs.renderer.template == ours.renderer.template


def test_llama_3_rotary_factors_are_transformers_own(tmp_path: Path) -> None:
    model, _ = tiny_model("llama3")
    size, theta = 16, 500_000.0
    plain = 1 / theta ** (torch.arange(0, size, 2).float() / size)
    factors = gguf_weights.rope_factors(model.config)
    assert factors is not None and factors.max() == 8.0
    assert np.allclose(plain.numpy() / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


@pytest.mark.parametrize("form", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_a_stored_form_loses_no_more_than_its_bits(form: str, tmp_path: Path) -> None:
    ours = specialist(save_tiny("smollm2", tmp_path / "base"))
    gguf_weights.write_model(tmp_path / "m.gguf", merged_weights(ours), ours, form=form, name="x")
    lost = {"f16": 5e-4, "bf16": 4e-3, "q8_0": 1e-2, "q4_0": 0.12, "q4_1": 0.12}[form]
    expected = {gguf_weights.gguf_name(w.name): w.value.numpy() for w in merged_weights(ours)}
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = gguf_weights.to_llama_cpp(tensor.name, expected.pop(tensor.name), ours.base.config)
        assert np.linalg.norm(value - wanted) <= lost * np.linalg.norm(wanted), tensor.name
    assert not expected


def test_a_number_beyond_fp16_is_refused(tmp_path: Path) -> None:
    ours = specialist(save_tiny("smollm2", tmp_path / "base"))
    ours.base.model.model.embed_tokens.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match="beyond fp16"):
        gguf_weights.write_model(tmp_path / "m.gguf", merged_weights(ours), ours, form="f16", name="x")


@pytest.mark.parametrize(
    "change",
    [{"model_type": "gpt2"}, {"mlp_bias": True}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}],
)
def test_what_gguf_cannot_say_is_refused(change: dict[str, Any]) -> None:
    config = tiny_model("llama2")[0].config
    for name, value in change.items():
        object.__setattr__(config, name, value)
    assert gguf_weights.why_not(config)


def test_an_unknown_pre_tokenizer_is_refused() -> None:
    steps = [{"type": "Split", "pattern": {"Regex": r"\d+"}}, {"type": "ByteLevel"}]
    pipeline = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": None}
    with pytest.raises(ModelError, match="no pre-tokenizer"):
        pre_tokenizer(pipeline)
