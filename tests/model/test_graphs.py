"""Tries to make a bucket's padding change a pass: its loss, a gradient, or a record's neighbours."""

from __future__ import annotations

import pytest
import torch

from metier.kernels.attention import Documents
from metier.model.graphs import GraphedPasses, _Recorded, padded_inputs
from metier.training.pack import pack_batches
from tests.model.test_fused import fused_of, gradients, with_adapter
from tests.training.test_pack import random_records


@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_padded_pass_has_the_loss_and_the_gradients_of_the_plain_one(count: int) -> None:
    model, adapter = with_adapter("smollm2", torch.float64)
    (batch,) = pack_batches(random_records(count, model.config.vocab_size), 10_000, 99)
    fused = fused_of(model, adapter)
    want, want_grads = gradients(fused, adapter, batch)
    passes = GraphedPasses(fused, list(adapter.parameters.values()))
    bucket = passes.bucket(batch)
    inputs = padded_inputs(batch, bucket)
    assert inputs["input_ids"].shape == (1, bucket.num_tokens) == inputs["position_ids"].shape
    assert bucket.num_tokens % 128 == 0 and sum(bucket.lengths) == bucket.num_tokens
    assert inputs["cu_seqlens"].tolist()[-1] == bucket.num_tokens
    for parameter in adapter.parameters.values():
        parameter.grad = None
    documents = Documents.of(bucket.lengths, torch.device("cpu"), is_flash=False)
    loss = fused.losses_of(inputs, documents, None).sum()
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(float(want), rel=1e-9)
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, want_grads[name], rtol=1e-7, atol=1e-9)


def test_buckets_are_few_and_waste_an_eighth_at_most() -> None:
    model, adapter = with_adapter("smollm2", torch.float32)
    passes = GraphedPasses(fused_of(model, adapter), [])
    keys = set()
    for seed in range(60):
        (batch,) = pack_batches(random_records(90, model.config.vocab_size, seed), 10_000, 999)
        bucket = passes.bucket(batch)
        keys.add(bucket.key)
        assert batch.num_tokens <= bucket.num_tokens <= batch.num_tokens * 9 / 8 + 128
        assert bucket.num_positions >= batch.num_loss_tokens
    assert len(keys) <= 12


def test_only_what_is_recorded_is_given_up() -> None:
    model, adapter = with_adapter("smollm2", torch.float32)
    passes = GraphedPasses(fused_of(model, adapter), [])
    limit = passes.max_graphs
    assert not passes.give_up() and passes.max_graphs == limit
    passes.recorded[(1,)] = _Recorded(None, {}, torch.zeros(1))  # type: ignore[arg-type]
    assert passes.give_up() and not passes.recorded and passes.max_graphs == 0
