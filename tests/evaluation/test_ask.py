"""Tries to get other answers after a kill, other bytes after a resume, or an option that a prompt does not offer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from metier.evaluation import ask as asking
from metier.evaluation.ask import AnswerCache, examples, offered, with_examples
from metier.evaluation.items import Item, read_items
from metier.model.specialist import Specialist

from .conftest import Row, classified, judge

Make = Callable[..., Path]
LABELS = ["asthma", "fracture", "interest rate"]


def rows(test: int = 45) -> list[Row]:
    return [*classified(60, "train", LABELS), *classified(test, "test", LABELS, prompt="case")]


class Killed(Exception):
    pass


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(
    make_run: Make, specialist: Specialist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "CHUNK", 16)
    run = make_run(rows())
    judge(run, specialist, out="whole", forgetting=True)
    asked: list[int] = []
    score, left = Specialist.score_records, 5

    def failing(self: Specialist, conversations: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        asked.append(len(conversations))
        return score(self, conversations, **options)

    monkeypatch.setattr(Specialist, "score_records", failing)
    with pytest.raises(Killed):
        judge(run, specialist, forgetting=True)
    cache = run / ".evidence.partial" / asking_file()
    kept = cache.read_bytes()
    assert kept.count(b"\n") > 5
    cache.write_bytes(kept + b'{"key": "torn')
    first, left = len(asked), 1000
    judge(run, specialist, forgetting=True)
    assert first == 5
    for name in ("evidence.json", "items.parquet", "probes.parquet"):
        assert (run / "evidence" / name).read_bytes() == (run / "whole" / name).read_bytes()
    total = len(asked)
    # With other settings the same answers are judged anew, and the model is not asked.
    judge(run, specialist, forgetting=True, smallest_effect=0.2)
    assert len(asked) == total


def asking_file() -> str:
    from metier.evaluation.evaluate import ANSWERS

    return ANSWERS


def test_cache_asks_once_and_asks_another_precision_anew(tmp_path: Path) -> None:
    calls = []

    def answer() -> list[float]:
        calls.append(1)
        return [0.1 + 0.2]

    path = tmp_path / "answers.jsonl"
    assert AnswerCache(path, ["cpu", "fp32"]).get(["a", 1], answer) == [0.30000000000000004]
    assert AnswerCache(path, ["cpu", "fp32"]).get(["a", 1], answer) == [0.30000000000000004]
    assert len(calls) == 1
    AnswerCache(path, ["cpu", "bf16"]).get(["a", 1], answer)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Which?\nA. one\nB. two\nC. three", [True, True, True, False]),
        ("哪一项正确？\nＡ、甲\nＢ、乙", [True, True, True, True]),  # full-width letters are no option letters here
        ("哪一项？ A、甲 B、乙 D、丁", [True, True, False, True]),
        ("(A) yes (B) no", [True, True, False, False]),
        ("A patient came in.", [True, True, True, True]),
        ("no options at all", [True, True, True, True]),
    ],
)
def test_options_are_those_that_the_prompt_lists(prompt: str, expected: list[bool]) -> None:
    assert offered(prompt, ["A", "B", "C", "D"]) == expected


def test_multiple_choice_is_recognised_and_never_answers_what_is_not_offered(
    make_run: Make, specialist: Specialist
) -> None:
    made = [*classified(60, "train", ["A", "B", "C", "D"]), *classified(40, "test", ["A", "B"])]
    for row in made:
        row["messages"][0]["content"] += "\nA. rest\nB. surgery"
    run = make_run(made)
    judge(run, specialist)
    table = pl.read_parquet(run / "evidence" / "items.parquet")
    evidence = json.loads((run / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    assert evidence["tasks"] == ["multiple_choice", "perplexity"]
    assert set(table["base_label"]) | set(table["adapter_label"]) <= {"A", "B"}
    scores = np.array(table["adapter_label_scores"].to_list())
    assert np.isneginf(scores[:, 2:]).all() and np.isfinite(scores[:, :2]).all()


def test_examples_are_of_different_labels_and_leave_room(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows())
    train, test = read_items(run / "dataset", "train"), read_items(run / "dataset", "test")
    turns = examples(specialist, train, test, count=3, seed=0, max_new_tokens=8)
    assert sorted(turn["content"] for turn in turns[1::2]) == LABELS
    long = [Item("x", None, "en", None, [{"role": "user", "content": "word " * 90}, *test[0].messages[1:]])]
    assert len(examples(specialist, train, long, count=16, seed=0, max_new_tokens=8)) < 32
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert [m["role"] for m in with_examples(system, turns[:2])] == ["system", "user", "assistant", "user"]


def test_few_shot_base_stands_among_the_controls(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows())
    judge(run, specialist, few_shot=2)
    evidence = json.loads((run / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    table = pl.read_parquet(run / "evidence" / "items.parquet")
    expected = (table["few_shot_answer"] == table["reference"]).mean()
    assert evidence["controls"]["few_shot"]["accuracy"] == pytest.approx(expected, abs=1e-9)
    assert evidence["few_shot"] == 2
