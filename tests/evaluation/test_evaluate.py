"""Tries to make the evidence differ between two runs, count wrongly, or judge what cannot be judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import accuracy_score

from metier.artifacts import is_current, read_manifest
from metier.errors import DataError, ModelError, RecipeError, RunError
from metier.evaluation.items import Item, choose_items
from metier.model.specialist import Specialist

from .conftest import Row, classified, judge

Make = Callable[..., Path]
LABELS = ["asthma", "fracture", "interest rate"]


def rows(test: int = 45) -> list[Row]:
    return [
        *classified(60, "train", LABELS),
        *classified(12, "val", LABELS),
        *classified(test, "test", LABELS, prompt="case"),
    ]


def read(run: Path, out: str = "evidence") -> dict[str, Any]:
    return json.loads((run / out / "evidence.json").read_text(encoding="utf-8"))


def test_two_evaluations_of_the_same_inputs_are_byte_identical(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows())
    first, second = judge(run, specialist), judge(run, specialist, out="again")
    for name in ("evidence.json", "items.parquet"):
        assert (run / "evidence" / name).read_bytes() == (run / "again" / name).read_bytes()
    assert first["digest"] == second["digest"]
    assert is_current(run / "evidence", "key")
    assert first["parents"] == {k: (read_manifest(run / k) or {})["digest"] for k in ("dataset", "adapter")}


def test_classification_evidence_agrees_with_its_items_and_the_model(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows())
    judge(run, specialist)
    evidence, items = read(run), pl.read_parquet(run / "evidence" / "items.parquet")
    assert list(evidence["metrics"]) == [
        "accuracy", "macro_f1", "accuracy_generated", "invalid_share", "perplexity", "bits_per_byte",
    ]  # fmt: skip
    for side, use in (("base", False), ("adapter", True)):
        expected = accuracy_score(items["reference"], items[f"{side}_label"])
        assert evidence["metrics"]["accuracy"][side] == pytest.approx(expected, abs=1e-11)
        nll = items[f"{side}_nll"].to_numpy()
        assert evidence["metrics"]["perplexity"][side] == pytest.approx(np.exp(nll.sum() / items["num_tokens"].sum()))
        prompts = [[{"role": "user", "content": f"case {i} kind{i % 3}"}] for i in range(3)]
        scores = specialist.score_choices(prompts, LABELS, use_adapter=use)
        assert items[f"{side}_label"][:3].to_list() == [LABELS[k] for k in scores.argmax(1)]
    assert {v["n"] for v in evidence["slices"]["label"].values()} == {15}
    assert evidence["controls"]["naive_bayes"]["accuracy"] == 1.0
    assert evidence["controls"]["majority_class"]["accuracy"] == pytest.approx(1 / 3)
    assert evidence["cost"]["adapter_bytes"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size


def test_one_test_record_is_not_enough_data(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(test=1))
    verdict = judge(run, specialist)["verdict"]
    assert verdict["outcome"] == "not enough data"
    assert "1 test records, and at least 30 are needed" in verdict["statement"]


def test_few_groups_are_not_enough_data_and_named(make_run: Make, specialist: Specialist) -> None:
    made = [{**row, "group_id": f"patient {i % 4}"} for i, row in enumerate(rows())]
    run = make_run(made)
    assert "come from 4 groups" in judge(run, specialist)["verdict"]["statement"]


def test_dataset_without_test_records_is_refused_and_leaves_nothing(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(test=0))
    with pytest.raises(DataError, match="no test records"):
        judge(run, specialist)
    assert not (run / "evidence").exists()


def test_missing_adapter_is_refused(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows())
    (run / "adapter" / "manifest.json").unlink()
    with pytest.raises(RunError, match="no complete adapter"):
        judge(run, specialist)


def test_task_that_the_data_cannot_be_asked_is_refused(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows(), task="generation")
    with pytest.raises(RecipeError, match="`classification`, and the dataset's task is `generation`"):
        judge(run, specialist, tasks=["classification"])


def test_diverged_model_is_named_instead_of_written_as_nan(make_run: Make, specialist: Specialist) -> None:
    import torch

    run = make_run(rows(test=3))
    assert specialist.adapter is not None
    kept = {k: v.clone() for k, v in specialist.adapter.tensors().items()}
    specialist.adapter.load({k: torch.full_like(v, float("nan")) for k, v in kept.items()})
    try:
        with pytest.raises(ModelError, match="the adapter gives no finite likelihood for 3 of 3"):
            judge(run, specialist)
    finally:
        specialist.adapter.load(kept)


def test_generation_of_chinese_is_scored_by_characters(make_run: Make, specialist: Specialist) -> None:
    made = [{**row, "label": None, "language": "zh"} for row in rows(test=33)]
    for row in made:
        row["messages"] = [
            *row["messages"][:1],
            {"role": "assistant", "content": "经营者应当按照合同的约定提供商品或者服务"},
        ]
    run = make_run(made, task="generation")
    judge(run, specialist)
    evidence = read(run)
    assert evidence["verdict"]["primary_metric"] == "chrf"
    assert {"exact_match", "bleu", "chrf", "perplexity"} <= set(evidence["metrics"])
    assert evidence["controls"] == {}


def test_plain_text_has_perplexity_alone(make_run: Make, specialist: Specialist) -> None:
    made = [
        {**row, "label": None, "messages": [{"role": "text", "content": row["messages"][0]["content"]}]}
        for row in rows(35)
    ]
    run = make_run(made, task="text")
    judge(run, specialist)
    evidence, items = read(run), pl.read_parquet(run / "evidence" / "items.parquet")
    assert list(evidence["metrics"]) == ["perplexity", "bits_per_byte"]
    assert items["adapter_completion"].null_count() == items["adapter_correct"].null_count() == 35


def test_limits_name_unseen_labels_repeated_prompts_and_the_choice(make_run: Make, specialist: Specialist) -> None:
    made = [*classified(30, "train", LABELS[:2]), *classified(40, "test", LABELS)]
    run = make_run(made)
    judge(run, specialist, max_items=35)
    limits = " ".join(read(run)["limits"])
    assert "1 labels of the test records never occur in training: interest rate" in limits
    assert "35 of 40 test records were judged" in limits
    assert "test prompts also stand in the training records" in limits


def test_choice_of_items_depends_on_the_seed_not_on_the_order() -> None:
    items = [Item(f"r{i}", None, "en", None, [{"role": "text", "content": "x"}]) for i in range(50)]
    chosen = choose_items(items, max_items=10, seed=1)
    assert chosen == choose_items(items[::-1], max_items=10, seed=1)
    assert chosen != choose_items(items, max_items=10, seed=2)
    assert choose_items(chosen, max_items=None, seed=1) == chosen


def test_records_that_cannot_be_asked_are_left_out_and_counted(make_run: Make, specialist: Specialist) -> None:
    made = [*classified(30, "train", LABELS), *classified(40, "test", LABELS)]
    too_long, control = made[-1], made[-2]
    too_long["messages"] = [{"role": "user", "content": "word " * 600}, too_long["messages"][-1]]
    spelled = f"x {specialist.base.tokenizer.eos_token} y"
    control["messages"] = [{"role": "user", "content": spelled}, control["messages"][-1]]
    run = make_run(made)
    judge(run, specialist)
    evidence = read(run)
    assert evidence["n"] == 38
    assert set(evidence["left_out"]) == {too_long["record_id"], control["record_id"]}
    assert any(limit.startswith("2 test records could not be asked") for limit in evidence["limits"])
    assert spelled not in str(evidence)


def test_every_key_and_column_is_documented_in_both_languages(make_run: Make, specialist: Specialist) -> None:
    run = make_run(rows())
    judge(run, specialist)
    evidence = read(run)
    columns = [
        *pl.read_parquet(run / "evidence" / "items.parquet").columns,
        *evidence,
        *evidence["metrics"]["accuracy"],
    ]
    columns += pl.read_parquet(run / "evidence" / "probes.parquet").columns
    for page in ("evidence.md", "evidence.zh-CN.md"):
        text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
        missing = [c for c in columns if f"`{c.removeprefix('base_').removeprefix('adapter_')}`" not in text]
        assert missing == [], page


def test_one_class_is_judged_and_said(make_run: Make, specialist: Specialist) -> None:
    run = make_run([*classified(30, "train", LABELS), *classified(35, "test", LABELS[:1], prompt="case")])
    judge(run, specialist)
    evidence = read(run)
    assert any(limit.startswith("All judged records have one label") for limit in evidence["limits"])
    assert 0 <= evidence["metrics"]["macro_f1"]["adapter"] <= 1


def test_models_that_answer_nothing_get_zeros_that_are_said_not_a_crash() -> None:
    from metier.evaluation.behaviour import behaviour
    from metier.evaluation.compare import Design, compare
    from metier.evaluation.items import Answers
    from metier.evaluation.tasks import build_metrics

    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答案"}]
    items = [Item(f"r{i}", None, "zh", None, messages) for i in range(40)]
    ones = np.ones(40)
    silent = Answers(ones, ones, ones, None, None, [""] * 40, np.ones(40, dtype=bool))
    for asked in (["generation", "perplexity"], ["extraction", "perplexity"]):
        found = build_metrics(items, silent, silent, asked=asked, labels=[])
        results = compare(found, [i.group for i in items], Design(200, 0))
        assert all(np.isfinite([r["adapter"], *r["ci95"]]).all() for r in results.values())
        assert results["exact_match"]["adapter"] == 0
    metrics = behaviour(["答案"] * 40, ([""] * 40, [""] * 40), (silent.stopped, silent.stopped))
    shares = {m.name: float(m.value(m.adapter.sum(0))) for m in metrics}
    assert (shares["empty_share"], shares["length_ratio"], shares["stopped_share"]) == (1.0, 0.0, 1.0)
