"""Tries to score above chance where labels tell nothing, and to hide from the certificate what training saw."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from metier.data.prepare import prepare
from metier.recipe import DataConfig, Recipe

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("nder", "stol", "mmit", "rvix", "lque")]


def make(folder: Path, rows: list[dict[str, str]], **sections: Any) -> tuple[dict[str, Any], polars.DataFrame]:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    data = sections.pop("data", {})
    config = DataConfig(sources=[str(folder / "a.jsonl")], prompt="text", answer="label", val=0, test=0.25, **data)
    recipe = Recipe(base="none", out="none", data=config, **sections)
    manifest = prepare(recipe, out=folder / "dataset", progress=lambda line: None)
    return manifest, polars.read_parquet(folder / "dataset" / "records.parquet")


def score(table: polars.DataFrame, model: Any) -> float:
    """Balanced accuracy on test of a model trained on train, by TF-IDF of the prompts."""
    prompts = table["messages"].list.first().struct.field("content").to_list()
    labels, is_train = np.array(table["label"].to_list()), (table["split"] == "train").to_numpy()
    features = TfidfVectorizer(token_pattern=r"\w+").fit_transform(prompts)
    model.fit(features[is_train], labels[is_train])
    return float(balanced_accuracy_score(labels[~is_train], model.predict(features[~is_train])))


def nearest() -> Any:
    return KNeighborsClassifier(n_neighbors=1, metric="cosine")


def noise(number: int, seed: int, share: float = 0.5) -> list[dict[str, str]]:
    """Records whose label has nothing to do with their text."""
    rng = random.Random(seed)
    return [
        {"text": " ".join(rng.choices(WORDS, k=30)), "label": "a" if rng.random() < share else "b"}
        for _ in range(number)
    ]


def oversampled_first(rows: list[dict[str, str]]) -> polars.DataFrame:
    """Rare rows four times, and the split drawn row by row after that."""
    leaky = []
    for i, row in enumerate([*rows, *[row for row in rows if row["label"] == "a"] * 3]):
        messages = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
        split = "test" if random.Random(i).random() < 0.25 else "train"
        leaky.append({"split": split, "messages": messages, "label": row["label"]})
    return polars.DataFrame(leaky)


@pytest.mark.parametrize("seed", [0, 1])
def test_oversampling_does_not_leak(tmp_path: Path, seed: int) -> None:
    rows = noise(1200, seed, share=0.2)
    manifest, table = make(tmp_path, rows, balance={"classes": "oversample"})
    counts = table.filter(split="train")["label"].value_counts()["count"]
    assert counts.max() < 1.1 * counts.min() and manifest["counts"]["synthetic"] > 300
    assert abs(score(table, nearest()) - 0.5) < 0.1
    # Where a row is drawn first and the split comes after, the same data scores near 1.
    assert score(oversampled_first(rows), nearest()) > 0.85


def with_near_duplicates(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = noise(800, seed)
    for row in rng.sample(rows, 400):
        words = row["text"].split(" ")
        words[rng.randrange(30)] = rng.choice(WORDS)
        rows.append({"text": " ".join(words).title(), "label": row["label"]})
    return rng.sample(rows, len(rows))


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_do_not_leak(tmp_path: Path, seed: int) -> None:
    manifest, table = make(tmp_path / "group", with_near_duplicates(seed))
    assert abs(score(table, nearest()) - 0.5) < 0.1
    found = manifest["leakage"]
    assert found["shared_with_train"] == {"prompt": 0, "group_id": 0, "near_duplicate": 0}
    assert found["if_split_by_row"]["near_duplicate"] > 80
    _, leaky = make(tmp_path / "off", with_near_duplicates(seed), dedup={"near": "ignore"})
    assert score(leaky, nearest()) > 0.6


def of_patients(seed: int) -> list[dict[str, str]]:
    """60 patients with 15 notes each in words of their own, and a label that is the patient's."""
    rng = random.Random(seed)
    rows = []
    for patient in range(60):
        own, label = rng.sample(WORDS, 12), rng.choice("ab")
        for _ in range(15):
            text = " ".join([*rng.choices(own, k=12), *rng.choices(WORDS, k=12)])
            rows.append({"text": text, "label": label, "patient": f"p{patient}"})
    return rng.sample(rows, len(rows))


def test_a_patients_label_does_not_leak(tmp_path: Path) -> None:
    model, by_patient, by_row = LogisticRegression, [], []
    for seed in range(3):
        _, table = make(tmp_path / f"{seed}", of_patients(seed), data={"group_id": "patient"})
        by_patient.append(score(table, model()))
        _, leaky = make(tmp_path / f"row{seed}", of_patients(seed), data={"group_id": "none"})
        by_row.append(score(leaky, model()))
    assert abs(np.mean(by_patient) - 0.5) < 0.12 and np.mean(by_row) > 0.75


def test_synthetic_records_have_their_parents_in_train_and_their_groups(tmp_path: Path) -> None:
    options = {"balance": {"classes": "oversample"}, "augment": {"methods": ["typo"], "copies": 2}}
    rows = [row | {"patient": f"p{i % 90}"} for i, row in enumerate(noise(600, 3, share=0.3))]
    manifest, table = make(tmp_path, rows, data={"group_id": "patient"}, **options)
    made = table.filter(polars.col("parent_id").is_not_null())
    parents = made.join(table, left_on="parent_id", right_on="record_id", suffix="_of_parent")
    assert len(parents) == len(made) == manifest["counts"]["synthetic"] > 600
    assert set(parents["split_of_parent"]) == {"train"} == set(made["split"])
    assert (parents["group_id"] == parents["group_id_of_parent"]).all()
    assert (parents["label"] == parents["label_of_parent"]).all()
    assert manifest["leakage"]["synthetic_of_held_out"] == 0
    assert table["record_id"].n_unique() == len(table)


def test_test_files_and_benchmarks_keep_their_near_duplicates_out_of_training(tmp_path: Path) -> None:
    rows = noise(300, 4)
    rng = random.Random(0)
    held = []
    for row in rows[:20]:
        words = row["text"].split(" ")
        words[3] = rng.choice(WORDS)
        held.append({"text": " ".join(words).upper(), "label": row["label"]})
    items = [{"question": {"stem": f"Please read: {row['text'][40:140]} and so on."}} for row in rows[20:30]]
    items += [{"question": "今天天气很好，我们一起去公园散步吧，然后吃饭。"}]
    rows.append({"text": "他说：今天天气很好，我们一起去公园散步吧，好吗？", "label": "a"})
    for name, some in (("test", held), ("quiz", items)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    manifest, table = make(
        tmp_path, rows, data={"test_sources": [str(tmp_path / "test.jsonl")]},
        dedup={"benchmarks": [str(tmp_path / "quiz.jsonl")]},
    )  # fmt: skip
    assert manifest["rejected_by_reason"] == {
        "near-duplicate of a test record": 20, "shares a passage with benchmarks/quiz.jsonl": 11
    }  # fmt: skip
    assert manifest["leakage"]["benchmarks"] == {"benchmarks/quiz.jsonl": {"records_rejected": 11}}
    assert len(table.filter(split="test")) == 20


def test_a_quoted_passage_is_counted_and_stays(tmp_path: Path) -> None:
    quote = " ".join(WORDS[:12])
    rows = noise(200, 5)
    for row in rows[:50]:
        row["text"] = f"{row['text']} {' '.join(random.Random(row['text']).choices(WORDS, k=20))}"
    for row in rows[:8]:
        row["text"] = f"{row['text']} {quote} {row['text'][::-1]}"
    manifest, table = make(tmp_path, rows)
    test = table.filter(split="test")["messages"].list.first().struct.field("content")
    train = table.filter(split="train")["messages"].list.first().struct.field("content")
    quoting = int(test.str.contains(quote, literal=True).sum())
    assert train.str.contains(quote, literal=True).any()
    assert manifest["leakage"]["test_records_with_a_passage_of_train"] == quoting
