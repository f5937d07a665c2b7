"""Tries to break on a GPU what holds on a CPU: packing, the loss, fp16's scaler, scores, and resuming."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from metier.model.load import load_base
from metier.model.lora import attach
from metier.model.specialist import Specialist
from metier.recipe import AdapterConfig
from metier.training.pack import collate, pack_batches
from metier.training.step import loss_sum, train_step
from tests.model.tiny import KINDS, Kind, save_tiny, tiny_model
from tests.training.test_pack import random_records

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_equal_unpacked_on_the_gpu(kind: Kind) -> None:
    model = tiny_model(kind)[0].to(CUDA)
    records = random_records(7, model.config.vocab_size)
    batch = collate(records).to(CUDA)
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
        apart = torch.cat([model(input_ids=torch.tensor([r.input_ids], device=CUDA)).logits[0] for r in records])
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_adapter_gradients_equal_the_cpu_s(kind: Kind) -> None:
    results = []
    for device in (torch.device("cpu"), CUDA):
        model = tiny_model(kind)[0].to(device)
        adapter = attach(model, AdapterConfig(rank=4), seed=0)
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.lora_b += 0.05
        loss = loss_sum(model, collate(random_records(5, model.config.vocab_size)).to(device))
        loss.backward()
        results.append(
            (float(loss.detach()), {n: p.grad.cpu() for n, p in adapter.parameters.items() if p.grad is not None})
        )
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for name, want in results[0][1].items():
        assert (results[1][1][name] - want).norm() <= 1e-3 * want.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_learn_what_fp32_learns(dtype: torch.dtype) -> None:
    losses = {}
    for precision in (torch.float32, dtype):
        model = copy.deepcopy(tiny_model("llama3")[0]).to(CUDA, precision)
        adapter = attach(model, AdapterConfig(rank=8), seed=0)
        optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16)
        batches = [b.to(CUDA) for b in pack_batches(random_records(8, model.config.vocab_size), 100, 8)]
        skipped = 0
        for _ in range(60):
            result = train_step(model, optimizer, batches, learning_rate=1e-2, max_grad_norm=1.0, scaler=scaler)
            skipped += result.is_skipped
        assert skipped < 20
        losses[precision] = result.loss
    assert losses[dtype] == pytest.approx(losses[torch.float32], abs=0.35)


def test_scores_on_the_gpu_equal_the_cpu_s(tmp_path: Any) -> None:
    save_tiny("smollm2", tmp_path)
    prompts, choices = ["What is 流感?", "a"], ["Respiratory", "Injury", "行政法"]
    scores = [
        Specialist(load_base(tmp_path, dtype=torch.float32, device=device)).score_choices(prompts, choices)
        for device in (torch.device("cpu"), CUDA)
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)
