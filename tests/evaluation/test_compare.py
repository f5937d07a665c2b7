"""Tries to make the statistics claim a difference that is not there, or intervals that miss the truth."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.stats import binomtest

from metier.evaluation import metrics
from metier.evaluation.compare import bootstrap, compare, interval, mcnemar
from metier.evaluation.metrics import Metric

SIMULATIONS = 200


def accuracy(base: np.ndarray, adapter: np.ndarray) -> Metric:
    return metrics.proportion("accuracy", base.astype(bool), adapter.astype(bool))


def alone(n: int) -> list[str]:
    return [f"record {i}" for i in range(n)]


def test_intervals_cover_the_true_difference_of_independent_items() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(SIMULATIONS):
        base, adapter = generator.random(150) < 0.5, generator.random(150) < 0.7
        low, high = compare([accuracy(base, adapter)], alone(150), resamples=500, seed=0)["accuracy"]["ci95"]
        covered += low <= 0.2 <= high
    assert 0.90 <= covered / SIMULATIONS <= 0.99


def test_intervals_of_clustered_items_cover_where_item_intervals_do_not() -> None:
    generator = np.random.default_rng(1)
    groups = [f"group {g}" for g in range(40) for _ in range(15)]
    covered = {"clustered": 0, "naive": 0}
    for _ in range(SIMULATIONS):
        # The adapter helps some groups and harms others: 0.1 on average.
        shift = np.repeat(generator.normal(0.1, 0.2, 40), 15)
        base, adapter = generator.random(600) < 0.4, generator.random(600) < np.clip(0.4 + shift, 0, 1)
        for name, cluster in (("clustered", groups), ("naive", alone(600))):
            low, high = compare([accuracy(base, adapter)], cluster, resamples=300, seed=0)["accuracy"]["ci95"]
            covered[name] += low <= 0.1 <= high
    assert 0.89 <= covered["clustered"] / SIMULATIONS <= 0.99
    assert covered["naive"] / SIMULATIONS < 0.88


def test_intervals_of_perplexity_cover_the_true_ratio() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(SIMULATIONS):
        tokens = generator.integers(1, 20, 100).astype(float)
        nll = [tokens * mean + generator.normal(0, 1, 100) * np.sqrt(tokens) for mean in (2.0, 1.5)]
        metric = Metric("p", *(np.stack([x, tokens], 1) for x in nll), metrics.perplexity, higher_is_better=False)
        low, high = compare([metric], alone(100), resamples=400, seed=0)["p"]["ci95"]
        covered += low <= np.exp(1.5) - np.exp(2.0) <= high
    assert 0.90 <= covered / SIMULATIONS <= 0.99


@pytest.mark.parametrize("rate", [0.03, 0.5])
def test_equal_models_are_mostly_not_told_apart(rate: float) -> None:
    generator = np.random.default_rng(3)
    outcomes = []
    for _ in range(SIMULATIONS):
        base, adapter = generator.random(100) < rate, generator.random(100) < rate
        outcomes.append(compare([accuracy(base, adapter)], alone(100), resamples=300, seed=0)["accuracy"]["outcome"])
    assert outcomes.count("no difference shown") / SIMULATIONS >= 0.94


def test_four_lucky_hits_of_thirty_are_no_proof() -> None:
    base, adapter = np.zeros(30), np.arange(30) < 4
    result = compare([accuracy(base, adapter)], alone(30), resamples=10_000, seed=0)["accuracy"]
    assert result["ci95"][0] > 0
    assert result["mcnemar"] == {"won": 4, "lost": 0, "p": 0.125}
    assert result["outcome"] == "no difference shown"


def test_direction_follows_the_metric() -> None:
    tokens, noise = np.full(50, 10.0), np.random.default_rng(4).normal(0, 1, 50)
    low, high = (np.stack([mean * tokens + noise, tokens], 1) for mean in (1.0, 2.0))
    for base, adapter, expected in ((high, low, "better"), (low, high, "worse"), (low, low, "no difference shown")):
        metric = Metric("perplexity", base, adapter, metrics.perplexity, higher_is_better=False)
        assert compare([metric], alone(50), resamples=200, seed=0)["perplexity"]["outcome"] == expected
    fewer = metrics.proportion("invalid_share", np.ones(50, bool), np.zeros(50, bool), up=False)
    result = compare([fewer], alone(50), resamples=200, seed=0)["invalid_share"]
    assert (result["outcome"], result["mcnemar"]["won"]) == ("better", 50)


@pytest.mark.parametrize(
    ("groups", "enough"),
    [(alone(29), False), (alone(30), True), ([f"g{i % 9}" for i in range(90)], False),
     ([f"g{i % 10}" for i in range(90)], True)],
)  # fmt: skip
def test_small_test_sets_get_no_verdict(groups: list[str], enough: bool) -> None:
    metric = accuracy(np.zeros(len(groups)), np.ones(len(groups)))
    outcome = compare([metric], groups, resamples=100, seed=0)["accuracy"]["outcome"]
    assert outcome == ("better" if enough else "not enough data")


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (12, 3), (0, 9), (400, 350)])
def test_mcnemar_equals_scipys_binomial_test(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected)


def test_bootstrap_equals_resampling_one_by_one() -> None:
    generator = np.random.default_rng(5)
    base, adapter = generator.random(40) < 0.5, generator.random(40) < 0.6
    ((values, _),) = bootstrap([accuracy(base, adapter)], alone(40), resamples=4000, seed=0)
    plain = [base[generator.integers(0, 40, 40)].mean() for _ in range(4000)]
    assert values.mean() == pytest.approx(np.mean(plain), abs=0.01)
    assert interval(values) == pytest.approx(interval(np.array(plain)), abs=0.03)


def test_resamples_in_blocks_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = accuracy(np.arange(50) % 2, np.arange(50) % 3 == 0)
    (whole,) = bootstrap([metric], alone(50), resamples=90, seed=7)
    monkeypatch.setattr("metier.evaluation.compare.BLOCK", 1000)
    (blocks,) = bootstrap([metric], alone(50), resamples=90, seed=7)
    assert np.array_equal(whole[0], blocks[0])
    assert np.array_equal(whole[1], blocks[1])


def test_ten_thousand_resamples_of_a_thousand_items_are_quick() -> None:
    generator = np.random.default_rng(6)
    right = [accuracy(generator.random(1000) < 0.5, generator.random(1000) < 0.6)]
    started = time.process_time()
    compare(right, alone(1000), resamples=10_000, seed=0)
    # A second on an idle core; the machine may be busy.
    assert time.process_time() - started < 4
