"""The metrics, each as sums of per-item statistics and a function of the sums.

In: completions, labels and log-likelihoods of n items. Out: a `Metric` that holds two float64 arrays
[n, k] of statistics, for the base and for the adapter. Because every metric depends on column sums
alone, a bootstrap resample is one row of a matrix product, for corpus BLEU as for accuracy.

Limits: exact match knows no synonyms, units or Chinese numerals. Overlap with the reference is in
overlap.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Chinese punctuation that NFKC leaves as it is, and what it is folded to.
PUNCTUATION = str.maketrans("。、；：“”‘’「」『』《》〈〉【】〔〕—…·", '.,;:""\'\'""""<><>[][]-..')
# Han, kana and hangul: written without spaces, or with spaces that mean little.
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")
_HAS_CJK = re.compile(f"[{CJK}]")
_SPACE_BUT_BETWEEN_WORDS = re.compile(r"(?<![a-z0-9]) | (?![a-z0-9])")


@dataclass(frozen=True)
class Metric:
    """A number for the base and one for the adapter, and how to compute both from summed statistics.

    `base`, `adapter`: float64 [n, k]. `value` maps sums [..., k] to values [...]. `is_proportion`
    says that an item is simply right (1) or not (0). `scale` is what a difference of the whole scale is
    (1 for shares, 100 for overlap, None where there is none: perplexity).
    """

    name: str
    base: Array
    adapter: Array
    value: Callable[[Array], Array]
    higher_is_better: bool = True
    is_proportion: bool = False
    scale: float | None = None


def normalise(text: str) -> str:
    """The form in which answers are compared: NFKC (full width becomes half width), Chinese punctuation as
    ASCII, no case, single spaces, no full stop at the end; in text with Chinese, spaces between Latin words alone."""
    folded = unicodedata.normalize("NFKC", text).translate(PUNCTUATION).casefold()
    folded = " ".join(folded.split())
    if _HAS_CJK.search(folded):
        folded = _SPACE_BUT_BETWEEN_WORDS.sub("", folded)
    return folded.rstrip(".").rstrip()


def tokens(text: str) -> list[str]:
    """Words without punctuation, in lower case; each Han, kana or hangul character is a word of its own.

    Equals rouge-score's tokens on ASCII text.
    """
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def exact_match(completions: Sequence[str], references: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether each completion equals its reference once both are normalised: bool [n]."""
    return np.array([normalise(c) == normalise(r) for c, r in zip(completions, references, strict=True)], dtype=bool)


def proportion(name: str, base: npt.NDArray[np.bool_], adapter: npt.NDArray[np.bool_], *, up: bool = True) -> Metric:
    """The share of items for which `base` and `adapter`, bool [n], are true."""
    return Metric(
        name, _with_count(base), _with_count(adapter), mean, higher_is_better=up, is_proportion=True, scale=1.0
    )


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


def _with_count(values: npt.NDArray[np.bool_]) -> Array:
    return np.stack([values, np.ones(len(values))], axis=1).astype(np.float64)
