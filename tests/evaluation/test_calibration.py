"""Tries to call a calibrated model uncalibrated, or to hide an overconfident one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss

from metier.evaluation.calibration import calibration, wilson


def scores(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities over 4 labels, and truth drawn from the probabilities before sharpening."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, (n, 4))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (honest.cumsum(1) > generator.random((n, 1))).argmax(1)
    return sharpness * logits, truth


def test_a_calibrated_model_shows_no_more_than_chance() -> None:
    found = calibration(*scores(800, 1.0), seed=0)
    assert found["ece"] < found["null_ece95"]
    assert sum(b["n"] for b in found["bins"]) == 800


def test_an_overconfident_model_shows_more_than_chance() -> None:
    found = calibration(*scores(800, 3.0), seed=0)
    assert found["ece"] > 2 * found["null_ece95"]
    assert found["bins"][-1]["confidence"] > found["bins"][-1]["ci95"][1]


def test_brier_score_of_two_labels_is_twice_scikit_learns() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 2, (300, 2))
    truth = generator.integers(0, 2, 300)
    positive = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    assert calibration(logits, truth, seed=0)["brier"] == pytest.approx(2 * brier_score_loss(truth, positive))


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 10), (199, 200)])
def test_wilson_interval_equals_scipys(hits: int, n: int) -> None:
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx([low, high], abs=1e-6)


def test_options_that_were_not_offered_have_no_probability() -> None:
    logits = np.array([[-1.0, -np.inf, -3.0]] * 40)
    found = calibration(logits, np.zeros(40, dtype=np.int64), seed=0)
    assert found["bins"][0]["confidence"] == pytest.approx(1 / (1 + np.exp(-2)))
