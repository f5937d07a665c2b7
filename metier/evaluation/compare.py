"""Is the adapter better than its base? Paired statistics over the same items.

In: metrics as per-item statistics, and the group of each item. Out: for each metric both values, their
difference, 95 % intervals, a p-value, the smallest difference that these items could have shown, and an
outcome in words. Intervals are the paired percentile bootstrap over groups (Efron & Tibshirani, 1993;
Miller, 2024, arXiv 2411.00640). p is McNemar's exact test for right-or-wrong metrics of independent
items, else a paired permutation test that exchanges base and adapter within whole groups. A difference
counts when interval and p agree.

Limits: percentile intervals are too narrow for few groups (below 40). No correction is made for several
metrics: the verdict rests on one, chosen beforehand; slices are corrected (slices.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb
from typing import Any

import numpy as np

from metier.evaluation.metrics import Array, Metric

MIN_ITEMS = 30
MIN_GROUPS = 10
FEW_GROUPS = 40
ALPHA = 0.05
# The sum of the normal quantiles of 97.5 % (two-sided 5 %) and of 80 % (power): Cohen, 1988.
POWER_FACTOR = 1.959964 + 0.841621
# Numbers in one block of resampling weights, or of their sums: 32 MB.
BLOCK = 4_000_000
# Up to so many distinct rows of statistics, resamples are drawn by row (right or wrong has four).
FEW_ROWS = 64
# The permutation test's draws where rows are many: p is known to 0.005 at 0.05.
PERMUTATIONS = 2_000


@dataclass(frozen=True)
class Design:
    """How to compare: resamples, their seed, the smallest difference that matters (0.05: five points), and how
    many items a verdict needs at least."""

    resamples: int
    seed: int
    smallest_effect: float = 0.05
    min_items: int = MIN_ITEMS


def compare(metrics: Sequence[Metric], groups: Sequence[str], design: Design) -> dict[str, dict[str, Any]]:
    """The comparison of base and adapter by each metric.

    `groups` [n] names each item's cluster; all different means independent items. Returns
    {name: {base, adapter, delta, ci95, base_ci95, adapter_ci95, n, num_groups, higher_is_better, p, mde,
    n_needed, outcome}}, and `mcnemar` {won, lost, p} for proportions. `ci95` is that of delta = adapter -
    base; `mde` the smallest difference found with 80 % power at these items' spread, `n_needed` the
    items that would find `design.smallest_effect` (None where a metric has no scale).
    """
    num_groups = len(set(groups))
    results = {}
    drawn = bootstrap(metrics, groups, resamples=design.resamples, seed=design.seed)
    for metric, (base, adapter) in zip(metrics, drawn, strict=True):
        point = [float(metric.value(statistics.sum(0))) for statistics in (metric.base, metric.adapter)]
        result: dict[str, Any] = {
            "base": point[0],
            "adapter": point[1],
            "delta": point[1] - point[0],
            "ci95": interval(adapter - base),
            "base_ci95": interval(base),
            "adapter_ci95": interval(adapter),
            "n": len(groups),
            "num_groups": num_groups,
            "higher_is_better": metric.higher_is_better,
        }
        if metric.is_proportion:
            result["mcnemar"] = _discordant(metric)
        if metric.is_proportion and num_groups == len(groups):
            result["p"] = result["mcnemar"]["p"]
        else:
            result["p"] = permutation(metric, groups, resamples=design.resamples, seed=design.seed)
        result |= power(
            metric, float(np.std(adapter - base)), len(groups), design.smallest_effect,
            is_exact=metric.is_proportion and num_groups == len(groups),
        )  # fmt: skip
        results[metric.name] = {**result, "outcome": outcome(result, metric, design)}
    return results


def bootstrap(
    metrics: Sequence[Metric], groups: Sequence[str], *, resamples: int, seed: int
) -> list[tuple[Array, Array]]:
    """Each metric's value for base and adapter, float64 [resamples], resampling groups with all their items.

    Where a metric's rows are few and repeat (right or wrong), their multinomial counts are drawn: the same
    distribution, hundreds of times faster.
    """
    member = _members(groups)
    found: dict[int, tuple[Array, Array]] = {}
    many: list[int] = []
    for i, metric in enumerate(metrics):
        split = metric.base.shape[1]
        rows, counts = np.unique(_by_group(metric, member), axis=0, return_counts=True)
        if len(rows) > FEW_ROWS:
            many.append(i)
            continue
        generator = np.random.default_rng(seed)
        weights = generator.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
        sums = weights.astype(np.float64) @ rows
        found[i] = (metric.value(sums[:, :split]), metric.value(sums[:, split:]))
    if many:
        drawn = _bootstrap_rows([metrics[i] for i in many], member, resamples, seed)
        found |= dict(zip(many, drawn, strict=True))
    return [found[i] for i in range(len(metrics))]


def permutation(metric: Metric, groups: Sequence[str], *, resamples: int, seed: int) -> float:
    """Two-sided p of the difference, had base and adapter been exchangeable within each group.

    The paired approximate randomisation test (Noreen, 1989), with the observed one counted in.
    """
    split = metric.base.shape[1]
    both = _by_group(metric, _members(groups))
    base, adapter = both[:, :split], both[:, split:]
    rows, counts = np.unique(adapter - base, axis=0, return_counts=True)
    rows, counts = rows[(rows != 0).any(1)], counts[(rows != 0).any(1)]
    total = base.sum(0), adapter.sum(0)
    observed = abs(float(metric.value(total[1]) - metric.value(total[0])))
    if not len(rows):
        return 1.0
    draws = resamples if len(rows) <= FEW_ROWS else min(resamples, PERMUTATIONS)
    generator = np.random.default_rng(seed)
    extreme = 0
    size = max(1, BLOCK // max(rows.shape))
    for start in range(0, draws, size):
        shape = (min(size, draws - start), len(rows))
        moved = generator.binomial(counts, 0.5, size=shape).astype(np.float64) @ rows
        change = np.abs(metric.value(total[1] - moved) - metric.value(total[0] + moved))
        extreme += int((change >= observed - 1e-12).sum())
    return (1 + extreme) / (1 + draws)


def power(
    metric: Metric, standard_error: float, n: int, smallest_effect: float, *, is_exact: bool = False
) -> dict[str, Any]:
    """`mde` and `n_needed`, from the standard error of the difference; squares of errors shrink as 1 / n.

    `is_exact`: p is McNemar's exact one, which asks for one changed answer more than its normal approximation.
    """
    if metric.is_proportion or not standard_error:
        # Without a single changed answer the bootstrap sees no spread; one unseen one may be there.
        standard_error = max(standard_error, (metric.scale or 0.0) * (1 / (n + 1) / n) ** 0.5)
    step = 1.0 if is_exact else 0.0
    mde = POWER_FACTOR * standard_error + step / n
    if metric.scale is None:
        return {"mde": mde, "n_needed": None}
    # effect = spread / sqrt(needed) + step / needed, solved for needed.
    spread, effect = POWER_FACTOR * standard_error * n**0.5, smallest_effect * metric.scale
    needed = ((spread + (spread**2 + 4 * step * effect) ** 0.5) / (2 * effect)) ** 2
    return {"mde": mde, "n_needed": max(MIN_ITEMS, ceil(needed))}


def interval(values: Array) -> list[float]:
    """The 2.5th and 97.5th percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def outcome(result: dict[str, Any], metric: Metric, design: Design) -> str:
    """`better`, `worse`, `no difference shown` or `not enough data`.

    A difference that is not shown is `no difference shown` only where one of `smallest_effect` would
    have been found with 80 % power; else the items were too few to tell.
    """
    n, num_groups = result["n"], result["num_groups"]
    if n < design.min_items or num_groups < min(n, MIN_GROUPS):
        return "not enough data"
    low, high = result["ci95"]
    if result["p"] < ALPHA and not low <= 0 <= high:
        return "better" if (low > 0) == metric.higher_is_better else "worse"
    if metric.scale is not None and result["mde"] > design.smallest_effect * metric.scale:
        return "not enough data"
    return "no difference shown"


def mcnemar(won: int, lost: int) -> float:
    """The two-sided exact p of `won` against `lost` discordant pairs (McNemar, 1947): a fair coin's."""
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / (1 << n))  # of whole numbers: exact, however large they are


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the same order (Holm, 1979): each is at most ALPHA where its test is rejected."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _bootstrap_rows(metrics: Sequence[Metric], member: Any, resamples: int, seed: int) -> list[tuple[Array, Array]]:
    """The bootstrap of metrics whose rows all differ: one matrix product serves all."""
    columns = [statistics for metric in metrics for statistics in (metric.base, metric.adapter)]
    by_group = np.concatenate([_by_group(metric, member) for metric in metrics], axis=1)
    num_groups = len(by_group)
    ends = np.cumsum([c.shape[1] for c in columns])[:-1]
    generator = np.random.default_rng(seed)
    values: list[list[Array]] = [[] for _ in columns]
    rows = max(1, BLOCK // max(by_group.shape))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = generator.integers(0, num_groups, size=(size, num_groups))
        drawn += np.arange(size)[:, None] * num_groups
        weights = np.bincount(drawn.ravel(), minlength=size * num_groups).reshape(size, num_groups)
        for i, sums in enumerate(np.split(weights.astype(np.float64) @ by_group, ends, axis=1)):
            values[i].append(metrics[i // 2].value(sums))
    joined = [np.concatenate(v) for v in values]
    return list(zip(joined[::2], joined[1::2], strict=True))


def _members(groups: Sequence[str]) -> Any:
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _by_group(metric: Metric, member: Any) -> Array:
    """Sums by group of the statistics, base's columns before adapter's."""
    stacked = np.concatenate([metric.base, metric.adapter], axis=1)
    by_group = np.zeros((int(member.max()) + 1, stacked.shape[1]))
    np.add.at(by_group, member, stacked)
    return by_group


def _discordant(metric: Metric) -> dict[str, Any]:
    change = metric.adapter[:, 0] - metric.base[:, 0]
    better = 1 if metric.higher_is_better else -1
    won, lost = int((change == better).sum()), int((change == -better).sum())
    return {"won": won, "lost": lost, "p": mcnemar(won, lost)}
