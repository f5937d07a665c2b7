"""Tries to make cleaning change what can be seen, lose a record or its place, or miss what it is there to find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.data.clean import Cleaned, clean, contradictions
from metier.data.lines import Row, Source
from metier.data.normalize import apply_edits, find_edits, is_mojibake, original_offset
from metier.data.prepare import prepare
from metier.data.records import Record
from metier.recipe import CleanConfig, parse_recipe

SOURCE = Source(Path("a.csv"), "a.csv", "csv", is_test=False)
TEST = Source(Path("t.csv"), "t.csv", "csv", is_test=True)


def record(prompt: str, answer: str | None = "label", number: int = 1, source: Source = SOURCE) -> Record:
    if answer is None:
        return Record(source, Row(number), [{"role": "text", "content": prompt}], None, prompt)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record(source, Row(number), messages, None, prompt)


def tidy(text: str, **rules: Any) -> str:
    return apply_edits(text, find_edits(text, CleanConfig(**rules)))


@pytest.mark.parametrize(
    "text",
    [
        "ICD-10 E11.9, HbA1c 7.2 %, 0.5 g bid, P/E 15.3x, R² = 0.9, m², ①, ½, 10⁻³, µg/ml, ㎎, Ⅲ期",
        "def f(x):\n    if x < 3 and y > 2:  \n\treturn a[0] & b | c\n\n\n\n```\n<div>\n```",
        "\u3000\u3000甲方(以下简称“公司”):第三条……——见《合同法》,共1,000元;是吗?好!",
        "繁體中文與简体并存,ｶﾀｶﾅ、한국어、עברית \u200fאב\u200e, \u0645\u06cc\u200c\u062e\u0648, 👩\u200d⚕️ é e\u0301",
        "AT&T; R&D; a<b; x &lt; y; 3 < 5 > 2; <patient>",
    ],
)
def test_the_default_rules_leave_what_can_be_seen(text: str) -> None:
    assert tidy(text) == text


@pytest.mark.parametrize(
    ("text", "rules", "wanted"),
    [
        ("a\u200bb\ufeff\u00adc\x07d\u2060", {}, "abcd"),
        ("\u202a13800138000\u202c", {}, "13800138000"),
        ("a\r\nb\rc\u2028d\x0ce\x0bf", {}, "a\nb\nc\nd\ne\nf"),
        ("a\u00a0b\u2009c\u3000d", {}, "a b c\u3000d"),
        ("\uff21\uff22\uff11\uff12\uff0e\uff15\uff05\uff0c\uff08\uff09\uff0e", {}, "AB12.5%\uff0c\uff08\uff09."),
        ("a &amp; b&nbsp;c<br/>d<p class='x'>e</p><!-- n -->", {"html": True}, "a & b\u00a0c\nd\ne\n"),
        ("\uff11\u200b\r\n", {"width": False, "control": False, "whitespace": False}, "\uff11\u200b\r\n"),
    ],
)  # fmt: skip
def test_each_rule_changes_what_it_says(text: str, rules: dict[str, Any], wanted: str) -> None:
    assert tidy(text, **rules) == wanted


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a1好\u200b\r\n\uff11\uff0e\u00a0&<>br;/\ufeff \x07\u200e"), max_size=40))
def test_an_offset_leads_back_to_the_same_character_and_a_second_pass_changes_nothing(text: str) -> None:
    config = CleanConfig()
    edits = find_edits(text, config)
    new = apply_edits(text, edits)
    assert find_edits(new, config) == []
    for position, character in enumerate(new):
        before = text[original_offset(edits, position)]
        assert before == character or ord(before) - 0xFEE0 == ord(character) or character in "\n "


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("caf\u00c3\u00a9", True),
        ("it\u00e2\u20ac\u2122s", True),
        ("锟斤拷", True),
        ("x\ufffd", True),
        ("你好，这是一个测试。我们在这里".encode().decode("gbk", "replace"), True),
        ("smart\x92", True),
        ("é à ü ß Ångström", False),
        ("患者主诉头痛三天，伴恶心。", False),
        ("Âge: 5 ans, LAÂ", False),
        ("涓流与浣熊", False),
    ],
)
def test_mojibake_is_told_from_text(text: str, wanted: bool) -> None:
    assert is_mojibake(text) is wanted


def test_records_are_left_out_with_the_rule_that_says_so() -> None:
    records = [record("hi", number=1), record("x" * 50, number=2), record("這是中文的問題", number=3),
               record("\u200b", number=4), record("a good question", "\u200b", 5), record("Ã© bad text", number=6),
               record("long enough", number=7)]  # fmt: skip
    config = CleanConfig(min_chars=3, max_chars=40, languages=["en"], mojibake="reject")
    cleaned = clean(records, config)
    assert [r.row.number for r in cleaned.records] == [7]
    assert {r.row.number: r.problem for r in cleaned.rejected} == {
        1: "shorter than clean.min_chars (3)",
        2: "longer than clean.max_chars (40)",
        3: "its language is zh, not en",
        4: "prompt is empty after cleaning",
        5: "answer is empty after cleaning",
        6: "text that was read in a wrong encoding (mojibake)",
    }
    report = cleaned.report(config)
    assert {rule: report[rule]["records"] for rule in ("min_chars", "max_chars", "languages", "mojibake")} == {
        "min_chars": 1, "max_chars": 1, "languages": 1, "mojibake": 1,
    }  # fmt: skip
    assert report["languages"]["setting"] == "en" and report["min_chars"]["examples"] == ["a.csv:1"]
    assert clean([], CleanConfig()).report(CleanConfig())["max_chars"]["setting"] is False


def test_a_kept_finding_is_counted_with_its_places() -> None:
    records = [record(f"<b>q</b> {i}", "a\u200b", number=i) for i in range(1, 9)]
    report = clean(records, CleanConfig()).report(CleanConfig())
    assert report["html"] == {"setting": False, "records": 8, "examples": [f"a.csv:{i}" for i in range(1, 6)]}
    assert report["control"]["records"] == 8 and report["control"]["setting"] is True
    assert report["width"]["records"] == 0


def test_shared_first_and_last_lines_are_counted_and_taken_out_when_asked() -> None:
    foot = "This message is confidential."
    records = [record(f"news {i}\nbody {i}\n{foot}", None, i) for i in range(30)]
    records += [record(foot, None, 30), record("Only this one stands here\nbody", None, 31)]
    kept = clean(records, CleanConfig())
    assert kept.found["boilerplate"].count == 30 and kept.records[0].prompt.endswith(foot)
    removed = clean(records, CleanConfig(boilerplate="remove")).records
    assert removed[3].messages == [{"role": "text", "content": "news 3\nbody 3"}]
    assert removed[3].prompt == "news 3\nbody 3"
    assert removed[30].prompt == foot and removed[31].prompt == "Only this one stands here\nbody"


@pytest.mark.parametrize(
    ("policy", "left"), [("keep", [1, 2, 3, 4, 5, 6, 7]), ("drop", [6, 7]), ("majority", [1, 2, 6, 7])]
)
def test_contradictory_labels_are_listed_and_go_by_the_policy(policy: str, left: list[int]) -> None:
    records = [record("Same  q", "a", 1), record("same q", "a", 2), record("same q", "b", 3), record("tie", "a", 4),
               record("tie", "b", 5), record("other", "b", 6), record("same q", "b", 7, TEST)]  # fmt: skip
    records[6] = record("same q", "c", 7, TEST)
    cleaned = Cleaned(records)
    out = {id(r) for r in contradictions(cleaned.records, policy, cleaned)}
    assert [r.row.number for r in cleaned.records if id(r) not in out] == left
    assert cleaned.found["contradictions"].count == 6


def test_script_is_converted_by_phrases() -> None:
    pytest.importorskip("opencc")
    cleaned = clean([record("頭髮與發展")], CleanConfig(script="simplified"))
    assert cleaned.records[0].prompt == "头发与发展" and cleaned.found["script"].first == ["a.csv:1"]
    damaged = clean([record("锟斤拷 我的卡")], CleanConfig(script="traditional", mojibake="reject"))
    assert not damaged.records and damaged.found["mojibake"].first == ["a.csv:1"]


def test_cleaning_stands_in_manifest_and_card_and_every_row_is_accounted_for(tmp_path: Path) -> None:
    rows = [{"text": f"\uff21 question {i}", "label": "ab"[i % 2]} for i in range(40)]
    rows += [{"text": "hi", "label": "a"}, {"text": "\uff21 question 1", "label": "a"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "base: b\nout: o\ndata: {sources: [a.jsonl]}\nclean: {min_chars: 4, contradictions: drop}\n"
    recipe = parse_recipe(text, name="r", folder=tmp_path)
    manifest = prepare(recipe, out=tmp_path / "dataset", progress=lambda line: None)
    counts = manifest["counts"]
    assert counts["rows"] == 42 and counts["kept"] + counts["rejected"] == 42
    assert manifest["rejected_by_reason"] == {
        "same prompt as a record with another label": 2,
        "shorter than clean.min_chars (4)": 1,
    }
    assert manifest["cleaning"]["width"]["records"] == 41
    kept = polars.read_parquet(tmp_path / "dataset" / "records.parquet")["messages"].to_list()
    assert all(messages[0]["content"].startswith("A question") for messages in kept)
    card = (tmp_path / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8")
    assert "| width | on | 41 |" in card and "| contradictions | drop | 2 |" in card


def test_every_contradiction_is_listed_without_a_search_for_near_duplicates(tmp_path: Path) -> None:
    rows = [{"text": f"question {i}", "label": "abc"[i % 3]} for i in range(60)]
    rows += [{"text": "Question  1", "label": "a"}, {"text": "question 1", "label": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    recipe = parse_recipe(
        "base: b\nout: o\ndata: {sources: [a.jsonl]}\ndedup: {near: ignore}\n", name="r", folder=tmp_path
    )
    manifest = prepare(recipe, out=tmp_path / "dataset", progress=lambda line: None)
    listed = polars.read_parquet(tmp_path / "dataset" / "conflicts.parquet")
    assert sorted(listed.select("label", "other_label").rows()) == [("b", "a"), ("b", "c")]
    assert manifest["label_conflicts"] == 2 and manifest["rejected_examples"] == {"prompt is empty": ["a.jsonl:63"]}
    card = (tmp_path / "dataset" / "DATA_CARD.md").read_text(encoding="utf-8")
    assert "| prompt is empty | 1 | a.jsonl:63 |" in card and "未查找近似重复" in card and "近似重复 0 条" not in card
