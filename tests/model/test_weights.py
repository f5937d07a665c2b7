"""Tries to make the streaming loader give another model than transformers' own, or hold more than it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from metier.model import weights
from metier.model.load import empty_model, load_base
from tests.model.tiny import KINDS, Kind, save_tiny, tiny_model

CPU = torch.device("cpu")


def ours(folder: Path, dtype: torch.dtype) -> Any:
    return load_base(folder, dtype=dtype, device=CPU, progress=pytest.fail).model


def assert_same(mine: Any, theirs: Any) -> None:
    """Parameters, buffers (the unsaved ones too), ties and configuration are equal bit for bit."""
    for pairs in ("named_parameters", "named_buffers"):
        want = dict(getattr(theirs, pairs)())
        got = dict(getattr(mine, pairs)())
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name], tensor), name
    assert mine.config.to_dict() == theirs.config.to_dict()
    assert mine.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not any(parameter.is_meta for parameter in mine.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_equals_transformers_own_bit_for_bit(
    kind: Kind, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(kind, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pytest.fail)
    mine = ours(tmp_path, dtype)
    assert_same(mine, theirs)
    ids = torch.arange(40).remainder(300)[None]
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


def test_shards_and_their_index_give_the_same_model(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama3")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(set(weights.shard_names(tmp_path).values())) > 3
    assert_same(ours(tmp_path, torch.float32), transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_tied_embeddings_stay_one_tensor(tiny_base: Path) -> None:
    model = ours(tiny_base, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_both_names_of_a_tied_pair_are_left_to_transformers(tmp_path: Path) -> None:
    save_tiny("smollm2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert_same(ours(tmp_path, torch.float32), transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_each_linear_layer_is_replaced_as_soon_as_it_is_loaded(tmp_path: Path) -> None:
    """So that a quantised model never exists in full: at each call, later layers hold no memory yet."""
    save_tiny("qwen2", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = empty_model(config, torch.float32)
    names = weights.shard_names(tmp_path)
    loaded, waiting = [], []

    class Half(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.register_buffer("weight", linear.weight.detach().half())
            self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().half())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x.half(), self.weight, self.bias).float()  # type: ignore[arg-type]

    def replace(name: str, linear: nn.Linear) -> nn.Module | None:
        loaded.append(name)
        waiting.append(sum(p.is_meta for p in model.parameters()))
        return None if name == "lm_head" else Half(linear)

    assert weights.fill(model, names, dtype=torch.float32, device=CPU, replace=replace) == []
    assert len(loaded) == len(set(loaded)) == 2 * 7 + 1
    assert waiting[0] > 15
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {Half}
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(9)[None]).logits).all())


def test_gemma_and_phi_load_as_transformers_loads_them(tmp_path: Path) -> None:
    shape = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    for config in (transformers.Gemma3TextConfig(**shape, head_dim=8), transformers.PhiConfig(**shape)):
        model = transformers.AutoModelForCausalLM.from_config(config)
        folder = tmp_path / config.model_type
        model.save_pretrained(folder)
        tiny_model("qwen2")[1].save_pretrained(folder)
        want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        empty, names = empty_model(transformers.AutoConfig.from_pretrained(folder), torch.float32), {}
        names = weights.shard_names(folder)
        assert weights.can_fill(empty, names, weights.shapes_of(names))
        weights.fill(empty, names, dtype=torch.float32, device=CPU)
        assert_same(empty, want)
