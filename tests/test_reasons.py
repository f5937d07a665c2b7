"""Tries to find a reason for rejecting a row that a Chinese reader would get in English."""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from metier.data.json_rows import parse_json
from metier.reasons import in_chinese
from tests.data.hostile_cases import CSV, JSON, Hostile
from tests.data.test_hostile import rows_of

DATA = Path(__file__).parents[1] / "metier" / "data"
HAN = re.compile("[\u4e00-\u9fff]")
# What a field of an f-string may be, where its words are looked up too.
SAMPLE = {
    "role": "prompt",
    "kind": "a list",
    "fields": "3 fields",
    "NO_HISTORY": "; `data.history: none` leaves the column out",
}


def _texts(node: ast.expr) -> Iterator[str]:
    """Every string that an expression may be, with a sample in place of what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*_texts(node.body), *_texts(node.orelse))
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            next(_texts(part), "") if isinstance(part, ast.Constant)
            else "prompt" if isinstance(part.value, ast.IfExp)
            else SAMPLE.get(ast.unparse(part.value), "7")
            for part in node.values if isinstance(part, ast.Constant | ast.FormattedValue)
        )  # fmt: skip


def _reasons() -> Iterator[tuple[str, str]]:
    """(where, reason) of every reason in the code of metier/data."""
    for path in sorted(DATA.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: list[ast.expr] = []
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("Rejected", "_LeftOut", "_Invalid", "reject", "Rejection", "Line"):
                    found = node.args[-1:]
                if name == "setdefault" and path.name == "leakage.py":
                    found = node.args[:1]
                found += [keyword.value for keyword in node.keywords if keyword.arg == "problem"]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (
                "problem", "LEFT_OUT", "NOT_NEEDED", "REASON",
            ):  # fmt: skip
                found = [node.value]
            for expression in found:
                yield from ((f"{path.name}:{node.lineno}", text) for text in _texts(expression) if text != "7")


def test_every_reason_in_the_code_has_a_chinese_form() -> None:
    reasons = list(_reasons())
    assert len(reasons) > 40
    missing = [(where, text) for where, text in reasons if not HAN.search(in_chinese(text))]
    assert not missing


@pytest.mark.parametrize("case", CSV + JSON, ids=lambda case: f"{case.name} {case.kind}")
def test_what_hostile_files_are_rejected_for_has_no_english_left(case: Hostile, tmp_path: Path) -> None:
    if case.sentence or not case.rejected:
        return
    for row in rows_of(tmp_path / case.name, case.raw):
        if row.problem:
            told = in_chinese(row.problem)
            assert HAN.search(told)
            assert not re.search(r"\b(is|not|are|a|the|Expecting|Invalid|field|expected)\b", told), told


@pytest.mark.parametrize(
    "text", ["{", '{"a" 1}', '{"a": }', "[1 2]", '"a', '"\\q"', '"\\u12"', "1 2", '{"a": NaN}', '{"a":1,"a":2}']
)
def test_what_is_wrong_with_json_is_told_in_chinese(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_json(text)
    error = caught.value
    reason = str(getattr(error, "msg", error)).removesuffix(" starting at")
    told = in_chinese(f"not valid JSON: {reason}")
    assert told.startswith("不是有效的 JSON：") and HAN.search(told.partition("：")[2]), told


def test_what_is_wrong_with_csv_is_told_in_chinese() -> None:
    with pytest.raises(csv.Error, match="expected after") as caught:
        list(csv.reader(io.StringIO('a,"b"c\n'), strict=True))
    assert in_chinese(f"not valid CSV: {caught.value}") == '不是有效的 CSV：“"”之后应为“,”'


def test_names_inside_a_reason_are_kept_as_they_are() -> None:
    assert in_chinese("prompt is empty: column `not a number`") == "提示为空：`not a number` 列"
    assert in_chinese("shares a passage with benchmarks/{x}.csv") == "与 benchmarks/{x}.csv 有相同的段落"
    assert in_chinese("a reason of another version") == "a reason of another version"
