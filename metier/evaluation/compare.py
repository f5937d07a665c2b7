"""Is the adapter better than its base? Paired statistics over the same items.

In: metrics as per-item statistics, and the group of each item. Out: for each metric both values, their
difference, 95 % intervals and an outcome in words. The method is the paired percentile bootstrap,
resampling groups where items share one (Efron & Tibshirani, 1993; Miller, 2024, arXiv 2411.00640), and
for right-or-wrong metrics also McNemar's exact test; a difference counts when both agree.

Limits: percentile intervals are too narrow for few groups (below 40), and McNemar's test takes items
as independent, so with groups it is the weaker of the two conditions. No correction is made for several
metrics: the verdict rests on one, chosen beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

from metier.evaluation.metrics import Array, Metric

MIN_ITEMS = 30
MIN_GROUPS = 10
FEW_GROUPS = 40
# Numbers in one block of resampling weights, or of their sums: 32 MB.
BLOCK = 4_000_000


def compare(
    metrics: Sequence[Metric], groups: Sequence[str], *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The comparison of base and adapter by each metric.

    `groups` [n] names each item's cluster; all different means independent items. Returns
    {name: {base, adapter, delta, ci95, base_ci95, adapter_ci95, n, higher_is_better, outcome}}, and
    `mcnemar` {won, lost, p} for proportions; `ci95` is that of delta = adapter - base.
    """
    num_groups = len(set(groups))
    clustered = num_groups < len(groups)
    results = {}
    for metric, (base, adapter) in zip(
        metrics, bootstrap(metrics, groups, resamples=resamples, seed=seed), strict=True
    ):
        point = [float(metric.value(statistics.sum(0))) for statistics in (metric.base, metric.adapter)]
        result: dict[str, Any] = {
            "base": point[0],
            "adapter": point[1],
            "delta": point[1] - point[0],
            "ci95": interval(adapter - base),
            "base_ci95": interval(base),
            "adapter_ci95": interval(adapter),
            "n": len(groups),
            "higher_is_better": metric.higher_is_better,
        }
        if metric.is_proportion:
            result["mcnemar"] = _discordant(metric)
        enough = len(groups) >= MIN_ITEMS and (not clustered or num_groups >= MIN_GROUPS)
        results[metric.name] = {**result, "outcome": outcome(result) if enough else "not enough data"}
    return results


def bootstrap(
    metrics: Sequence[Metric], groups: Sequence[str], *, resamples: int, seed: int
) -> list[tuple[Array, Array]]:
    """Each metric's value for base and adapter, float64 [resamples], in the same resamples of the groups.

    A resample draws as many groups as there are, with replacement, each with all its items.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(member.max()) + 1
    columns = [statistics for metric in metrics for statistics in (metric.base, metric.adapter)]
    stacked = np.concatenate(columns, axis=1)
    by_group = np.zeros((num_groups, stacked.shape[1]))
    np.add.at(by_group, member, stacked)
    ends = np.cumsum([c.shape[1] for c in columns])[:-1]
    generator = np.random.default_rng(seed)
    values: list[list[Array]] = [[] for _ in columns]
    rows = max(1, BLOCK // max(num_groups, stacked.shape[1]))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = generator.integers(0, num_groups, size=(size, num_groups))
        drawn += np.arange(size)[:, None] * num_groups
        weights = np.bincount(drawn.ravel(), minlength=size * num_groups).reshape(size, num_groups)
        for i, sums in enumerate(np.split(weights.astype(np.float64) @ by_group, ends, axis=1)):
            values[i].append(metrics[i // 2].value(sums))
    joined = [np.concatenate(v) for v in values]
    return list(zip(joined[::2], joined[1::2], strict=True))


def interval(values: Array) -> list[float]:
    """The 2.5th and 97.5th percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def outcome(result: dict[str, Any]) -> str:
    """`better`, `worse` or `no difference shown`, from a difference's interval and McNemar's p, if any."""
    low, high = result["ci95"]
    significant = result.get("mcnemar", {"p": 0.0})["p"] < 0.05
    if not significant or low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == result["higher_is_better"] else "worse"


def mcnemar(won: int, lost: int) -> float:
    """The two-sided exact p of `won` against `lost` discordant pairs (McNemar, 1947): a fair coin's."""
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def _discordant(metric: Metric) -> dict[str, Any]:
    change = metric.adapter[:, 0] - metric.base[:, 0]
    better = 1 if metric.higher_is_better else -1
    won, lost = int((change == better).sum()), int((change == -better).sum())
    return {"won": won, "lost": lost, "p": mcnemar(won, lost)}
