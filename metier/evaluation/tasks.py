"""Which test records are asked, and what base and adapter answer to each.

In: the records of a dataset and a loaded model. Out: `Item`s in a fixed order, and `Answers`, the raw
per-item results that metrics are made of: labels by log-likelihood, greedy completions, and the
likelihood of the reference answers.

Limits: one greedy completion an item, no sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from metier.errors import DataError, ModelError, RecipeError
from metier.recipe import EvaluateConfig

if TYPE_CHECKING:
    from metier.model.specialist import Specialist

Message = dict[str, str]
Progress = Callable[[str, int, int], None]

LONGEST_ANSWER = 512
# Free tokens beyond the longest reference, so that a wordier answer is not cut into a wrong one.
SPARE_TOKENS = 8


@dataclass(frozen=True)
class Item:
    """One record; the last message is the reference answer, or the whole of a plain text."""

    record_id: str
    group_id: str | None
    language: str
    label: str | None
    messages: list[Message]

    @property
    def prompt(self) -> list[Message]:
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        return self.messages[-1]["content"]

    @property
    def prompt_text(self) -> str:
        """The prompt's words without the system message; of a plain text, the text."""
        words = [m["content"] for m in self.prompt if m["role"] != "system"]
        return "\n".join(words) if words else self.reference


@dataclass(frozen=True)
class Answers:
    """What one model, base or adapter, gave for n items; None where the task was not asked."""

    nll: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.float64]
    num_bytes: npt.NDArray[np.float64]
    labels: list[str] | None
    completions: list[str] | None
    num_cut: int


def read_items(dataset: Path, split: str) -> list[Item]:
    """The records of one split of `dataset`, in the file's order."""
    import polars as pl

    columns = ["record_id", "group_id", "language", "label", "messages"]
    frame = pl.scan_parquet(dataset / "records.parquet").filter(pl.col("split") == split).select(columns).collect()
    return [Item(**row) for row in frame.iter_rows(named=True)]


def choose_items(items: list[Item], *, max_items: int | None, seed: int) -> list[Item]:
    """At most `max_items`, a choice by SHA-256 of seed and record_id, in the order of record_id.

    Raises `DataError` when there is no item.
    """
    if not items:
        raise DataError(
            "the dataset has no test records, so base and adapter cannot be compared",
            hint="give `data.test` a share such as 0.1 or a number of records, or name files in `data.test_sources`",
        )
    drawn = sorted(items, key=lambda i: hashlib.sha256(f"{seed}|{i.record_id}".encode()).hexdigest())
    return sorted(drawn[:max_items], key=lambda i: i.record_id)


def choose_tasks(config: EvaluateConfig, manifest: dict[str, Any]) -> list[str]:
    """The tasks to ask of a dataset; perplexity is always among them.

    Raises `RecipeError` for a task that the dataset cannot be asked.
    """
    data = manifest["task"]
    possible = {"classification": ["classification", "generation"], "generation": ["generation"], "text": []}[data]
    if config.tasks == "auto":
        return [*possible[:1], "perplexity"]
    wrong = [t for t in config.tasks if t != "perplexity" and t not in possible]
    if wrong:
        raise RecipeError(
            f"evaluate.tasks asks for `{wrong[0]}`, and the dataset's task is `{data}`",
            hint=f"use `auto`, or of: {', '.join([*possible, 'perplexity'])}",
        )
    return [t for t in (*possible, "perplexity") if t in config.tasks or t == "perplexity"]


def longest_answer(specialist: Specialist, items: list[Item], config: EvaluateConfig) -> int:
    """The number of tokens after which a completion is cut."""
    if config.max_new_tokens != "auto":
        return config.max_new_tokens
    longest = max(specialist.count_tokens(reference) for reference in {i.reference for i in items})
    return min(longest + SPARE_TOKENS, LONGEST_ANSWER)


def leave_out(specialist: Specialist, items: list[Item], max_new_tokens: int) -> tuple[list[Item], dict[str, str]]:
    """The items that can be asked, and the reason by record_id for each of the others.

    Raises `DataError` when none can be asked.
    """
    reasons = {i.record_id: specialist.why_not(i.messages, max_new_tokens) for i in items}
    left_out = {record_id: reason for record_id, reason in reasons.items() if reason}
    if len(left_out) == len(items):
        reason = next(iter(left_out.values()))
        raise DataError(f"none of {len(items)} test records can be asked; the first: {reason}")
    return [i for i in items if i.record_id not in left_out], left_out


def ask(
    specialist: Specialist, items: list[Item], *, tasks: list[str], labels: list[str], max_new_tokens: int,
    use_adapter: bool, progress: Progress,
) -> Answers:  # fmt: skip
    """Asks one model all tasks of all items.

    Raises `ModelError` when a likelihood is not a finite number.
    """
    who = "adapter" if use_adapter else "base"

    def told(what: str) -> Callable[[int], None]:
        return lambda done: progress(f"{who}: {what}", done, len(items))

    prompts = [i.prompt for i in items]
    scores = specialist.score_records(
        [i.messages for i in items], use_adapter=use_adapter, done=told("likelihood of the references")
    )
    predicted = completions = None
    if "classification" in tasks:
        choices = specialist.score_choices(
            prompts, labels, use_adapter=use_adapter, done=told("likelihood of the labels")
        )
        predicted = [labels[k] for k in choices.argmax(axis=1)]
    if tasks != ["perplexity"]:
        completions = specialist.complete(
            prompts, use_adapter=use_adapter, max_new_tokens=max_new_tokens, done=told("answers")
        )
    nll = np.array([s.nll for s in scores], dtype=np.float64)
    if not np.isfinite(nll).all():
        raise ModelError(
            f"the {who} gives no finite likelihood for {int((~np.isfinite(nll)).sum())} of {len(items)} test records",
            hint="a training that diverged does this: lower `train.learning_rate`, or look at loss in metrics.jsonl",
        )
    return Answers(
        nll=nll,
        num_tokens=np.array([s.num_tokens for s in scores], dtype=np.float64),
        num_bytes=np.array([s.num_bytes for s in scores], dtype=np.float64),
        labels=predicted,
        completions=None if completions is None else [c.text for c in completions],
        num_cut=sum(not c.stopped for c in completions or []),
    )
