"""Tries to make the statistics claim a difference that is not there, or intervals that miss the truth."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.stats import binomtest

from metier.evaluation import metrics
from metier.evaluation.compare import Design, bootstrap, compare, holm, interval, mcnemar, permutation, power
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
        low, high = compare([accuracy(base, adapter)], alone(150), Design(500, 0))["accuracy"]["ci95"]
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
            low, high = compare([accuracy(base, adapter)], cluster, Design(300, 0))["accuracy"]["ci95"]
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
        low, high = compare([metric], alone(100), Design(400, 0))["p"]["ci95"]
        covered += low <= np.exp(1.5) - np.exp(2.0) <= high
    assert 0.90 <= covered / SIMULATIONS <= 0.99


@pytest.mark.parametrize("rate", [0.03, 0.5])
def test_equal_models_are_mostly_not_told_apart(rate: float) -> None:
    generator = np.random.default_rng(3)
    outcomes = []
    for _ in range(SIMULATIONS):
        base, adapter = generator.random(100) < rate, generator.random(100) < rate
        outcomes.append(compare([accuracy(base, adapter)], alone(100), Design(300, 0))["accuracy"]["outcome"])
    assert sum(o in ("better", "worse") for o in outcomes) / SIMULATIONS <= 0.06


def test_four_lucky_hits_of_thirty_are_no_proof() -> None:
    base, adapter = np.zeros(30), np.arange(30) < 4
    result = compare([accuracy(base, adapter)], alone(30), Design(10_000, 0))["accuracy"]
    assert result["ci95"][0] > 0
    assert result["mcnemar"] == {"won": 4, "lost": 0, "p": 0.125}
    assert result["outcome"] == "not enough data"


def test_direction_follows_the_metric() -> None:
    tokens, noise = np.full(50, 10.0), np.random.default_rng(4).normal(0, 1, 50)
    low, high = (np.stack([mean * tokens + noise, tokens], 1) for mean in (1.0, 2.0))
    for base, adapter, expected in ((high, low, "better"), (low, high, "worse"), (low, low, "no difference shown")):
        metric = Metric("perplexity", base, adapter, metrics.perplexity, higher_is_better=False)
        assert compare([metric], alone(50), Design(200, 0))["perplexity"]["outcome"] == expected
    fewer = metrics.proportion("invalid_share", np.ones(50, bool), np.zeros(50, bool), up=False)
    result = compare([fewer], alone(50), Design(200, 0))["invalid_share"]
    assert (result["outcome"], result["mcnemar"]["won"]) == ("better", 50)


@pytest.mark.parametrize(
    ("groups", "enough"),
    [(alone(29), False), (alone(30), True), ([f"g{i % 9}" for i in range(90)], False),
     ([f"g{i % 10}" for i in range(90)], True)],
)  # fmt: skip
def test_small_test_sets_get_no_verdict(groups: list[str], enough: bool) -> None:
    metric = accuracy(np.zeros(len(groups)), np.ones(len(groups)))
    outcome = compare([metric], groups, Design(100, 0))["accuracy"]["outcome"]
    assert outcome == ("better" if enough else "not enough data")


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 5), (12, 3), (0, 9), (400, 350)])
def test_mcnemar_equals_scipys_binomial_test(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected)


def test_mcnemar_of_thousands_of_pairs_is_a_number() -> None:
    assert mcnemar(6000, 5000) < 1e-15
    assert mcnemar(5500, 5500) == 1.0


def test_bootstrap_equals_resampling_one_by_one() -> None:
    generator = np.random.default_rng(5)
    base, adapter = generator.random(40) < 0.5, generator.random(40) < 0.6
    ((values, _),) = bootstrap([accuracy(base, adapter)], alone(40), resamples=4000, seed=0)
    plain = [base[generator.integers(0, 40, 40)].mean() for _ in range(4000)]
    assert values.mean() == pytest.approx(np.mean(plain), abs=0.01)
    assert interval(values) == pytest.approx(interval(np.array(plain)), abs=0.03)


def noisy(n: int, seed: int = 8) -> Metric:
    """A metric whose rows all differ, which takes the other way through the bootstrap."""
    generator = np.random.default_rng(seed)
    sides = [np.stack([generator.normal(0.5, 0.2, n), np.ones(n)], 1) for _ in range(2)]
    return Metric("score", sides[0], sides[1], metrics.mean, scale=1.0)


def test_resamples_in_blocks_equal_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = noisy(100)
    (whole,) = bootstrap([metric], alone(100), resamples=90, seed=7)
    monkeypatch.setattr("metier.evaluation.compare.BLOCK", 1000)
    (blocks,) = bootstrap([metric], alone(100), resamples=90, seed=7)
    assert np.array_equal(whole[0], blocks[0])
    assert np.array_equal(whole[1], blocks[1])


def test_drawing_by_row_equals_drawing_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(9)
    metric = accuracy(generator.random(200) < 0.5, generator.random(200) < 0.6)
    (fast,) = bootstrap([metric], alone(200), resamples=4000, seed=0)
    monkeypatch.setattr("metier.evaluation.compare.FEW_ROWS", 0)
    (slow,) = bootstrap([metric], alone(200), resamples=4000, seed=0)
    assert interval(fast[1] - fast[0]) == pytest.approx(interval(slow[1] - slow[0]), abs=0.01)


def test_permutation_equals_mcnemar_for_independent_items() -> None:
    metric = accuracy(np.arange(120) % 3 == 0, np.arange(120) % 5 > 1)
    exact = compare([metric], alone(120), Design(200, 0))["accuracy"]["mcnemar"]["p"]
    assert permutation(metric, alone(120), resamples=20_000, seed=0) == pytest.approx(exact, abs=0.01)


def test_permutation_of_a_metric_that_is_no_mean_finds_what_is_there() -> None:
    tokens, noise = np.full(60, 10.0), np.random.default_rng(4).normal(0, 2, (2, 60))
    sides = [np.stack([mean * tokens + n, tokens], 1) for mean, n in zip((1.0, 1.4), noise, strict=True)]
    metric = Metric("perplexity", sides[0], sides[1], metrics.perplexity, higher_is_better=False)
    assert permutation(metric, alone(60), resamples=2000, seed=0) < 0.001
    same = Metric("perplexity", sides[0], sides[0], metrics.perplexity, higher_is_better=False)
    assert permutation(same, alone(60), resamples=200, seed=0) == 1.0


def test_permutation_exchanges_whole_groups() -> None:
    # Ten groups of twenty that agree within: ten coin flips, not two hundred.
    sign = np.repeat([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 20).astype(bool)
    metric = accuracy(~sign, sign)
    groups = [f"g{i // 20}" for i in range(200)]
    assert permutation(metric, groups, resamples=20_000, seed=0) == pytest.approx(binomtest(8, 10).pvalue, abs=0.02)
    assert compare([metric], groups, Design(500, 0))["accuracy"]["outcome"] == "not enough data"


def test_smallest_difference_shrinks_with_the_square_root_of_n() -> None:
    generator = np.random.default_rng(10)
    found = []
    for n in (200, 800):
        metric = accuracy(generator.random(n) < 0.5, generator.random(n) < 0.5)
        found.append(compare([metric], alone(n), Design(4000, 0))["accuracy"])
    assert found[0]["mde"] / found[1]["mde"] == pytest.approx(2, rel=0.1)
    # Independent coins: 2.8 x sqrt(0.5 / n).
    assert found[1]["mde"] == pytest.approx(2.80158 * (0.5 / 800) ** 0.5 + 1 / 800, rel=0.05)
    # So many would just find five points.
    spread = 2.80158 * (0.5**0.5)
    needed = found[1]["n_needed"]
    assert spread / needed**0.5 + 1 / needed == pytest.approx(0.05, rel=0.05)


def test_forty_equal_answers_do_not_show_that_there_is_no_difference_by_any_metric() -> None:
    truth = ["a", "b"] * 20
    same = metrics.f1_statistics(truth, truth)
    macro = Metric("macro_f1", same, same, metrics.macro_f1, scale=1.0)
    right = np.ones(40, dtype=bool)
    found = compare([accuracy(right, right), macro], alone(40), Design(200, 0))
    assert {r["outcome"] for r in found.values()} == {"not enough data"}


@pytest.mark.parametrize("changed", [0.1, 0.25, 0.4])
def test_as_many_items_as_are_said_to_be_needed_find_the_difference(changed: float) -> None:
    gain, generator = 0.05, np.random.default_rng(3)
    some = accuracy(np.zeros(1, dtype=bool), np.zeros(1, dtype=bool))
    needed = power(some, ((changed - gain**2) / 300) ** 0.5, 300, gain, is_exact=True)["n_needed"]
    shares = [(changed + gain) / 2, (changed - gain) / 2, 1 - changed]
    draws = generator.multinomial(needed, shares, size=2_000)
    found = np.mean([won > lost and mcnemar(int(won), int(lost)) < 0.05 for won, lost, _ in draws])
    assert 0.78 < found < 0.84


def test_null_result_is_no_difference_only_where_one_would_have_been_seen() -> None:
    pattern = np.arange(4000) % 2 == 0
    flipped = pattern ^ (np.arange(4000) % 5 == 0)
    for n, expected in ((100, "not enough data"), (4000, "no difference shown")):
        metric = accuracy(pattern[:n], flipped[:n])
        assert compare([metric], alone(n), Design(500, 0))["accuracy"]["outcome"] == expected
    identical = compare([accuracy(pattern[:40], pattern[:40])], alone(40), Design(500, 0))["accuracy"]
    assert identical["outcome"] == "not enough data"  # one unseen change in 40 would be more than two points


def test_holm_equals_the_published_example() -> None:
    # Holm (1979): multiply by the number of hypotheses that are left, and never go down.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_ten_thousand_resamples_of_a_thousand_items_are_quick() -> None:
    generator = np.random.default_rng(6)
    right = [accuracy(generator.random(1000) < 0.5, generator.random(1000) < 0.6)]
    started = time.process_time()
    compare(right, alone(1000), Design(10_000, 0))
    # A second on an idle core; the machine may be busy.
    assert time.process_time() - started < 4
