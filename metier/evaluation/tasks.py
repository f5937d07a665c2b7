"""Which tasks a dataset is asked, by which metrics, and on which of them the verdict rests.

In: the dataset's manifest and its test items. Out: the task names, and `Metric`s made of both sides' answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metier.errors import RecipeError
from metier.evaluation import metrics, overlap
from metier.evaluation.ask import offered
from metier.evaluation.items import Answers, Item
from metier.evaluation.metrics import Metric
from metier.recipe import EvaluateConfig

# References of at most this many bytes (some five words, or ten Han characters) can be hit exactly.
SHORT_REFERENCE = 30
# From this share of the records on, a form that they show is theirs.
MOST = 0.9
CHOOSING = ("classification", "multiple_choice")
POSSIBLE = {
    "classification": ["classification", "multiple_choice", "generation"],
    "generation": ["generation", "extraction"],
    "text": [],
}


def choose_tasks(config: EvaluateConfig, manifest: dict[str, Any], items: list[Item]) -> list[str]:
    """The tasks to ask of a dataset, the one that the verdict rests on first; perplexity is always among them.

    Raises `RecipeError` for a task that the dataset cannot be asked.
    """
    data = manifest["task"]
    possible = POSSIBLE[data]
    if config.tasks == "auto":
        main = {"classification": "classification", "generation": "generation"}.get(data)
        if data == "classification" and _are_options(manifest["labels"], items):
            main = "multiple_choice"
        if data == "generation" and _share(overlap.fields(i.reference) is not None for i in items) >= MOST:
            main = "extraction"
        return [*([main] if main else []), "perplexity"]
    wrong = [t for t in config.tasks if t != "perplexity" and t not in possible]
    if wrong:
        raise RecipeError(
            f"evaluate.tasks asks for `{wrong[0]}`, and the dataset's task is `{data}`",
            hint=f"use `auto`, or of: {', '.join([*possible, 'perplexity'])}",
        )
    return [t for t in (*possible, "perplexity") if t in config.tasks or t == "perplexity"]


def primary_metric(items: list[Item], asked: list[str]) -> str:
    """The metric that the verdict rests on, chosen by task and references alone, before any answer is seen."""
    if asked[0] in CHOOSING:
        return "accuracy"
    if asked == ["perplexity"]:
        return "perplexity"
    if asked[0] == "extraction" and _share(overlap.fields(i.reference) is not None for i in items) >= MOST:
        return "field_f1"
    is_short = float(np.median([len(i.reference.encode()) for i in items])) <= SHORT_REFERENCE
    if asked[0] == "extraction":
        return "exact_match" if is_short else "token_f1"
    return "exact_match" if is_short else "chrf"


def build_metrics(
    items: list[Item], base: Answers, adapter: Answers, *, asked: list[str], labels: list[str]
) -> list[Metric]:
    """All metrics of the tasks that were asked, the most telling first."""
    found: list[Metric] = []
    if base.labels is not None and adapter.labels is not None:
        truth = [i.label or "" for i in items]
        found.append(metrics.proportion("accuracy", equal(base.labels, truth), equal(adapter.labels, truth)))
        f1 = [metrics.f1_statistics(side.labels or [], truth) for side in (base, adapter)]
        found.append(Metric("macro_f1", f1[0], f1[1], metrics.macro_f1, scale=1.0))
    if base.completions is not None and adapter.completions is not None:
        found += _generated(items, (base.completions, adapter.completions), asked, labels)
    for name, value in (("perplexity", metrics.perplexity), ("bits_per_byte", metrics.bits_per_byte)):
        per = "num_tokens" if name == "perplexity" else "num_bytes"
        pairs = [np.stack([side.nll, getattr(side, per)], axis=1) for side in (base, adapter)]
        found.append(Metric(name, pairs[0], pairs[1], value, higher_is_better=False))
    return found


def equal(predicted: Sequence[str], truth: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool [n]."""
    return np.array([p == t for p, t in zip(predicted, truth, strict=True)], dtype=bool)


def _generated(
    items: list[Item], sides: tuple[list[str], list[str]], asked: list[str], labels: list[str]
) -> list[Metric]:
    references = [i.reference for i in items]
    choosing = any(task in asked for task in CHOOSING)
    name = "accuracy_generated" if choosing else "exact_match"
    found = [metrics.proportion(name, *(metrics.exact_match(c, references) for c in sides))]
    if choosing:
        names = {metrics.normalise(label) for label in labels}
        invalid = [np.array([metrics.normalise(text) not in names for text in c], dtype=bool) for c in sides]
        found.append(metrics.proportion("invalid_share", invalid[0], invalid[1], up=False))
    if "extraction" in asked:
        f1 = [overlap.token_f1_statistics(c, references) for c in sides]
        found.append(Metric("token_f1", f1[0], f1[1], metrics.mean, scale=1.0))
        if _share(overlap.fields(r) is not None for r in references) >= MOST:
            hits = [overlap.field_statistics(c, references) for c in sides]
            found.insert(0, Metric("field_f1", hits[0], hits[1], overlap.field_f1, scale=1.0))
            broken = [np.array([overlap.fields(text) is None for text in c], dtype=bool) for c in sides]
            found.append(metrics.proportion("invalid_json_share", broken[0], broken[1], up=False))
    if "generation" in asked:
        languages = [i.language for i in items]
        bleu = [overlap.bleu_statistics(c, references, languages) for c in sides]
        chrf = [overlap.chrf_statistics(c, references) for c in sides]
        rouge = [overlap.rouge_l_statistics(c, references) for c in sides]
        found.append(Metric("chrf", chrf[0], chrf[1], overlap.chrf, scale=100.0))
        found.append(Metric("bleu", bleu[0], bleu[1], overlap.bleu, scale=100.0))
        found.append(Metric("rouge_l", rouge[0], rouge[1], metrics.mean, scale=100.0))
    return found


def _are_options(labels: list[str], items: list[Item]) -> bool:
    """Whether the labels are option letters, and most prompts list the options."""
    letters = all(len(label.strip()) == 1 and "A" <= label.strip().upper() <= "H" for label in labels)
    return letters and _share(_lists_options(i, labels) for i in items) >= MOST


def _lists_options(item: Item, labels: list[str]) -> bool:
    none = "\N{NULL}"  # a label that no prompt lists: it is left out where the options are found
    return len(labels) >= 2 and not offered(item.prompt_text, [*labels, none])[-1]


def _share(flags: Any) -> float:
    found = list(flags)
    return sum(found) / len(found) if found else 0.0
