"""Tries to find a metric that differs from sacreBLEU's or scikit-learn's, or a match that should not be one."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import f1_score

from metier.evaluation import metrics, overlap

ENGLISH = [
    ("The cat sat on the mat, quietly.", "The cat sat on a mat, quietly."),
    ("", "nothing was said about the patient's history"),
    ("A fracture of the left ankle was found in the X-ray.", "The X-ray showed a fracture of the left ankle."),
    ("yes", "no"),
    ("ok", "ok"),
]
CHINESE = [
    ("经营者应当按照合同的约定提供商品", "经营者应当依照合同约定向消费者提供商品或者服务"),
    ("市盈率为 12.5 倍", "该公司市盈率为 12.5 倍。"),
    ("", "不构成犯罪"),
]


@pytest.mark.parametrize(("pairs", "language"), [(ENGLISH, "en"), (CHINESE, "zh"), (ENGLISH[3:], "en")])
def test_corpus_bleu_equals_sacrebleu(pairs: list[tuple[str, str]], language: str) -> None:
    answers, references = [list(column) for column in zip(*pairs, strict=True)]
    sums = overlap.bleu_statistics(answers, references, [language] * len(pairs)).sum(0)
    expected = BLEU(tokenize="zh" if language == "zh" else "13a").corpus_score(answers, [references]).score
    assert float(overlap.bleu(sums)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pairs", [ENGLISH, CHINESE, ENGLISH[3:4], ENGLISH[4:]])
def test_corpus_chrf_equals_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    answers, references = [list(column) for column in zip(*pairs, strict=True)]
    sums = overlap.chrf_statistics(answers, references).sum(0)
    assert float(overlap.chrf(sums)) == pytest.approx(CHRF().corpus_score(answers, [references]).score, abs=1e-9)


def test_ratio_metrics_of_many_resamples_equal_one_by_one() -> None:
    answers, references = [list(column) for column in zip(*ENGLISH, strict=True)]
    for statistics, value in (
        (overlap.bleu_statistics(answers, references, ["en"] * 5), overlap.bleu),
        (overlap.chrf_statistics(answers, references), overlap.chrf),
        (metrics.f1_statistics(answers, references), metrics.macro_f1),
    ):
        weights = np.random.default_rng(0).integers(0, 3, (7, 5)) + np.eye(7, 5)
        alone = [float(value(row @ statistics)) for row in weights]
        assert value(weights @ statistics) == pytest.approx(alone)


def test_macro_f1_equals_sklearn_over_labels_of_references() -> None:
    generator = np.random.default_rng(1)
    truth = generator.choice(["a", "b", "c"], 200).tolist()
    guess = generator.choice(["a", "b", "c", "never true"], 200).tolist()
    expected = f1_score(truth, guess, labels=["a", "b", "c"], average="macro", zero_division=0)
    assert float(metrics.macro_f1(metrics.f1_statistics(guess, truth).sum(0))) == pytest.approx(expected)


def test_bits_per_byte_and_perplexity_weigh_by_length() -> None:
    assert float(metrics.perplexity(np.array([6.0, 3.0]))) == pytest.approx(np.exp(2))
    assert float(metrics.bits_per_byte(np.array([np.log(2) * 8, 4.0]))) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("ＡＢＣ１２", "abc12", True),
        (" Respiratory  system.\n", "respiratory system", True),
        ("合同纠纷。", "合同纠纷", True),
        ("STRASSE", "straße", True),
        ("1.5", "15", False),
        ("not respiratory", "respiratory", False),
        ("", "respiratory", False),
    ],
)
def test_exact_match_ignores_width_case_and_final_stop_only(answer: str, reference: str, same: bool) -> None:
    assert metrics.exact_match([answer], [reference]).tolist() == [same]
