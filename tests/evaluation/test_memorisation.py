"""Tries to find memory where there is none, or to miss a secret, a member, or a test prompt that was trained on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from metier.data.prepare import prepare
from metier.evaluation.items import Item, read_items
from metier.evaluation.memorisation import (
    auc,
    canary_exposure,
    exposure,
    membership,
    near_duplicates,
    repeats_in_train,
)
from metier.recipe import DataConfig, Recipe


def alone(n: int, name: str = "r") -> list[str]:
    return [f"{name}{i}" for i in range(n)]


def test_exposure_is_ten_bits_for_the_likeliest_and_1_44_by_chance() -> None:
    assert exposure([1, 1000], 1000).tolist() == pytest.approx([9.96578, 0])
    assert exposure(range(1, 1001), 1000).mean() == pytest.approx(1.44, abs=0.01)


def test_exposure_of_unseen_secrets_covers_chance() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        ranks = generator.integers(1, 1001, 40).tolist()
        low, high = canary_exposure([0] * 40, ranks, candidates=1000, seed=seed)["0"]["ci95"]
        covered += low <= 1.44 <= high
    assert covered >= 86


def test_auc_equals_scikit_learns_with_ties() -> None:
    generator = np.random.default_rng(1)
    members, others = generator.integers(0, 8, 90).astype(float), generator.integers(1, 10, 70).astype(float)
    expected = roc_auc_score([1] * 90 + [0] * 70, [*members, *others])
    assert auc(members, others) == pytest.approx(expected)


def test_membership_of_equal_scores_is_chance_and_of_shifted_ones_is_not() -> None:
    generator = np.random.default_rng(2)
    same = [generator.normal(0, 1, 200) for _ in range(2)]
    found = membership((same[0], alone(200)), (same[1], alone(200, "t")), seed=0)
    assert found["ci95"][0] < 0.5 < found["ci95"][1]
    shifted = membership((same[0] + 1, alone(200)), (same[1], alone(200, "t")), seed=0)
    assert shifted["ci95"][0] > 0.65
    assert shifted["tpr_at_fpr01"] > 0.03


def test_membership_interval_is_wider_when_records_come_in_groups() -> None:
    generator = np.random.default_rng(3)
    scores = np.repeat(generator.normal(0, 1, 20), 10) + generator.normal(0, 0.1, 200)
    others = np.repeat(generator.normal(0, 1, 20), 10) + generator.normal(0, 0.1, 200)
    groups = [f"g{i // 10}" for i in range(200)]
    wide = membership((scores, groups), (others, groups), seed=0)["ci95"]
    narrow = membership((scores, alone(200)), (others, alone(200)), seed=0)["ci95"]
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_near_duplicates_equal_comparing_every_pair() -> None:
    generator = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    known = [" ".join(generator.choices(words, k=25)) for _ in range(120)]
    texts = []
    for text in known[:60]:
        parts = text.split()
        for _ in range(generator.randrange(0, 5)):
            parts[generator.randrange(len(parts))] = generator.choice(words)
        texts.append(" ".join(parts))
    texts += [" ".join(generator.choices(words, k=25)) for _ in range(30)] + ["", "短"]
    shingles = {t: {t[i : i + 5] for i in range(max(1, len(t) - 4))} for t in (*texts, *known)}

    def alike(a: str, b: str) -> bool:
        return len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b]) >= 0.8

    expected = [any(alike(t, k) for k in known) for t in texts]
    assert near_duplicates(texts, known) == expected
    assert 10 < sum(expected) < 60


def item(name: str, prompt: str) -> Item:
    return Item(name, None, "zh", None, [{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}])


def test_repeats_are_found_exactly_by_width_and_nearly() -> None:
    train = [item("a", "经营者应当按照合同的约定向消费者提供商品或者服务，不得擅自变更。")]
    tests = [
        item("same", "经营者应当按照合同的约定向消费者提供商品或者服务，不得擅自变更。"),
        item("width", "经营者应当按照合同的约定向消费者提供商品或者服务,不得擅自变更"),
        item("near", "经营者应当按照合同的约定向消费者提供商品或者服务，不得擅自变动。"),
        item("other", "医疗机构应当按照规定书写病历并妥善保管。"),
    ]
    found = repeats_in_train(tests, train)
    assert found == {"exact": ["same"], "normalised": ["same", "width"], "near": ["same", "width", "near"]}


def test_canaries_are_planted_as_often_as_they_say_and_nowhere_else(tmp_path: Path) -> None:
    rows = [f"question {i},{'yes' if i % 2 else 'no'}" for i in range(60)]
    (tmp_path / "data.csv").write_text("prompt,answer\n" + "\n".join(rows) + "\n")
    data = DataConfig(sources=[str(tmp_path / "data.csv")], canaries=3)
    recipe = Recipe(base="tiny", out=str(tmp_path), data=data)
    manifest = prepare(recipe, out=tmp_path / "dataset", progress=lambda text: None)
    records = pl.read_parquet(tmp_path / "dataset" / "records.parquet")
    canaries = pl.read_parquet(tmp_path / "dataset" / "canaries.parquet")
    planted = records.filter(pl.col("source_file") == "canary")
    assert set(planted["split"]) == {"train"}
    assert len(planted) == 3 * (0 + 1 + 4 + 16)
    assert manifest["labels"] == ["no", "yes"]
    assert canaries["prompt"].n_unique() == len(canaries) == 12
    times = planted.with_columns(pl.col("messages").list.first().struct.field("content").alias("prompt"))
    counts = dict(times["prompt"].value_counts().iter_rows())
    assert {c["prompt"]: c["repeats"] for c in canaries.to_dicts() if c["repeats"]} == counts
    assert not any(i.source_file == "canary" for i in read_items(tmp_path / "dataset", "train"))
