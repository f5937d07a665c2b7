"""Where is the adapter better or worse? The verdict's metric by label, language, source file and length.

In: the metric's per-item statistics and the items. Out: {slice kind: {name: comparison}}, with p-values
corrected over all slices that have enough items (Holm, 1979): one lucky slice among eighty is no finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from metier.evaluation.compare import ALPHA, Design, compare, holm
from metier.evaluation.items import Item
from metier.evaluation.metrics import Metric

RESAMPLES = 2_000
LENGTHS = ("short", "medium", "long")
KEPT = ("n", "base", "adapter", "delta", "ci95", "p", "outcome")


def slices(metric: Metric, items: list[Item], design: Design) -> dict[str, dict[str, dict[str, Any]]]:
    """{`label`, `language`, `source`, `length`: {name: {n, base, adapter, delta, ci95, p, p_holm, outcome}}}."""
    thirds = np.percentile([_length(i) for i in items], [100 / 3, 200 / 3])
    by: dict[str, Callable[[Item], str | None]] = {
        "label": lambda i: i.label,
        "language": lambda i: i.language,
        "source": lambda i: i.source_file or None,
        "length": lambda i: LENGTHS[int(np.searchsorted(thirds, _length(i)))],
    }
    small = replace(design, resamples=min(design.resamples, RESAMPLES))
    found = {kind: _by(metric, items, name_of, small) for kind, name_of in by.items()}
    _correct([result for results in found.values() for result in results.values()])
    return found


def select(metric: Metric, places: list[int]) -> Metric:
    """The same metric of some of the items."""
    return replace(metric, base=metric.base[places], adapter=metric.adapter[places])


def _by(
    metric: Metric, items: list[Item], name_of: Callable[[Item], str | None], design: Design
) -> dict[str, dict[str, Any]]:
    places: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        name = name_of(item)
        if name is not None:
            places.setdefault(name, []).append(i)
    results = {}
    for name in sorted(places, key=lambda n: (LENGTHS.index(n) if n in LENGTHS else 0, n)):
        chosen = places[name]
        result = compare([select(metric, chosen)], [items[i].group for i in chosen], design)[metric.name]
        results[name] = {key: result[key] for key in KEPT}
    return results


def _correct(results: list[dict[str, Any]]) -> None:
    """Adds `p_holm` to each, and takes back what does not hold after the correction."""
    tested = [r for r in results if r["outcome"] != "not enough data"]
    for result, p in zip(tested, holm([r["p"] for r in tested]), strict=True):
        result["p_holm"] = p
        if p >= ALPHA and result["outcome"] in ("better", "worse"):
            result["outcome"] = "no difference shown"
    for result in results:
        result.setdefault("p_holm", None)


def _length(item: Item) -> int:
    return len(item.prompt_text)
