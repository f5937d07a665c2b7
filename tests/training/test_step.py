"""Tries to make a step depend on how it is cut, to let NaN into the weights, or to bend the schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from metier.errors import RunError
from metier.model.fused import fuse
from metier.model.lora import Adapter, attach
from metier.recipe import AdapterConfig, TrainConfig
from metier.training.pack import pack_batches
from metier.training.schedule import learning_rate_at, make_plan, peak_learning_rate, records_of_step
from metier.training.step import StepResult, _update_unseen, mean_loss, train_step
from tests.model.tiny import tiny_model
from tests.training.test_pack import random_records


def one_step(max_tokens: int, max_records: int, *, lr: float = 1e-2, steps: int = 1) -> tuple[Adapter, StepResult]:
    model, _ = tiny_model("llama3")
    adapter = attach(model, AdapterConfig(rank=4), seed=0)
    records = random_records(8, model.config.vocab_size)
    optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=lr)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(steps):
        batches = pack_batches(records, max_tokens, max_records)
        result = train_step(model, optimizer, batches, learning_rate=lr, max_grad_norm=1.0, scaler=scaler)
    return adapter, result


@pytest.mark.parametrize(("max_tokens", "max_records"), [(10_000, 1), (10_000, 4), (40, 8), (1, 8)])
def test_accumulation_1x8_equals_8x1(max_tokens: int, max_records: int) -> None:
    whole, result = one_step(10_000, 8, steps=3)
    cut, cut_result = one_step(max_tokens, max_records, steps=3)
    assert cut_result.loss == pytest.approx(result.loss, rel=1e-5)
    assert cut_result.grad_norm == pytest.approx(result.grad_norm, rel=1e-4)
    assert cut_result.num_loss_tokens == result.num_loss_tokens
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(cut.parameters[name], parameter, atol=1e-4, rtol=1e-3)


def test_the_gradient_is_the_mean_over_unmasked_tokens() -> None:
    model, _ = tiny_model("llama3")
    adapter = attach(model, AdapterConfig(rank=4), seed=0)
    records = random_records(5, model.config.vocab_size)
    optimizer = torch.optim.SGD(list(adapter.parameters.values()), lr=1.0)
    before = adapter.tensors()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train_step(model, optimizer, pack_batches(records, 50, 2), learning_rate=1.0, max_grad_norm=1e9, scaler=scaler)
    moved = {name: before[name] - p.detach() for name, p in adapter.parameters.items()}
    adapter.load(before)
    total = torch.zeros(())
    for record in records:
        logits = model(input_ids=torch.tensor([record.input_ids])).logits[0, :-1]
        labels = torch.tensor(record.labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    (total / sum(r.num_loss_tokens for r in records)).backward()
    for name, parameter in adapter.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(moved[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(poison: float) -> None:
    model, _ = tiny_model("llama3")
    adapter = attach(model, AdapterConfig(rank=4), seed=0)
    optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=1e-2)
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * poison)
    before = adapter.tensors()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = pack_batches(random_records(4, 300), 100, 4)
    result = train_step(model, optimizer, batches, learning_rate=1e-2, max_grad_norm=1.0, scaler=scaler)
    hook.remove()
    assert result.is_skipped
    for name, tensor in adapter.tensors().items():
        assert torch.equal(tensor, before[name])
    assert not optimizer.state


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("poison", [None, "loss", "gradient"])
def test_an_update_that_nobody_waits_for_is_the_plain_one_and_leaves_out_what_is_not_finite(
    device: str, poison: str | None
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = []
    for is_unseen in (False, True):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(5, 7, generator=generator).to(device)) for _ in range(3)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
        for number in range(4):
            for parameter in parameters:
                parameter.grad = 3 * torch.randn(5, 7, generator=generator).to(device)
            loss = torch.tensor(0.5 + number, device=device)
            if number == 2 and poison == "gradient":
                assert parameters[1].grad is not None
                parameters[1].grad[2, 3] = math.inf
            elif number == 2 and poison == "loss":
                loss.fill_(math.nan)
            if is_unseen:
                loss_value, norm = map(float, _update_unseen(optimizer, list(parameters), 1.0, loss))
            else:
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
                loss_value = float(loss)
                if math.isfinite(norm) and math.isfinite(loss_value):
                    optimizer.step()
            assert math.isfinite(norm + loss_value) == (number != 2 or poison is None)
        states = [value for state in optimizer.state.values() for value in state.values()]
        found.append([tensor.detach().clone() for tensor in (*parameters, *states)])
        assert not hasattr(optimizer, "found_inf")
    for plain, unseen in zip(*found, strict=True):
        assert torch.equal(plain, unseen)
    assert float(found[1][3]) == (4 if poison is None else 3)  # the first parameter's count of steps


def test_memory_that_runs_out_once_in_the_update_changes_nothing_and_twice_is_a_sentence() -> None:
    moved = []
    for failures in (0, 1, 2):
        model, _ = tiny_model("llama3")
        adapter = attach(model, AdapterConfig(rank=4), seed=0)
        optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=1e-2, fused=True)
        left = [failures]

        def fail(*_: Any, optimizer: Any = optimizer, left: list[int] = left) -> None:
            if left[0]:
                left[0] -= 1
                first = optimizer.param_groups[0]["params"][0]
                optimizer.state[first]["step"] = torch.zeros(())  # the moments did not fit any more
                raise torch.OutOfMemoryError("planted")

        optimizer.register_step_pre_hook(fail)
        before = adapter.tensors()
        for _ in range(2):
            batches = pack_batches(random_records(6, model.config.vocab_size), 60, 3)
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            if failures == 2:
                with pytest.raises(RunError, match="out of memory in the optimizer's step"):
                    train_step(model, optimizer, batches, learning_rate=1e-2, max_grad_norm=1.0, scaler=scaler)
                break
            train_step(model, optimizer, batches, learning_rate=1e-2, max_grad_norm=1.0, scaler=scaler)
        moved.append(adapter.tensors())
    for name, tensor in moved[0].items():
        assert torch.equal(moved[1][name], tensor)
        assert torch.equal(moved[2][name], before[name])


def test_training_fits_a_handful_of_records() -> None:
    _, first = one_step(10_000, 8)
    _, last = one_step(10_000, 8, lr=1e-2, steps=120)
    assert last.loss < first.loss / 3


def test_mean_loss_is_per_token_and_leaves_the_mode() -> None:
    model, _ = tiny_model("llama3")
    model.train()
    records = random_records(6, model.config.vocab_size)
    assert mean_loss(model, pack_batches(records, 30, 2)) == pytest.approx(
        mean_loss(model, pack_batches(records, 999, 9)), rel=1e-5
    )
    assert model.training


def test_cosine_is_the_formula_exactly() -> None:
    for t in range(100):
        want = 1e-5 + (2e-4 - 1e-5) * (1 + math.cos(math.pi * t / 100)) / 2
        assert learning_rate_at(t, 100, peak=2e-4, minimum=1e-5, warmup_steps=0) == want


def test_warm_up_rises_to_the_peak_and_the_cosine_starts_there() -> None:
    rates = [learning_rate_at(t, 110, peak=1.0, minimum=0.0, warmup_steps=10) for t in range(110)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_the_automatic_rate_falls_with_the_model_s_width() -> None:
    assert peak_learning_rate(TrainConfig(), 4096) == pytest.approx(2.86e-4)
    assert peak_learning_rate(TrainConfig(), 576) == pytest.approx(1.32e-3)
    assert peak_learning_rate(TrainConfig(learning_rate=2e-4), 576) == 2e-4


@pytest.mark.parametrize(
    ("epochs", "records", "max_steps"), [(3, 100, None), (0.5, 33, None), (2, 7, None), (9, 50, 4), (1, 3, 99)]
)
def test_every_epoch_sees_every_record_once(epochs: float, records: int, max_steps: int | None) -> None:
    config = TrainConfig(epochs=epochs, micro_batch_size=4, grad_accum_steps=2, max_steps=max_steps)
    plan = make_plan(config, records, 64, torch.device("cpu"))
    order = [i for step in range(plan.total_steps) for i in records_of_step(plan, 7, step)]
    assert len(order) == plan.total_records
    for start in range(0, len(order) - records + 1, records):
        assert sorted(order[start : start + records]) == list(range(records))
    if max_steps is None:
        assert len(order) == math.ceil(epochs * records)
    assert order != [i for step in range(plan.total_steps) for i in records_of_step(plan, 8, step)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("max_records", [1, 3, 8])
def test_a_weighted_step_is_the_weighted_mean_however_it_is_cut(
    dtype: torch.dtype, is_fused: bool, max_records: int
) -> None:
    model, _ = tiny_model("llama3")
    model = model.to(dtype)
    adapter = attach(model, AdapterConfig(rank=4), seed=0)
    records = [
        dataclasses.replace(record, weight=weight)
        for record, weight in zip(
            random_records(8, model.config.vocab_size), [0.25, 1, 4.5, 1, 1, 0.25, 2, 1], strict=True
        )
    ]
    for parameter in adapter.parameters.values():
        parameter.data = parameter.data.to(dtype) + 0.01
    before = {name: p.detach().clone() for name, p in adapter.parameters.items()}
    total, weight = torch.zeros((), dtype=dtype), 0.0
    for record in records:
        logits = model(input_ids=torch.tensor([record.input_ids])).logits[0, :-1]
        labels = torch.tensor(record.labels[1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        total, weight = total + record.weight * loss, weight + record.weight * record.num_loss_tokens
    (total / weight).backward()
    expected = {name: p.grad for name, p in adapter.parameters.items()}
    for parameter in adapter.parameters.values():
        parameter.grad = None
    trained = fuse(model, adapter) if is_fused else model
    result = train_step(
        trained, torch.optim.SGD(list(adapter.parameters.values()), lr=1.0), pack_batches(records, 999, max_records),
        learning_rate=1.0, max_grad_norm=1e9, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    assert result.loss == pytest.approx(float(total.detach()) / weight, rel=1e-6)
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in adapter.parameters.items()])
    oracle = torch.cat([grad.flatten() for grad in expected.values() if grad is not None])
    assert float((moved - oracle).norm() / oracle.norm()) < (1e-6 if dtype == torch.float64 else 2e-5)
