"""Tries to make architectures that have no kernels of their own (Gemma 3, Phi) learn otherwise than under PEFT."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from metier.model.fused import fuse
from metier.model.lora import attach
from metier.recipe import AdapterConfig
from metier.training.memory import shape_of
from metier.training.pack import pack_batches
from metier.training.step import train_step
from tests.training.test_pack import random_records

SHAPE = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
# A window shorter than the records, and one layer in three that sees everything.
CONFIGS = {
    "gemma3": transformers.Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi": transformers.PhiConfig(**SHAPE),
}  # fmt: skip
LEARNING_RATE, STEPS = 1e-2, 4


def with_peft(model: Any, start: dict[str, torch.Tensor], records: list[Any]) -> tuple[list[float], dict[str, Any]]:
    """The same steps by PEFT and transformers alone: one record at a time, no packing, torch's AdamW."""
    config = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config)
    loaded = peft.set_peft_model_state_dict(theirs, start)
    assert not loaded.unexpected_keys
    theirs.train()
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    count = sum(record.num_loss_tokens for record in records)
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for record in records:
            logits = theirs(input_ids=torch.tensor([record.input_ids])).logits[0, :-1]
            loss = F.cross_entropy(logits, torch.tensor(record.labels[1:]), reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, peft.get_peft_model_state_dict(theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_generic_path_learns_what_peft_learns(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    original = copy.deepcopy(model)
    config = AdapterConfig(rank=4)
    assert shape_of(model, config).path == "generic"
    adapter = attach(model, config, seed=0)
    assert fuse(model, adapter) is None
    start = adapter.tensors()
    records = random_records(9, CONFIGS[name].vocab_size)
    assert max(record.num_tokens for record in records) > 16
    batches = pack_batches(records, 64, 4)
    assert 1 < len(batches) < 9
    model.train()
    optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=LEARNING_RATE, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = [
        train_step(model, optimizer, batches, learning_rate=LEARNING_RATE, max_grad_norm=1.0, scaler=scaler).loss
        for _ in range(STEPS)
    ]
    want, trained = with_peft(original, start, records)
    assert losses == pytest.approx(want, rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]
    mine = adapter.tensors()
    assert mine.keys() == trained.keys()
    for key, tensor in trained.items():
        assert (mine[key] - tensor).norm() <= 2e-2 * (tensor - start[key]).norm() + 1e-6, key
