"""Tries to get a column's meaning wrong, to split a person in two, and to lose the turns of a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars
import pytest

from metier.data.prepare import prepare
from metier.data.proposals import propose
from metier.data.roles import find_roles
from metier.data.sources import find_sources, read_columns
from metier.errors import DataError
from metier.recipe import DataConfig, parse_recipe


def proposed(folder: Path, rows: list[dict[str, Any]], **config: Any) -> dict[str, tuple[str | None, float, str]]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(sources=[str(path)], **config)
    (source,) = find_sources(data)
    found = propose(source, find_roles(data, read_columns(source), path))
    return {p["column"]: (p["role"], p["confidence"], p["by"]) for p in found}


def make(folder: Path, rows: list[dict[str, Any]] | dict[str, Any], data: str, more: str = "") -> dict[str, Any]:
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    text = f"base: b\nout: o\ndata: {{sources: [a.json]{data}}}\n{more}"
    recipe = parse_recipe(text, name="r", folder=folder)
    return prepare(recipe, out=folder / "dataset", progress=lambda line: None)


def records(folder: Path) -> polars.DataFrame:
    return polars.read_parquet(folder / "dataset" / "records.parquet")


def test_every_column_is_proposed_with_a_confidence(tmp_path: Path) -> None:
    rows = [
        {
            "q": f"a question of some length about number {i}", "verdict": "ab"[i % 2], "case_id": f"c{i // 4}",
            "就诊日期": "2024-01-02", "seen": f"2024/1/{i % 9 + 1} 10:00", "key": f"k{i}", "spoken": "zh-CN",
            "lang": "xx", "free": "", "sentiment": "good",
        }
        for i in range(40)
    ]  # fmt: skip
    assert proposed(tmp_path, rows, prompt="q", answer="verdict") == {
        "q": ("prompt", 1.0, "taken"),
        "verdict": ("answer", 1.0, "taken"),
        "case_id": ("group_id", 1.0, "taken"),
        "就诊日期": ("date", 0.9, "name"),
        "seen": ("date", 0.7, "values"),
        "key": ("id", 0.6, "values"),
        "spoken": ("language", 0.7, "values"),
        "lang": ("language", 0.9, "name"),
        "free": (None, 0.0, "values"),
        "sentiment": ("label", 0.9, "name"),
    }


@pytest.mark.parametrize("column", ["patient_id", "病历号", "Customer_ID"])
def test_a_person_is_found_and_stands_in_one_split(tmp_path: Path, column: str) -> None:
    rows = [{"text": f"note {i} {i * 7919 % 997}", "label": "ab"[i % 2], column: f"p{i // 5}"} for i in range(200)]
    manifest = make(tmp_path, rows, "")
    assert manifest["roles"]["group_id"] == column
    splits = records(tmp_path).group_by("group_id").agg(polars.col("split").n_unique())
    assert len(splits) == 40 and splits["split"].max() == 1


def test_a_found_group_may_be_empty_and_a_named_one_may_not(tmp_path: Path) -> None:
    rows = [{"text": f"t {i}", "label": "ab"[i // 2 % 2], "user_id": f"u{i}" if i % 2 else ""} for i in range(40)]
    assert make(tmp_path, rows, "")["counts"]["rejected"] == 0
    assert make(tmp_path, rows, ", group_id: user_id")["rejected_by_reason"] == {"group_id is empty": 20}
    assert "group_id" not in make(tmp_path, rows, ", group_id: none")["roles"]


def test_a_column_that_is_the_prompt_or_the_answer_groups_nothing() -> None:
    config = DataConfig(sources=["a"], prompt="Who: {patient}", answer="user_id")
    assert find_roles(config, ["patient", "user_id", "x"], Path("a")).group_id is None
    with pytest.raises(DataError, match="no column `nobody`"):
        find_roles(DataConfig(sources=["a"], group_id="nobody"), ["text", "label"], Path("a"))


def test_history_comes_before_the_prompt(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"and {i}?", "output": f"answer {i}", "history": [["first", "one"]]} for i in range(18)
    ]
    rows += [{"instruction": "alone", "output": "x", "history": []}]
    rows += [{"instruction": "text", "output": "x", "history": '[["a", "b"]]'}]
    rows += [{"instruction": "bad", "output": "x", "history": ["a"]}]
    manifest = make(tmp_path, rows, "")
    assert manifest["roles"]["history"] == "history"
    reason = "history is not a list of [question, answer] pairs; `data.history: none` leaves the column out"
    assert manifest["rejected_by_reason"] == {reason: 1}
    card = (tmp_path / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8")
    assert (
        f"| {reason} | 1 |" in card
        and "| 历史对话不是 [问，答] 对的列表；设 `data.history: none` 可不用该列 | 1 |" in card
    )
    turns = {m[-2]["content"]: [t["content"] for t in m] for m in records(tmp_path)["messages"].to_list()}
    assert turns["and 3?"] == ["first", "one", "and 3?", "answer 3"]
    assert turns["alone"] == ["alone", "x"] and turns["text"] == ["a", "b", "text", "x"]


def test_the_test_split_of_a_json_file_stays_the_test_split(tmp_path: Path) -> None:
    rows = [{"text": f"t {i} {i * 7919 % 997}", "label": "ab"[i % 2]} for i in range(50)]
    manifest = make(tmp_path, {"train": rows[:40], "test": rows[40:]}, "")
    assert manifest["splits"] == {"train": 36, "val": 4, "test": 10}
    assert set(records(tmp_path).filter(split="test")["source_file"]) == {"a.json#test"}


def test_where_the_names_say_nothing_the_values_propose(tmp_path: Path) -> None:
    rows = [
        {"编号": f"{i:04d}", "诉求": f"客户{i}反映手机银行不能登录", "处理": "投诉咨询"[i % 2 * 2 :][:2], "备": f"{i}"}
        for i in range(40)
    ]
    with pytest.raises(DataError, match="it is not clear which column") as caught:
        make(tmp_path, rows, "")
    assert caught.value.hint and "data: {prompt: 诉求, answer: 处理}" in caught.value.hint


def test_a_history_in_words_and_a_system_that_is_none_can_be_left_out(tmp_path: Path) -> None:
    rows = [
        {"question": f"q {i} {i * 7919 % 997}", "answer": f"a {i}", "history": "asthma", "system": "iOS"}
        for i in range(40)
    ]
    with pytest.raises(DataError, match="`data.history: none` leaves the column out"):
        make(tmp_path, rows, "")
    roles = make(tmp_path, rows, ", history: none, system: none", "dedup: {near: ignore}")["roles"]
    assert roles == {"prompt": "question", "answer": "answer", "how": "found"}
    named = make(
        tmp_path,
        [{**row, "history": [[row["question"], "y"]]} for row in rows],
        ", history: history",
        "dedup: {near: ignore}",
    )["roles"]
    assert named["history"] == "history"
    with pytest.raises(DataError, match="`data.history` needs prompts"):
        make(tmp_path, rows, ", text: question, history: history")
