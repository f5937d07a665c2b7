"""Several runs side by side: each against its base, and each against the first on the records they share.

In: folders of finished runs. Out: rows of numbers, and a table of all answers for a spreadsheet. Runs are
paired by record_id and reference, whatever they were trained on, so an earlier adapter is a control like any other.

Limits: records that only one run was judged on are left out; the number shared is told.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metier import artifacts
from metier.errors import DataError, RunError
from metier.evaluation.compare import Design, compare
from metier.evaluation.evaluate import read_tables
from metier.evaluation.items import Answers, Item, read_answers, read_items
from metier.evaluation.tasks import build_metrics
from metier.evaluation.texts import Language, show, show_delta, show_p, words

# A spreadsheet takes a cell that begins so for a formula (OWASP, CSV injection).
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
LONGEST_CELL = 32_000


@dataclass(frozen=True)
class Judged:
    """A finished run: its evidence, and what its adapter and base answered, by record."""

    path: Path
    evidence: dict[str, Any]
    items: list[Item]
    base: Answers
    adapter: Answers

    @property
    def primary(self) -> str:
        return str(self.evidence["verdict"]["primary_metric"])


def read_judged(run: Path) -> Judged:
    """Raises `RunError` when `run` was not evaluated."""
    if artifacts.read_manifest(run / "evidence") is None:
        raise RunError(f"there is no complete evidence in `{run}`", hint="`metier evaluate` makes it")
    table, _ = read_tables(run / "evidence")
    by_id = {i.record_id: i for i in read_items(run / "dataset", "test")}
    items = [by_id[record_id] for record_id in table["record_id"]]
    evidence = json.loads((run / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    return Judged(run, evidence, items, read_answers(table, "base"), read_answers(table, "adapter"))


def compare_runs(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """One row a run: {run, metric, base, adapter, delta, ci95, p, outcome, against_first}.

    `against_first` is None for the first, else {n, delta, ci95, p, outcome} on the records both were judged
    on, with the first run's metric. Raises `DataError` when there are none, `RunError` for an unfinished run.
    """
    judged = [read_judged(run) for run in runs]
    rows = []
    for one in judged:
        result = one.evidence["metrics"][one.primary]
        same = {key: result[key] for key in ("base", "adapter", "delta", "ci95", "p", "outcome")}
        against = None if one is judged[0] else _against(judged[0], one)
        rows.append({"run": str(one.path), "metric": one.primary, **same, "against_first": against})
    return rows


def told(rows: Sequence[dict[str, Any]], language: Language) -> list[str]:
    """The rows of `compare_runs` as sentences."""
    table = words(language)
    found = []
    for row in rows:
        metric = row["metric"]
        values = {side: show(metric, row[side]) for side in ("base", "adapter")}
        found.append(table["compare_line"].format(run=row["run"], metric=table[metric], **values)
                     + _difference(metric, row, language))  # fmt: skip
        if against := row["against_first"]:
            first = rows[0]["metric"]
            found.append(table["compare_against"].format(first=rows[0]["run"], metric=table[first], n=against["n"])
                         + _difference(first, against, language))  # fmt: skip
    return found


def _difference(metric: str, result: dict[str, Any], language: Language) -> str:
    low, high = (show_delta(metric, v, language, unit=False) for v in result["ci95"])
    return words(language)["compare_difference"].format(
        delta=show_delta(metric, result["delta"], language), low=low, high=high, p=show_p(result["p"]),
        outcome=words(language)[f"tag_{result['outcome']}"],
    )  # fmt: skip


def answers_csv(runs: Sequence[Path]) -> str:
    """Every answer as CSV with a byte order mark; no cell can start a formula, and none is cut in silence."""
    judged = [read_judged(run) for run in runs]
    first = judged[0]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    names = [one.path.resolve().name for one in judged]
    writer.writerow([safe_cell(c) for c in ("record_id", "language", "prompt", "reference", "base", *names)])
    given = [dict(zip([i.record_id for i in one.items], _texts(one.adapter), strict=True)) for one in judged]
    for item, base in zip(first.items, _texts(first.base), strict=True):
        cells = [item.record_id, item.language, item.prompt_text, item.reference, base]
        writer.writerow([safe_cell(c) for c in (*cells, *(answers.get(item.record_id, "") for answers in given))])
    return "\ufeff" + buffer.getvalue()


def safe_cell(text: str) -> str:
    """`text` for a cell: a leading quote where a spreadsheet would calculate, and a note where it is too long."""
    if len(text) > LONGEST_CELL:
        text = f"{text[:LONGEST_CELL]} [cut: {len(text):,} characters]"
    text = text.replace("\0", "\N{SYMBOL FOR NULL}")
    return f"'{text}" if text.lstrip(" \u3000\ufeff").startswith((*FORMULA_STARTS, "＝", "＋", "－", "＠")) else text


def _texts(answers: Answers) -> list[str]:
    if answers.completions is not None:
        return answers.completions
    return answers.labels or [""] * len(answers.nll)


def _against(first: Judged, other: Judged) -> dict[str, Any]:
    mine = {(i.record_id, i.reference): place for place, i in enumerate(first.items)}
    pairs = [(mine[key], place) for place, i in enumerate(other.items) if (key := (i.record_id, i.reference)) in mine]
    if not pairs:
        raise DataError(
            f"`{first.path}` and `{other.path}` were not judged on a single record in common",
            hint="give both the same test records: the same sources, `data.test` and `seed`, or `data.test_sources`",
        )
    items = [first.items[a] for a, _ in pairs]
    sides = _select(first.adapter, [a for a, _ in pairs]), _select(other.adapter, [b for _, b in pairs])
    measured = {
        m.name: m
        for m in build_metrics(
            items, *sides, asked=first.evidence["tasks"], labels=sorted({i.label or "" for i in items})
        )
    }
    if first.primary not in measured:
        raise DataError(f"`{other.path}` was not asked what `{first.path}` is judged by ({first.primary})")
    evidence = first.evidence
    design = Design(10_000, evidence["seed"], evidence["smallest_effect"])
    result = compare([measured[first.primary]], [i.group for i in items], design)[first.primary]
    return {key: result[key] for key in ("n", "delta", "ci95", "p", "outcome")}


def _select(answers: Answers, places: list[int]) -> Answers:
    def some(values: list[str] | None) -> list[str] | None:
        return None if values is None else [values[p] for p in places]

    return replace(
        answers, nll=answers.nll[places], num_tokens=answers.num_tokens[places], num_bytes=answers.num_bytes[places],
        labels=some(answers.labels), completions=some(answers.completions), label_scores=None, stopped=None,
    )  # fmt: skip
