"""Does a model know when it is right? Reliability of the label probabilities.

In: log-probabilities of the labels, [n, labels], and which is right. Out: expected calibration error
(Guo et al., 2017) with the value that a perfectly calibrated model would show by chance, Brier score, and
the bins of the reliability curve.

Limits: probabilities are renormalised over the label set. ECE is biased upward (0.07 at 200 items for a
perfect model), so it means something only beside `null_ece`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BINS = 15
SIMULATIONS = 200
Z = 1.959964


def calibration(scores: Array, truth: npt.NDArray[np.int64], seed: int) -> dict[str, Any]:
    """{n, ece, null_ece, null_ece95, brier, bins}; `scores` [n, labels] in nats, `truth` [n], -1 for no label of these.

    A bin has low, high, n, confidence (mean), accuracy, ci95 (Wilson, 1927).
    """
    highest = scores.max(axis=1, keepdims=True)
    probabilities = np.exp(scores - highest)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    target = np.zeros_like(probabilities)
    known = truth >= 0
    target[known, truth[known]] = 1
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    chance = np.random.default_rng(seed).random((SIMULATIONS, len(confidence))) < confidence
    null = np.array([ece(confidence, hits, place) for hits in chance])
    return {
        "n": len(confidence),
        "ece": ece(confidence, right, place),
        "null_ece": float(null.mean()),
        "null_ece95": float(np.percentile(null, 95)),
        "brier": float(((probabilities - target) ** 2).sum(axis=1).mean()),
        "bins": [_bin(b, confidence[place == b], right[place == b]) for b in range(BINS) if (place == b).any()],
    }


def ece(confidence: Array, right: npt.NDArray[np.bool_], place: npt.NDArray[np.int64]) -> float:
    """The mean over items of |accuracy - confidence| of their bins."""
    gap = np.bincount(place, weights=right - confidence, minlength=BINS)
    return float(np.abs(gap).sum() / len(confidence))


def wilson(hits: int, n: int) -> list[float]:
    """The 95 % interval of a share."""
    share, square = hits / n, Z**2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = Z * (share * (1 - share) / n + square / (4 * n**2)) ** 0.5 / (1 + square / n)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def _bin(number: int, confidence: Array, right: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "low": number / BINS,
        "high": (number + 1) / BINS,
        "n": len(right),
        "confidence": float(confidence.mean()),
        "accuracy": float(right.mean()),
        "ci95": wilson(int(right.sum()), len(right)),
    }
