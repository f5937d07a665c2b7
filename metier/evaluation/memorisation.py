"""What did training leave in the model's memory? Canaries, membership, and test items that were trained on.

In: likelihoods of planted secrets, of training and of test records; prompts. Out: exposure in bits by how often
a secret was seen, the AUC of telling training records from others, and repeats of test prompts in training.

Exposure is that of Carlini et al. (2019): log2 of the number of candidates over the secret's rank among them;
all 1,000 candidates are ranked, so nothing is estimated, and a secret never seen has 1.44 bits on average.
Membership is scored by how much likelier training made a record, per token (loss ratio; arXiv 2402.17012).

Limits: membership against test records also sees any difference between the splits; the control, which uses
the base alone, shows how much of it is that. A low exposure of random digits does not show that other text is safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metier.evaluation.compare import interval
from metier.evaluation.items import Item
from metier.evaluation.metrics import normalise

Array = npt.NDArray[np.float64]

SHINGLE = 5
NEAR = 0.8
RESAMPLES = 1_000


def exposure(ranks: Sequence[int], candidates: int) -> Array:
    """log2(candidates) - log2(rank), in bits; rank 1 is the likeliest."""
    return np.asarray(np.log2(candidates) - np.log2(np.asarray(ranks, dtype=np.float64)))


def canary_exposure(repeats: Sequence[int], ranks: Sequence[int], *, candidates: int, seed: int) -> dict[str, Any]:
    """{repeats: {n, bits, ci95}}: the mean exposure of the canaries planted so often, by bootstrap over canaries."""
    bits = exposure(ranks, candidates)
    found = {}
    for times in sorted(set(repeats)):
        mine = bits[np.asarray(repeats) == times]
        drawn = np.random.default_rng(seed).integers(0, len(mine), size=(RESAMPLES, len(mine)))
        found[str(times)] = {"n": len(mine), "bits": float(mine.mean()), "ci95": interval(mine[drawn].mean(axis=1))}
    return found


def membership(
    members: tuple[Array, Sequence[str]], others: tuple[Array, Sequence[str]], *, seed: int
) -> dict[str, Any]:
    """{auc, ci95, tpr_at_fpr01}: how well a score tells `members` from `others`, each (scores, groups).

    0.5 is chance. The interval resamples groups; the true positive rate is at 1 % false positives.
    """
    generator = np.random.default_rng(seed)
    draws = [_group_draws(groups, generator) for _, groups in (members, others)]
    values = [auc(members[0][a], others[0][b]) for a, b in zip(*draws, strict=True)]
    threshold = np.quantile(others[0], 0.99, method="higher")
    return {
        "auc": auc(members[0], others[0]),
        "ci95": interval(np.array(values)),
        "tpr_at_fpr01": float((members[0] > threshold).mean()),
    }


def auc(members: Array, others: Array) -> float:
    """P(member's score > other's) + P(equal) / 2: the area under the ROC curve (Mann & Whitney, 1947)."""
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + up_to).mean() / 2 / len(others))


def repeats_in_train(items: Sequence[Item], train: Sequence[Item]) -> dict[str, list[str]]:
    """record_ids of the items whose prompt stands in training: `exact`, `normalised`, or `near` (each list holds
    the former): at least 80 % of their 5-character shingles in common (Jaccard), normalised."""
    exact = {i.prompt_text for i in train}
    plain = {normalise(text) for text in exact}
    near = near_duplicates([normalise(i.prompt_text) for i in items], sorted(plain))
    return {
        "exact": [i.record_id for i in items if i.prompt_text in exact],
        "normalised": [i.record_id for i in items if normalise(i.prompt_text) in plain],
        "near": [i.record_id for i, found in zip(items, near, strict=True) if found],
    }


def near_duplicates(texts: Sequence[str], known: Sequence[str]) -> list[bool]:
    """For each text whether one of `known` shares at least `NEAR` of their joint shingles.

    Exact, by prefix filtering (Bayardo et al., 2007): two sets that are alike share one of their rarest
    shingles, so only texts that do are compared.
    """
    sets, others = [_shingles(t) for t in texts], [_shingles(t) for t in known]
    counts = Counter(s for shingles in (*sets, *others) for s in shingles)
    index: dict[str, list[int]] = {}
    for i, shingles in enumerate(others):
        for shingle in _rarest(shingles, counts):
            index.setdefault(shingle, []).append(i)
    found = []
    for shingles in sets:
        candidates = {i for shingle in _rarest(shingles, counts) for i in index.get(shingle, [])}
        found.append(any(_jaccard(shingles, others[i]) >= NEAR for i in candidates))
    return found


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def _rarest(shingles: set[str], counts: Counter[str]) -> list[str]:
    """The prefix that a set at least `NEAR` alike must meet, rarest first."""
    kept = len(shingles) - int(np.ceil(NEAR * len(shingles) - 1e-9)) + 1
    return sorted(shingles, key=lambda s: (counts[s], s))[:kept]


def _jaccard(first: set[str], second: set[str]) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


def _group_draws(groups: Sequence[str], generator: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """RESAMPLES lists of places: as many groups as there are, with replacement, each with all its items."""
    member = np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.argsort(member, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(member[order])) + 1)
    if len(parts) == len(member):
        return list(generator.integers(0, len(member), size=(RESAMPLES, len(member))))
    chosen = generator.integers(0, len(parts), size=(RESAMPLES, len(parts)))
    return [np.concatenate([parts[k] for k in row]) for row in chosen]
