"""Tries to put beside the adapter what is not comparable, and to lose it from evidence, report or verification."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from metier import pipeline
from metier.errors import RecipeError, RunError
from metier.evaluation.verify import verify
from metier.recipe import Recipe, load_recipe

RECIPE = """\
base: {base}
out: unset
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 8, test: 40}}
adapter: {{rank: 4}}
train: {{max_steps: 4, micro_batch_size: 8, learning_rate: 1e-2, precision: fp32}}
dedup: {{near: ignore}}
evaluate: {{bootstrap_samples: 100, forgetting: false, own_probes: {own}, earlier: null}}
"""
OWN = """\
text: {en: ["The ward is quiet at night.", "Tea is served at four."], zh: ["病房夜里很安静。"]}
instruction: {en: [{prompt: "Say yes.", matches: "yes"}]}
"""


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    rows = [f"note {i} with {'fever ' * (i % 5)}and pain,{('Skin', 'Blood')[i * 7 % 2]}" for i in range(88)]
    (folder / "notes.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n")
    (folder / "own.yaml").write_text(OWN, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=tiny_base, own=folder / "own.yaml"))
    return folder


def recipe(project: Path, out: str, *sets: str) -> Recipe:
    return load_recipe(project / "recipe.yaml", list(sets), str(project / out))


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    """A run with an earlier adapter (other seed of training, the same data) and full fine-tuning beside it."""
    pipeline.run(recipe(project, "earlier", "train.max_steps=2"))
    sets = ["evaluate.reference=full", f"evaluate.earlier={project / 'earlier'}"]
    pipeline.run(recipe(project, "run", *sets))
    return project / "run"


def test_full_and_earlier_stand_in_evidence_and_both_reports(run: Path) -> None:
    evidence = json.loads((run / "evidence" / "evidence.json").read_text())
    full = evidence["full"]
    assert full["metrics"]["accuracy"]["adapter"] == evidence["metrics"]["accuracy"]["adapter"]
    assert evidence["controls"]["full"]["accuracy"] == full["metrics"]["accuracy"]["full"]
    table = pl.read_parquet(run / "evidence" / "items.parquet")
    right = (table["earlier_label"] == table["reference"]).mean()
    assert evidence["controls"]["earlier"]["accuracy"] == pytest.approx(right)
    assert evidence["contenders_seen"] == {"earlier": 0}
    share = full["training"]["adapter"]["trainable_parameters"] / full["training"]["full"]["trainable_parameters"]
    assert 0 < share < 1 and full["training"]["full"]["peak_memory_bytes"] > 0
    assert {"own_text", "own_instruction"} == set(evidence["forgetting"])
    assert "LoRA beside full fine-tuning" in (run / "report.html").read_text()
    assert "LoRA 与全量微调对照" in (run / "report.zh.html").read_text()
    assert "An earlier adapter" in (run / "report.html").read_text()


def test_full_weights_answer_as_the_checkpoint_does(run: Path) -> None:
    from metier.evaluation.items import read_items
    from metier.model.specialist import load

    model = load(run / "full", precision="fp32")
    items = {i.record_id: i for i in read_items(run / "dataset", "test")}
    table = pl.read_parquet(run / "evidence" / "items.parquet")
    scores = model.score_records([items[r].messages for r in table["record_id"]])
    assert table["full_nll"].to_list() == pytest.approx([s.nll for s in scores], abs=1e-4)
    assert table["full_nll"].to_list() != pytest.approx(table["adapter_nll"].to_list(), abs=1e-3)


def test_verify_makes_all_of_it_again_and_sees_an_altered_weight(run: Path, project: Path) -> None:
    assert verify(run).problems == []
    path = run / "full" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert verify(run).problems[0] == "full/model.safetensors: its bytes are not those that were written"
    finally:
        path.write_bytes(data)


def test_evaluating_again_changes_nothing_and_asks_nobody(run: Path, project: Path) -> None:
    before = (run / "evidence" / "manifest.json").read_bytes()
    pipeline.evaluate(recipe(project, "run", "evaluate.reference=full", f"evaluate.earlier={project / 'earlier'}"))
    assert (run / "evidence" / "manifest.json").read_bytes() == before


def test_an_earlier_adapter_that_learned_from_test_records_is_said(project: Path, run: Path) -> None:
    pipeline.run(recipe(project, "leaky", "seed=5", "train.max_steps=2"))
    pipeline.evaluate(recipe(project, "run", f"evaluate.earlier={project / 'leaky'}"))
    evidence = json.loads((run / "evidence" / "evidence.json").read_text())
    assert evidence["contenders_seen"]["earlier"] > 0
    assert any("its control value is too good" in sentence for sentence in evidence["limits"])
    assert verify(run).problems == []


@pytest.mark.parametrize("what", ["nothing", "another base"])
def test_what_is_no_earlier_adapter_is_refused(run: Path, project: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "other"
    (folder / "adapter").mkdir(parents=True)
    if what == "another base":
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / "adapter" / name).write_bytes((run / "adapter" / name).read_bytes())
        manifest = json.loads((run / "adapter" / "manifest.json").read_text())
        manifest["parents"]["base"] = "0" * 64
        (folder / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="evaluate.earlier"):
        pipeline.evaluate(recipe(project, "run", f"evaluate.earlier={folder}"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no questions"),
        ("[1, 2]", "holds no questions"),
        ("riddle: {en: [x]}", "has `riddle`"),
        ("text: {fr: [x]}", "has `fr`"),
        ("text: {en: ['']}", "number 1 of `text`, `en`"),
        ("choice: {en: [[a, b]]}", "number 1 of `choice`"),
        ("refusal: {en: [{prompt: a, refuse: maybe}]}", "number 1 of `refusal`"),
        ("instruction: {zh: [{prompt: a, matches: '('}]}", "number 1 of `instruction`, `zh`"),
        ("text: {en: [\x00]}", "is not YAML"),
    ],
)
def test_own_probes_that_are_none_are_refused_with_their_place(
    run: Path, project: Path, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        pipeline.evaluate(recipe(project, "run", f"evaluate.own_probes={tmp_path / 'own.yaml'}"))
