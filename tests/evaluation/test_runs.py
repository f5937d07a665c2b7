"""Tries to compare runs that share nothing, or to slip a formula into a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from metier.errors import DataError, RunError
from metier.evaluation.runs import answers_csv, compare_runs, safe_cell, told
from metier.model.specialist import Specialist

from .conftest import classified, judge

Make = Callable[..., Path]
HOSTILE = [
    '=HYPERLINK("http://example.com")',
    "+1",
    "-1+2",
    "@SUM(A1)",
    "\t=1",
    " =1",
    "＝1",
    "\u3000=1",
    'plain, "q"\nx',
]


def test_the_same_run_twice_shows_no_difference(make_run: Make, specialist: Specialist) -> None:
    rows = [*classified(30, "train", ["a", "b"]), *classified(120, "test", ["a", "b"])]
    run = make_run(rows)
    judge(run, specialist)
    first, second = compare_runs([run, run])[0], compare_runs([run, run])[1]
    assert first["against_first"] is None
    assert second["against_first"] == {
        "n": 120, "delta": 0.0, "ci95": [0.0, 0.0], "p": 1.0, "outcome": "no difference shown",
    }  # fmt: skip
    english, chinese = told(compare_runs([run, run]), "en"), told(compare_runs([run, run]), "zh")
    assert len(english) == len(chinese) == 3
    assert "120 records in common" in english[2] and "p = 1): No difference shown" in english[2]
    assert "共有 120 条相同的记录" in chinese[2] and "未显示差别" in chinese[2]
    number = re.compile(r"\d+(?:\.\d+)?")
    assert [number.findall(line) for line in english] == [number.findall(line) for line in chinese]


def test_runs_without_a_record_in_common_are_refused(make_run: Make, specialist: Specialist) -> None:
    train = classified(30, "train", ["a", "b"])
    one = make_run([*train, *classified(40, "test", ["a", "b"])], name="one")
    other = make_run(
        [*train, *[{**r, "record_id": f"x{r['record_id']}"} for r in classified(40, "test", ["a", "b"])]], name="two"
    )
    judge(one, specialist)
    with pytest.raises(RunError, match="no complete evidence"):
        compare_runs([one, other])
    judge(other, specialist)
    with pytest.raises(DataError, match="not judged on a single record in common"):
        compare_runs([one, other])


def test_no_cell_of_the_answers_starts_a_formula(make_run: Make, specialist: Specialist) -> None:
    rows = [*classified(40, "train", HOSTILE), *classified(45, "test", HOSTILE, prompt="=1+1 case")]
    run = make_run(rows)
    judge(run, specialist)
    text = answers_csv([run])
    assert text.startswith("\ufeff")
    table = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
    assert len(table) == 46
    for line in table:
        assert len(line) == 6
        for cell in line:
            assert not cell.strip(" \u3000\ufeff").startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝"))
    assert {line[3].removeprefix("'") for line in table[1:]} == set(HOSTILE)


def test_a_cell_that_is_too_long_says_so() -> None:
    cell = safe_cell("x" * 1_000_000)
    assert len(cell) < 32_767
    assert cell.endswith("[cut: 1,000,000 characters]")
    assert "\0" not in safe_cell("a\0b")
