"""The test records, and the table of what base and adapter answered to them.

In: a dataset's records.parquet. Out: `Item`s in a fixed order; `Answers`, the raw per-item results, to and
from items.parquet. What is in that table is enough to make every number of the evidence again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metier.errors import DataError
from metier.evaluation.metrics import exact_match

Message = dict[str, str]
# The source_file of records that were planted to measure memorisation.
PLANTED = "canary"


@dataclass(frozen=True)
class Item:
    """One record; the last message is the reference answer, or the whole of a plain text."""

    record_id: str
    group_id: str | None
    language: str
    label: str | None
    messages: list[Message]
    source_file: str = ""

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

    @property
    def group(self) -> str:
        """The cluster that the item belongs to: its group_id, or itself."""
        return f"record {self.record_id}" if self.group_id is None else f"group {self.group_id}"


@dataclass(frozen=True)
class Answers:
    """What one model gave for n items; None where the task was not asked.

    `nll` in nats over `num_tokens` tokens of the reference; `label_scores` are log-probabilities in the
    order of the dataset's labels, -inf for an option that a prompt does not offer; `stopped` says whether
    a completion ended by itself.
    """

    nll: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.float64]
    num_bytes: npt.NDArray[np.float64]
    labels: list[str] | None
    label_scores: npt.NDArray[np.float64] | None
    completions: list[str] | None
    stopped: npt.NDArray[np.bool_] | None


def read_items(dataset: Path, split: str) -> list[Item]:
    """The records of one split of `dataset` in the file's order, without planted ones."""
    import polars as pl

    columns = ["record_id", "group_id", "language", "label", "messages", "source_file"]
    frame = pl.scan_parquet(dataset / "records.parquet").filter(pl.col("split") == split).select(columns).collect()
    return [item for item in (Item(**row) for row in frame.iter_rows(named=True)) if item.source_file != PLANTED]


def choose_items(items: list[Item], *, max_items: int | None, seed: int) -> list[Item]:
    """At most `max_items`, a choice by SHA-256 of seed and record_id, in the order of record_id.

    Raises `DataError` when there is no item.
    """
    refuse_no_test(len(items))
    return sorted(draw(items, max_items, seed), key=lambda i: i.record_id)


def refuse_no_test(count: int) -> None:
    """Raises `DataError` where `count`, of the test records, is 0."""
    if not count:
        raise DataError(
            "the dataset has no test records, so base and adapter cannot be compared",
            hint="give `data.test` a share such as 0.1 or a number of records, or name files in `data.test_sources`",
        )


def draw(items: list[Item], count: int | None, seed: int) -> list[Item]:
    """The first `count` by SHA-256 of seed and record_id."""
    return sorted(items, key=lambda i: hashlib.sha256(f"{seed}|{i.record_id}".encode()).hexdigest())[:count]


def items_table(items: list[Item], sides: dict[str, Answers], few_shot: list[str] | None) -> Any:
    """The rows of items.parquet, a polars DataFrame. `sides` are base and adapter."""
    import polars as pl

    columns: dict[str, Any] = {
        "record_id": [i.record_id for i in items],
        "group_id": [i.group_id for i in items],
        "language": [i.language for i in items],
        "source_file": [i.source_file for i in items],
        "reference": [i.reference for i in items],
    }
    nothing = [None] * len(items)
    references, truth = columns["reference"], [i.label for i in items]
    for name, side in sides.items():
        right = [p == t for p, t in zip(side.labels, truth, strict=True)] if side.labels else nothing
        columns |= {
            f"{name}_completion": side.completions or nothing,
            f"{name}_stopped": nothing if side.stopped is None else side.stopped,
            f"{name}_label": side.labels or nothing,
            f"{name}_label_scores": nothing if side.label_scores is None else side.label_scores.tolist(),
            f"{name}_nll": side.nll,
            f"{name}_correct": right,
            f"{name}_generated_correct": exact_match(side.completions, references) if side.completions else nothing,
        }
    columns["num_tokens"] = sides["base"].num_tokens.astype(np.int64)
    columns["num_bytes"] = sides["base"].num_bytes.astype(np.int64)
    columns["few_shot_answer"] = few_shot or nothing
    strings = {n: pl.String for n in columns if n.endswith(("_completion", "_label", "_id", "_answer"))}
    flags = {n: pl.Boolean for n in columns if n.endswith(("_correct", "_stopped"))}
    scores = {n: pl.List(pl.Float64) for n in columns if n.endswith("_label_scores")}
    return pl.DataFrame(columns, schema_overrides={**strings, **flags, **scores})


def read_answers(table: Any, name: str) -> Answers:
    """One side (`base` or `adapter`) of items.parquet, as `items_table` wrote it."""

    def optional(column: str) -> Any:
        values = table[f"{name}_{column}"]
        return None if values.null_count() == len(values) else values.to_list()

    scores, stopped = optional("label_scores"), optional("stopped")
    return Answers(
        nll=table[f"{name}_nll"].to_numpy().astype(np.float64),
        num_tokens=table["num_tokens"].to_numpy().astype(np.float64),
        num_bytes=table["num_bytes"].to_numpy().astype(np.float64),
        labels=optional("label"),
        label_scores=None if scores is None else np.array(scores, dtype=np.float64),
        completions=optional("completion"),
        stopped=None if stopped is None else np.array(stopped, dtype=bool),
    )
