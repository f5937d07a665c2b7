"""Tries to make the plan differ from the tensors that autograd really keeps, or to choose what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from metier.model.chat import Rendered
from metier.model.load import empty_model
from metier.model.lora import attach
from metier.model.recompute import set_recompute
from metier.recipe import AdapterConfig
from metier.training.memory import activation_bytes, kept_inputs_bytes, shape_of
from metier.training.pack import collate
from metier.training.step import loss_sum

WIDTHS = {"vocab_size": 250, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5,
          "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
          "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "llama2": transformers.LlamaConfig(**WIDTHS | {"num_key_value_heads": 6}),
    "llama3": transformers.LlamaConfig(**WIDTHS),
    "mistral": transformers.MistralConfig(**WIDTHS),
    "qwen2": transformers.Qwen2Config(**WIDTHS),
    "qwen3": transformers.Qwen3Config(**WIDTHS, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(**WIDTHS, head_dim=32),
    "phi": transformers.PhiConfig(**WIDTHS),
    "phi3": transformers.Phi3Config(**WIDTHS),
    "smollm2-135m, 4 layers": transformers.LlamaConfig(
        **WIDTHS | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
                    "num_key_value_heads": 3}
    ),
}  # fmt: skip


def record(length: int) -> Rendered:
    ids = [5 + i % 200 for i in range(length)]
    return Rendered(ids, [-100] * (length - 8) + ids[-8:])


def kept_bytes(config: Any, dtype: torch.dtype, adapter: AdapterConfig, *, recompute: bool = False) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps for one pass, parameters aside, without the loss's own; the tokens."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    attach(model, adapter, seed=0)
    model.train()
    set_recompute(model, recompute)
    batch = collate([record(96), record(64), record(96)])
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # The tensor is held, so that no other is given its address.
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters and tensor.shape[-1:] != (config.vocab_size,):
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum(model, batch)
    return sum(t.untyped_storage().nbytes() for t in kept.values()), batch.num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_activations_are_those_that_autograd_keeps(name: str, dtype: torch.dtype) -> None:
    adapter = AdapterConfig(rank=8)
    counted, tokens = kept_bytes(CONFIGS[name], dtype, adapter)
    shape = shape_of(empty_model(CONFIGS[name], dtype), adapter)
    predicted = activation_bytes(shape, dtype.itemsize, tokens, recompute=False)
    assert predicted == pytest.approx(counted, rel=0.1)


def test_dropout_s_masks_and_few_target_modules_are_counted() -> None:
    for adapter in (
        AdapterConfig(rank=8, dropout=0.1),
        AdapterConfig(rank=64, target_modules=["q_proj", "v_proj"]),
        AdapterConfig(rank=4, target_modules=["down_proj", "o_proj"]),
    ):
        counted, tokens = kept_bytes(CONFIGS["llama3"], torch.bfloat16, adapter)
        shape = shape_of(empty_model(CONFIGS["llama3"], torch.bfloat16), adapter)
        predicted = activation_bytes(shape, 2, tokens, recompute=False, dropout=adapter.dropout > 0)
        assert predicted == pytest.approx(counted, rel=0.1), adapter


def test_recomputation_keeps_the_layers_inputs_alone() -> None:
    adapter = AdapterConfig(rank=8)
    config = CONFIGS["smollm2-135m, 4 layers"]
    counted, tokens = kept_bytes(config, torch.bfloat16, adapter, recompute=True)
    shape = shape_of(empty_model(config, torch.bfloat16), adapter)
    # The one layer in full comes during backward.
    assert kept_inputs_bytes(shape, 2, tokens) == pytest.approx(counted, rel=0.1)
    assert counted < activation_bytes(shape, 2, tokens, recompute=True)
