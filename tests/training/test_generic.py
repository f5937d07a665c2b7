"""Tries to make architectures that have no kernels of their own (Gemma 3, Phi, Phi-3) learn otherwise than in PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from typer.testing import CliRunner

from metier import pipeline
from metier.cli import app
from metier.model.fused import fuse
from metier.model.lora import attach
from metier.model.specialist import load
from metier.recipe import AdapterConfig, load_recipe
from metier.training.memory import shape_of
from metier.training.pack import pack_batches
from metier.training.step import accumulate, train_step
from tests.model.tiny import tiny_tokenizer
from tests.training.notes import write_project
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
    # q, k and v are one linear layer, gate and up another.
    "phi3": transformers.Phi3Config(**SHAPE, sliding_window=8),
}  # fmt: skip
LEARNING_RATE, STEPS = 1e-2, 4


def with_peft(
    model: Any, start: dict[str, torch.Tensor], records: list[Any]
) -> tuple[list[float], dict[str, Any], dict[str, torch.Tensor]]:
    """The same steps by PEFT and transformers alone: one record at a time, no packing, torch's AdamW.

    Returns the losses, the adapter, and the first step's gradients.
    """
    config = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config)
    loaded = peft.set_peft_model_state_dict(theirs, start)
    assert not loaded.unexpected_keys
    theirs.train()
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    count = sum(record.num_loss_tokens for record in records)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(STEPS):
        total = 0.0
        for record in records:
            logits = theirs(input_ids=torch.tensor([record.input_ids])).logits[0, :-1]
            loss = F.cross_entropy(logits, torch.tensor(record.labels[1:]), reduction="sum") / count
            loss.backward()
            total += loss.item()
        for key, parameter in theirs.named_parameters():
            if parameter.grad is not None and not losses:
                gradients[key.replace(".default", "")] = parameter.grad.clone()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, peft.get_peft_model_state_dict(theirs), gradients


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
    count = sum(record.num_loss_tokens for record in records)
    for batch in batches:
        accumulate(model, batch, torch.tensor(1 / count))
    gradients = {
        key: parameter.grad.clone() for key, parameter in adapter.parameters.items() if parameter.grad is not None
    }
    model.zero_grad()
    optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=LEARNING_RATE, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = [
        train_step(model, optimizer, batches, learning_rate=LEARNING_RATE, max_grad_norm=1.0, scaler=scaler).loss
        for _ in range(STEPS)
    ]
    want, trained, first = with_peft(original, start, records)
    assert gradients.keys() == first.keys()
    for key, gradient in first.items():
        assert (gradients[key] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, key
    assert losses == pytest.approx(want, rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]
    mine = adapter.tensors()
    assert mine.keys() == trained.keys()
    for key, tensor in trained.items():
        assert (mine[key] - tensor).norm() <= 2e-2 * (tensor - start[key]).norm() + 1e-6, key


RECIPE = """\
base: {base}
out: {out}
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 8, test: 8}}
adapter: {{rank: 4}}
train: {{max_steps: 6, micro_batch_size: 8, learning_rate: 1e-2, log_every: 1, precision: fp32, device: cpu}}
evaluate: {{bootstrap_samples: 100, forgetting: false, memorisation_items: 0}}
"""


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gemma3", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ],
)
def test_a_run_from_end_to_end_gives_an_adapter_that_peft_loads(tmp_path: Path, name: str, targets: list[str]) -> None:
    tokenizer = tiny_tokenizer("chatml")
    config = copy.deepcopy(CONFIGS[name])
    config.update({"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                   "eos_token_id": tokenizer.eos_token_id})  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = write_project(tmp_path, RECIPE.format(base=tmp_path / "base", out=tmp_path / "run"))
    planned = CliRunner().invoke(app, ["plan", str(recipe)])
    assert planned.exit_code == 0, planned.exception
    assert "generic path (transformers' own layers, plain LoRA linears)" in planned.stdout
    pipeline.run(load_recipe(recipe))
    lines = [json.loads(line) for line in (tmp_path / "run" / "adapter" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    assert (tmp_path / "run" / "report.html").exists()
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == targets
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.randint(0, len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()(input_ids=ids).logits
        mine = load(tmp_path / "run", device="cpu").base.model(input_ids=ids).logits
    assert (theirs - plain).abs().max() > 1e-2
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
