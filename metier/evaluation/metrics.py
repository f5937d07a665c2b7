"""The metrics, each as sums of per-item statistics and a function of the sums.

In: completions, labels and log-likelihoods of n items. Out: a `Metric` that holds two float64 arrays
[n, k] of statistics, for the base and for the adapter. Because every metric depends on column sums
alone, a bootstrap resample is one row of a matrix product, for corpus BLEU as for accuracy.

Limits: exact match knows no synonyms, units or Chinese numerals. BLEU and chrF measure overlap with
one reference, not truth.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2


@dataclass(frozen=True)
class Metric:
    """A number for the base and one for the adapter, and how to compute both from summed statistics.

    `base`, `adapter`: float64 [n, k]. `value` maps sums [..., k] to values [...]. `is_proportion`
    says that an item is simply right (1) or not (0).
    """

    name: str
    base: Array
    adapter: Array
    value: Callable[[Array], Array]
    higher_is_better: bool = True
    is_proportion: bool = False


def normalise(text: str) -> str:
    """The form in which answers are compared: NFKC (full width becomes half width), no case, single
    spaces, no full stop at the end."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".。").rstrip()


def exact_match(completions: Sequence[str], references: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether each completion equals its reference once both are normalised: bool [n]."""
    return np.array([normalise(c) == normalise(r) for c, r in zip(completions, references, strict=True)], dtype=bool)


def proportion(name: str, base: npt.NDArray[np.bool_], adapter: npt.NDArray[np.bool_], *, up: bool = True) -> Metric:
    """The share of items for which `base` and `adapter`, bool [n], are true."""
    return Metric(name, _with_count(base), _with_count(adapter), mean, higher_is_better=up, is_proportion=True)


def mean(sums: Array) -> Array:
    """From sums of [value, 1]."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def perplexity(sums: Array) -> Array:
    """exp of nats per token, from sums of [nll, tokens]; not comparable between tokenizers."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


def bits_per_byte(sums: Array) -> Array:
    """-log2 p per UTF-8 byte, from sums of [nll in nats, bytes]; comparable between tokenizers."""
    return np.asarray(sums[..., 0] / sums[..., 1] / np.log(2))


def f1_statistics(predicted: Sequence[str], references: Sequence[str]) -> Array:
    """Per item, for each of the L labels among the references: hit, predicted, true. [n, 3 L]."""
    column = {label: i for i, label in enumerate(sorted(set(references)))}
    statistics = np.zeros((len(references), 3, len(column)))
    for row, (guess, reference) in enumerate(zip(predicted, references, strict=True)):
        statistics[row, 2, column[reference]] = 1
        if guess in column:
            statistics[row, 1, column[guess]] = 1
            statistics[row, 0, column[guess]] = guess == reference
    return statistics.reshape(len(references), -1)


def macro_f1(sums: Array) -> Array:
    """The mean F1 of the labels that occur among the (resampled) references.

    Equals scikit-learn's `f1_score(average="macro", labels=<labels in the references>)`.
    """
    hits, predicted, true = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
    f1 = 2 * hits / np.maximum(predicted + true, 1)
    occurs = true > 0
    return np.asarray((f1 * occurs).sum(-1) / occurs.sum(-1))


def bleu_statistics(completions: Sequence[str], references: Sequence[str], languages: Sequence[str]) -> Array:
    """sacreBLEU's statistics per item: lengths of answer and reference, matches and totals by order. [n, 10].

    Chinese is tokenised by `zh` (each Han character a token), everything else by `13a`.
    """
    from sacrebleu.metrics.bleu import BLEU, BLEUScore

    scorers = {name: BLEU(tokenize=name, effective_order=True) for name in ("zh", "13a")}
    rows = []
    for completion, reference, language in zip(completions, references, languages, strict=True):
        score = scorers["zh" if language == "zh" else "13a"].sentence_score(completion, [reference])
        assert isinstance(score, BLEUScore)
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64)


def bleu(sums: Array) -> Array:
    """Corpus BLEU, 0 to 100 (Papineni et al., 2002), with sacreBLEU's default exponential smoothing."""
    length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    missed = matches == 0
    smoothing = 2.0 ** np.cumsum(missed, axis=-1)
    precision = np.where(missed, 1 / smoothing, matches) / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - reference_length / np.maximum(length, 1)))
    defined = (totals > 0).all(-1) & ~missed.all(-1)
    return np.where(defined, 100 * brevity * np.exp(np.log(precision).mean(-1)), 0.0)


def chrf_statistics(completions: Sequence[str], references: Sequence[str]) -> Array:
    """Per item and order 1 to 6: character n-grams of the answer, of the reference, in both. [n, 18]."""
    rows = []
    for completion, reference in zip(completions, references, strict=True):
        answer, truth = "".join(completion.split()), "".join(reference.split())
        row: list[int] = []
        for order in range(1, CHRF_ORDER + 1):
            ours, theirs = _ngrams(answer, order), _ngrams(truth, order)
            total = theirs.total()
            # As sacreBLEU: n-grams for which the reference is too short do not count against the answer.
            row += [ours.total() if total else 0, total, (ours & theirs).total()]
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def chrf(sums: Array) -> Array:
    """chrF2, 0 to 100 (Popović, 2015): F-beta with beta 2 of character n-grams, sacreBLEU's defaults."""
    answer, truth, both = np.moveaxis(sums.reshape(*sums.shape[:-1], CHRF_ORDER, 3), -1, 0)
    orders = (answer > 0) & (truth > 0)
    count = np.maximum(orders.sum(-1), 1)
    precision = (orders * both / np.maximum(answer, 1)).sum(-1) / count
    recall = (orders * both / np.maximum(truth, 1)).sum(-1) / count
    weight = CHRF_BETA**2
    bottom = weight * precision + recall
    return np.asarray(100 * (1 + weight) * precision * recall / np.where(bottom > 0, bottom, 1))


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))


def _with_count(values: npt.NDArray[np.bool_]) -> Array:
    return np.stack([values, np.ones(len(values))], axis=1).astype(np.float64)
