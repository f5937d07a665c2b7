"""Tries to make a batch answer otherwise than each request alone: mixed adapters, ragged lengths, leavers, crashes."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metier.model.bank import AdapterBank
from metier.model.generate import SamplingParams, generate_ids
from metier.model.lora import load_adapter
from metier.model.score import answer_log_probs
from metier.serving.engine import Engine, Failed, Finished, Generation, PromptLogprobs, Token, Unavailable
from metier.serving.sampling import Sampling
from tests.serving.conftest import load_tiny

NO_STOP: frozenset[int] = frozenset()
Events = queue.Queue[Any]


@pytest.fixture(scope="module")
def bank(tiny_base: Path, adapters: dict[str, Path]) -> AdapterBank:
    bank = AdapterBank(load_tiny(tiny_base))
    for name, folder in adapters.items():
        bank.add(name, folder)
    return bank


@pytest.fixture
def engine(bank: AdapterBank) -> Iterator[Engine]:
    running = Engine(bank, max_rows=6, max_waiting=64).start()
    yield running
    running.close()


def ask(
    engine: Engine, prompt: list[int], adapter: str | None, new: int = 8, sampling: Sampling | None = None, **more: Any
) -> Events:
    events: Events = queue.Queue()
    stop = more.pop("stop", NO_STOP)
    engine.submit(Generation(prompt, adapter, new, stop, sampling or Sampling(), events.put, **more))
    return events


def take(events: Events) -> tuple[list[int], Any]:
    """The tokens, and how it ended."""
    tokens = []
    while True:
        event = events.get(timeout=30)
        if isinstance(event, Token):
            tokens.append(event.id)
        elif isinstance(event, Finished | Failed):
            return tokens, event


def prompts(number: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 300) for _ in range(rng.randrange(1, longest))] for _ in range(number)]


def alone(base_path: Path, adapter: Path | None, prompt: list[int], new: int) -> list[int]:
    base = load_tiny(base_path)
    if adapter is not None:
        load_adapter(base.model, adapter)
    [(_, ids)] = generate_ids(base, [prompt], SamplingParams(new), stop_token_ids=frozenset({0}), batch_size=1)
    return ids


def test_each_of_a_mixed_ragged_batch_equals_its_sequential_greedy_answer(
    engine: Engine, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    jobs = [(p, (None, "red", "blue")[i % 3], 3 + i % 11) for i, p in enumerate(prompts(24))]
    running = [ask(engine, prompt, name, new, stop=frozenset({0})) for prompt, name, new in jobs]
    for events, (prompt, name, new) in zip(running, jobs, strict=True):
        tokens, end = take(events)
        assert tokens == alone(tiny_base, adapters.get(name or ""), prompt, new)
        assert end == Finished("stop" if tokens[-1] == 0 else "length")


def test_the_adapters_and_the_base_differ(engine: Engine) -> None:
    [prompt] = prompts(1, seed=3)
    answers = {tuple(take(ask(engine, prompt, name))[0]) for name in (None, "red", "blue")}
    assert len(answers) == 3


def test_a_prompt_longer_than_a_pass_is_computed_in_pieces_beside_others(
    bank: AdapterBank, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    engine = Engine(bank, max_rows=4)
    engine.max_prefill_tokens = 16
    long, short = [7 + i % 200 for i in range(150)], [9, 8, 7]
    running = [ask(engine.start() if i == 0 else engine, p, "red", 20) for i, p in enumerate((short, long, short))]
    got = [take(events)[0] for events in running]
    engine.close()
    want = alone(tiny_base, adapters["red"], short, 20), alone(tiny_base, adapters["red"], long, 20)
    cut = [w[: w.index(0) + 1] if 0 in w else w for w in want]
    assert got[0][: len(cut[0])] == cut[0] == got[2][: len(cut[0])]
    assert got[1][: len(cut[1])] == cut[1]


def test_who_leaves_early_disturbs_nobody(engine: Engine) -> None:
    jobs = prompts(6, seed=5)
    want = [take(ask(engine, p, "red", 30))[0] for p in jobs]
    generations = []
    running: list[Events] = []
    for prompt in jobs:
        events: Events = queue.Queue()
        running.append(events)
        generations.append(Generation(prompt, "red", 30, NO_STOP, Sampling(), events.put))
    engine.submit(*generations)
    running[0].get(timeout=30)
    for leaver in (0, 3):
        generations[leaver].is_cancelled = True
    for i, events in enumerate(running):
        tokens, end = take(events)
        if i not in (0, 3):
            assert (tokens, end) == (want[i], Finished("length"))


def test_prompt_log_probabilities_equal_a_plain_pass(
    engine: Engine, tiny_base: Path, adapters: dict[str, Path]
) -> None:
    base = load_tiny(tiny_base)
    load_adapter(base.model, adapters["red"])
    jobs = [*prompts(3, seed=6), [5 + i % 250 for i in range(400)]]
    running = [
        ask(engine, p, "red", 1, Sampling(top_logprobs=3), wants_prompt_logprobs=True) for p in jobs if len(p) > 1
    ]
    for prompt, events in zip([p for p in jobs if len(p) > 1], running, strict=True):
        found = events.get(timeout=30)
        assert isinstance(found, PromptLogprobs)
        positions = list(range(1, len(prompt)))
        [want] = answer_log_probs(base, [(prompt, positions)], max_tokens=512, done=lambda n: None)
        np.testing.assert_allclose([t.logprob for t in found.tokens], want, atol=1e-4)
        assert [t.token for t in found.tokens] == prompt[1:]
        assert all(len(t.top) == 3 and t.top[0][1] >= t.logprob for t in found.tokens)


def test_a_seeded_draw_is_the_same_alone_and_in_company(engine: Engine) -> None:
    draw = Sampling(temperature=1.0, top_p=0.9, seed=11)
    first = take(ask(engine, [5, 6, 7], "blue", 12, draw))[0]
    company = [ask(engine, p, None, 12, Sampling(temperature=1.0, seed=i)) for i, p in enumerate(prompts(5, seed=7))]
    again = take(ask(engine, [5, 6, 7], "blue", 12, draw))[0]
    assert [take(events)[1] for events in company] == [Finished("length")] * 5
    assert first == again
    assert take(ask(engine, [5, 6, 7], "blue", 12, Sampling(temperature=1.0, top_p=0.9, seed=12)))[0] != first


def test_nobody_waits_behind_anothers_flood(bank: AdapterBank) -> None:
    engine = Engine(bank, max_rows=2, max_waiting=64)
    order: list[str] = []

    def noted(name: str) -> Any:
        return lambda event: order.append(name) if isinstance(event, Finished) else None

    flood = [Generation([5, 6], "red", 4, NO_STOP, Sampling(), noted("flood")) for _ in range(20)]
    late = Generation([5, 6], "blue", 4, NO_STOP, Sampling(), noted("late"))
    engine.submit(*flood)
    engine.submit(late)
    engine.start().close(drain_seconds=30)
    assert len(order) == 21 and order.index("late") < 4


def test_more_than_may_wait_are_refused_whole(bank: AdapterBank) -> None:
    engine = Engine(bank, max_waiting=3)
    job = [Generation([5], None, 1, NO_STOP, Sampling(), lambda event: None) for _ in range(4)]
    with pytest.raises(Unavailable) as refused:
        engine.submit(*job)
    assert refused.value.is_full and engine.num_waiting == 0


def test_a_crash_fails_those_in_the_pass_and_the_engine_recovers(engine: Engine, monkeypatch: Any, caplog: Any) -> None:
    [prompt] = prompts(1, seed=8)
    want = take(ask(engine, prompt, "red"))
    with monkeypatch.context() as patch:

        def boom(rows: Any) -> None:
            raise RuntimeError("the patient's name")

        patch.setattr(engine.bank, "select", boom)
        assert take(ask(engine, prompt, "red"))[1] == Failed("crash")
    assert take(ask(engine, prompt, "red")) == want
    assert engine.counters.crashes == 1 and not engine.is_down
    assert "RuntimeError" in caplog.text and "patient" not in caplog.text


def test_an_engine_that_fails_every_time_stays_down(bank: AdapterBank, monkeypatch: Any) -> None:
    engine = Engine(bank).start()
    monkeypatch.setattr(engine, "_let_in", lambda: 1 / 0)
    for _ in range(3):
        assert take(ask(engine, [5], None))[1] == Failed("crash")
    engine._supervisor.join(10)
    assert engine.is_down
    with pytest.raises(Unavailable, match="down"):
        ask(engine, [5], None)


def test_a_late_request_ends_at_its_deadline(engine: Engine) -> None:
    assert take(ask(engine, [5], None, deadline=0.0))[1] == Failed("deadline")


def test_memory_goes_back_when_nobody_waits(engine: Engine) -> None:
    for events in [ask(engine, p, None) for p in prompts(6)]:
        take(events)
    take(ask(engine, [5], None, 1))
    engine.close()
    assert engine.cache_bytes == 0


def test_the_bank_leaves_the_base_as_it_was(bank: AdapterBank, tiny_base: Path) -> None:
    bank.select([None])
    with torch.no_grad():
        for ids, atol in ((torch.tensor([[5]]), 0.0), (torch.tensor([[5, 6, 7, 8]]), 1e-5)):
            want = load_tiny(tiny_base).model(ids).logits
            torch.testing.assert_close(bank.base.model(ids).logits, want, atol=atol, rtol=0)
