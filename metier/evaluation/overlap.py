"""How far an open answer agrees with its reference: BLEU, chrF, ROUGE-L, token F1, fields of JSON.

In: completions and references. Out: per-item statistics, float64 [n, k], whose column sums give the metric
(metrics.py). Chinese is measured by characters: BLEU's `zh` tokenisation, ROUGE-L and token F1 with each
Han character a token.

Limits: overlap with one reference is not truth; a right answer in other words scores low. BLEU has no word
boundaries to go by in languages without spaces other than Chinese: read chrF there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from metier.evaluation.metrics import Array, normalise, tokens

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2
_FENCE = re.compile(r"^\s*```\w*\n(.*?)\n?```\s*$", re.DOTALL)
MAX_DEPTH = 20


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


def rouge_l_statistics(completions: Sequence[str], references: Sequence[str]) -> Array:
    """Per item: 100 x ROUGE-L's F1 (Lin, 2004) and 1. [n, 2]. Equals rouge-score's without stemming."""
    rows = []
    for completion, reference in zip(completions, references, strict=True):
        ours, theirs = tokens(completion), tokens(reference)
        common = longest_common_subsequence(ours, theirs)
        rows.append([100 * _f1(common, len(ours), len(theirs)), 1])
    return np.array(rows, dtype=np.float64)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by the bit-parallel method (Hyyrö, 2004): one row of the table is one integer."""
    places: dict[str, int] = {}
    for i, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << i
    everything = (1 << len(first)) - 1
    row = everything
    for token in second:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & everything
    return len(first) - row.bit_count()


def token_f1_statistics(completions: Sequence[str], references: Sequence[str]) -> Array:
    """Per item: F1 of the tokens as a multiset (SQuAD's, without dropping articles) and 1. [n, 2]."""
    rows = []
    for completion, reference in zip(completions, references, strict=True):
        ours, theirs = Counter(tokens(completion)), Counter(tokens(reference))
        both_empty = not ours and not theirs
        rows.append([1.0 if both_empty else _f1((ours & theirs).total(), ours.total(), theirs.total()), 1])
    return np.array(rows, dtype=np.float64)


def field_statistics(completions: Sequence[str], references: Sequence[str]) -> Array:
    """Per item, of JSON objects as (path, value) pairs: in both, in the answer, in the reference. [n, 3]."""
    rows = []
    for completion, reference in zip(completions, references, strict=True):
        ours, theirs = fields(completion) or Counter(), fields(reference) or Counter()
        rows.append([(ours & theirs).total(), ours.total(), theirs.total()])
    return np.array(rows, dtype=np.float64)


def field_f1(sums: Array) -> Array:
    """Micro F1 of the fields."""
    bottom = sums[..., 1] + sums[..., 2]
    return np.where(bottom > 0, 2 * sums[..., 0] / np.maximum(bottom, 1), 1.0)


def fields(text: str) -> Counter[tuple[str, str]] | None:
    """The (path, normalised value) pairs of a JSON object, in a code fence or not; None where there is none."""
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    found: Counter[tuple[str, str]] = Counter()
    _collect(value, "", found, MAX_DEPTH)
    return found


def _collect(value: Any, path: str, found: Counter[tuple[str, str]], depth: int) -> None:
    if isinstance(value, dict) and depth:
        for name, inner in value.items():
            _collect(inner, f"{path}.{name}", found, depth - 1)
    elif isinstance(value, list) and depth:
        for inner in value:
            _collect(inner, f"{path}[]", found, depth - 1)
    else:
        found[path, normalise(value if isinstance(value, str) else json.dumps(value))] += 1


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs) if common else 0.0


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[i : i + order] for i in range(len(text) - order + 1))
