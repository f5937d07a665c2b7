"""Tries to touch what is held out, to change an answer, a term or a number, or to lose count of what was repeated."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars
import pytest

from metier.data.augment import Variation, add_typos, augment, convert_unit, shuffle_options, swap_term
from metier.data.balance import class_weights, left_out, repeated
from metier.data.lines import Row, Source
from metier.data.prepare import prepare
from metier.data.records import Record
from metier.data.terms import Span, find_terms
from metier.domains import load_domain
from metier.errors import DataError
from metier.recipe import AugmentConfig, BalanceConfig, DataConfig, Recipe
from metier.training.train import read_weights

MEDICINE = load_domain("medicine")


def terms(prompt: str) -> list[Span]:
    return find_terms(MEDICINE, [prompt])[0]


def record(number: int, prompt: str, answer: str, file: str = "a.csv") -> Record:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Record(Source(Path(file), file, "csv", is_test=False), Row(number), messages, None, prompt)


def labelled(**counts: int) -> list[Record]:
    return [record(i, f"{label} {i}", label) for label, count in counts.items() for i in range(count)]


def test_oversampling_evens_the_labels_up_to_the_limit() -> None:
    made = repeated(labelled(a=100, b=40, c=5), BalanceConfig(classes="oversample"), task="classification", seed=0)
    assert Counter(r.answer for r in made) == {"b": 60, "c": 20}
    assert all(r.parent is not None and r.method == "repeat" for r in made)
    of_each = Counter(r.row.number for r in made if r.answer == "c")
    assert set(of_each.values()) == {4}
    assert max(Counter(r.row.number for r in made if r.answer == "b").values()) == 2


def test_undersampling_leaves_the_largest_at_the_limit_times_the_smallest() -> None:
    config = BalanceConfig(classes="undersample", limit=3)
    gone = left_out(labelled(a=100, b=40, c=5), config, task="classification", seed=0)
    assert Counter(r.answer for r in gone) == {"a": 85, "b": 25}
    assert left_out(labelled(a=9, b=3), config, task="generation", seed=0) == []


def test_files_weigh_what_the_recipe_says() -> None:
    records = [record(i, f"q {i}", "x", f"{name}.csv") for name in "abc" for i in range(40)]
    config = BalanceConfig(sources={"a.csv": 0.25, "b.csv": 2.5})
    assert len(left_out(records, config, task="generation", seed=0)) == 30
    assert Counter(r.source.name for r in repeated(records, config, task="generation", seed=0)) == {"b.csv": 60}


def test_weights_make_the_labels_even_and_have_a_limit() -> None:
    config = BalanceConfig(classes="weight", limit=4)
    weights = class_weights(labelled(a=60, b=36, c=4), config, task="classification")
    assert weights == {"a": 0.5556, "b": 0.9259, "c": 4.0}
    assert class_weights(labelled(a=60, b=4), config, task="generation") == {}
    assert class_weights(labelled(a=60, b=4), BalanceConfig(), task="classification") == {}


def test_weights_stand_beside_the_training_records_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"case {i * 7919}", "answer": "rare" if i % 9 == 0 else "common"} for i in range(180)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(
        base="none", out="none", data=DataConfig(sources=[str(tmp_path / "own.jsonl")], canaries=8),
        balance=BalanceConfig(classes="weight", limit=99), augment=AugmentConfig(methods=["typo"]),
    )  # fmt: skip
    manifest = prepare(recipe, out=tmp_path / "dataset", progress=lambda line: None)
    records = polars.read_parquet(tmp_path / "dataset" / "records.parquet")
    train = records.filter(split="train").drop_nulls("label")
    assert train.group_by("label").agg(polars.col("weight").sum()).select(
        polars.col("weight").max() / polars.col("weight").min()
    ).item() == pytest.approx(1, abs=1e-3)
    assert manifest["class_weights"].keys() == {"rare", "common"}
    held_out = records.filter(polars.col("split") != "train")
    assert held_out["weight"].null_count() == len(held_out) > 0
    assert read_weights(tmp_path / "dataset", "train").count(1.0) == records.filter(split="train")["label"].null_count()


def test_general_instructions_have_their_share_and_are_for_training_alone(tmp_path: Path) -> None:
    own = [{"prompt": f"Which code has the case {i * 7919}?", "answer": f"code {i % 4}"} for i in range(200)]
    general = [{"instruction": f"Name {i * 104729} things.", "output": f"thing {i}"} for i in range(100)]
    general.append({"instruction": own[0]["prompt"], "output": "no"})
    for name, rows in (("own", own), ("general", general)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe(
        base="none", out="none", data=DataConfig(sources=[str(tmp_path / "own.jsonl")]),
        balance=BalanceConfig(general=[str(tmp_path / "general.jsonl")], general_share=0.2),
    )  # fmt: skip
    manifest = prepare(recipe, out=tmp_path / "dataset", progress=lambda line: None)
    records = polars.read_parquet(tmp_path / "dataset" / "records.parquet")
    mixed = records.filter(method="general")
    assert len(mixed) == 40 and set(mixed["split"]) == {"train"} and mixed["label"].null_count() == 40
    assert manifest["counts"]["rows"] == 301 and manifest["labels"] == [f"code {i}" for i in range(4)]
    assert manifest["rejected_by_reason"]["not needed for balance.general_share"] >= 60
    assert set(mixed["source_file"]) == {"general/general.jsonl"}


def test_options_are_shuffled_and_the_answer_follows() -> None:
    prompt = "Which gas?\nA. oxygen\nB. neon\nC. argon\nD. xenon"
    seen = set()
    for seed in range(30):
        changed = shuffle_options(prompt, "C. argon", random.Random(seed))
        assert changed is not None
        text, answer = changed
        options = dict(re.findall(r"^([A-D])\. (\w+)$", text, re.M))
        assert sorted(options.values()) == ["argon", "neon", "oxygen", "xenon"] and options[answer[0]] == "argon"
        seen.add(answer[0])
    assert seen == set("ABCD")
    chinese = shuffle_options("下列哪项正确？\nA．甲\nB．乙\nC．丙", "B", random.Random(1))
    assert chinese is not None and dict(re.findall(r"([A-C])．(.)", chinese[0]))[chinese[1]] == "乙"


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("A. one\nB. two\nC. all of the above", "C"), ("A. 甲\nB. 乙\nC. 以上都是", "C"), ("no options", "A"),
        ("A. one\nB. two", "one"), ("A. one\nC. two", "A"), ("A. one\nB. two", "C"),
        ("A. one\nB. two\nC. A and B", "C"),
    ],
)  # fmt: skip
def test_options_that_depend_on_their_order_are_left_alone(prompt: str, answer: str) -> None:
    assert shuffle_options(prompt, answer, random.Random(0)) is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("HbA1c was 8.4 % today", "HbA1c was 68 mmol/mol today"),
        ("患者糖化血红蛋白为8.4%，余正常", "患者糖化血红蛋白为68mmol/mol，余正常"),
        ("fasting glucose 5.6 mmol/L", "fasting glucose 101 mg/dL"),
        ("体温38.5℃", "体温101.3℉"),
    ],
)
def test_a_quantity_keeps_its_meaning_in_another_unit(prompt: str, expected: str) -> None:
    assert convert_unit(prompt, "x", MEDICINE.units, random.Random(0)) == expected
    number = re.search(r"\d+\.\d", prompt)
    assert number and convert_unit(prompt, f"It is {number[0]}.", MEDICINE.units, random.Random(0)) is None


def test_terms_change_their_name_unless_they_are_asked_for() -> None:
    prompt = "Signs of atrial fibrillation after surgery"
    assert swap_term(prompt, "palpitations", MEDICINE, terms(prompt), random.Random(0)) == "Signs of AF after surgery"
    assert swap_term(prompt, "AF causes palpitations", MEDICINE, terms(prompt), random.Random(0)) is None
    assert (
        swap_term("慢阻肺的症状", "气促", MEDICINE, terms("慢阻肺的症状"), random.Random(0)) == "慢性阻塞性肺疾病的症状"
    )
    assert swap_term("nothing here", "x", MEDICINE, [], random.Random(0)) is None


def test_typos_touch_no_term_number_or_negation() -> None:
    prompt = "without any hypertension the patient received 250 mg amoxicillin yesterday in WARD12 morning"
    for seed in range(40):
        text = add_typos(prompt, terms(prompt), random.Random(seed))
        assert text and text != prompt and len(text) == len(prompt) and sorted(text) == sorted(prompt)
        for kept in ("without", "hypertension", "250 mg", "WARD12"):
            assert kept in text
    assert add_typos("短文本", [], random.Random(0)) is None


@pytest.mark.parametrize("method", ["instruction", "options", "terms", "units", "typo", "width", "entities"])
def test_a_variant_differs_from_its_parent_in_the_prompt_alone(method: Any) -> None:
    records = [
        record(1, "Which of these lowers high blood pressure?\nA. salt\nB. exercise\nC. sugar", "B"),
        record(2, "患者糖化血红蛋白为8.4%，诊断为糖尿病，(复诊)。", "内分泌科"),
        record(3, "fasting glucose 5.6 mmol/L during pregnancy", "Obstetrics"),
        record(4, "患者王小明，2024年3月12日就诊于华信医院。", "内分泌科"),
    ]

    def once() -> list[Record]:
        config = AugmentConfig(methods=[method], copies=2)
        return augment(records, Variation(config, MEDICINE, 0, "classification"), rewritten={})

    made = once()
    assert [r.messages for r in made] == [r.messages for r in once()]
    for variant in made:
        parent = variant.parent
        assert parent in records and variant.prompt != parent.prompt and variant.method == method
        assert variant.answer == parent.answer or method == "options"
        assert variant.messages[0]["content"] == variant.prompt and variant.group_id == parent.group_id
    assert made, "the method never applied"


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"balance": {"sources": {"b.jsonl": 2.0}}}, "no source is called `b.jsonl` .did you mean `a.jsonl`"),
        ({"balance": {"classes": "weight"}, "data": {"task": "generation"}}, "the answers were taken for text"),
    ],
)
def test_a_balance_that_would_do_nothing_is_a_sentence(tmp_path: Path, sections: Any, sentence: str) -> None:
    rows = [{"text": f"t {i} {i * 7919 % 997}", "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"sources": [str(tmp_path / "a.jsonl")], **sections.pop("data", {})}
    recipe = Recipe.model_validate({"base": "none", "out": "none", "data": data, **sections})
    with pytest.raises(DataError, match=sentence):
        prepare(recipe, out=tmp_path / "dataset", progress=lambda line: None)


def test_a_method_that_needs_a_domain_asks_for_it() -> None:
    with pytest.raises(ValueError, match="units takes its wordings"):
        Recipe.model_validate({"base": "b", "out": "o", "data": {"sources": ["a"]}, "augment": {"methods": ["units"]}})


def test_a_method_that_made_nothing_is_counted_and_general_records_are_not_synthetic(tmp_path: Path) -> None:
    rows = [{"text": f"t {i} {i * 7919 % 997}", "label": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    general = [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(10)]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    values = {"data": {"sources": [str(tmp_path / "a.jsonl")]}, "augment": {"methods": ["options"]}}
    values |= {"balance": {"general": [str(tmp_path / "general.jsonl")]}}
    recipe = Recipe.model_validate({"base": "none", "out": "none", **values})
    manifest = prepare(recipe, out=tmp_path / "dataset", progress=lambda line: None)
    assert manifest["synthetic_by_method"] == {"options": 0} and manifest["counts"]["synthetic"] == 0
