"""Tries to make adapters that are trained together differ from their own runs, or a killed sweep end otherwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metier import pipeline
from metier.errors import Interrupted, MetierError, RecipeError, RunError
from metier.model.fused import fuse
from metier.model.load import load_base
from metier.model.lora import new_adapter
from metier.recipe import AdapterConfig, Recipe, TrainConfig, load_recipe, variant
from metier.recipe.sweep import SweepConfig
from metier.sweep import sweep
from metier.training.loop import Trainer
from metier.training.schedule import make_plan
from metier.training.search import Search
from metier.training.together import Together
from tests.training.notes import write_project
from tests.training.test_pack import random_records

RECIPE = """\
base: {base}
out: unset
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 8, test: 8}}
train:
  {{epochs: 2, micro_batch_size: 8, learning_rate: 1e-2, save_every: 3, eval_every: 2, log_every: 1, precision: fp32}}
dedup: {{near: ignore}}
evaluate: {{bootstrap_samples: 100, forgetting: false, memorisation_items: 0}}
"""


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), RECIPE.format(base=tiny_base))


def ranged(recipe: Path, out: Path, ranges: dict[str, Any], **settings: Any) -> Recipe:
    loaded = load_recipe(recipe, [], str(out))
    return loaded.model_copy(update={"sweep": SweepConfig(ranges=ranges, **settings)})


def table(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep" / "trials.json").read_text())  # type: ignore[no-any-return]


def curve(path: Path, key: str) -> list[float]:
    return [line[key] for line in map(json.loads, path.read_text().splitlines()) if key in line]


def test_each_adapter_follows_its_own_run(recipe: Path, tmp_path: Path) -> None:
    ranges: dict[str, Any] = {
        "adapter.rank": [4, 64], "adapter.dropout": [0.0, 0.2],
        "adapter.target_modules": ["all-linear", ["q_proj", "down_proj"]],
    }  # fmt: skip
    tried = ranged(recipe, tmp_path / "all", ranges, halving=1)
    sweep(tried)
    found = table(tmp_path / "all")
    assert len(found["trials"]) == 8
    for row in found["trials"][::2]:
        alone = variant(tried, row["values"]).model_copy(update={"out": str(tmp_path / f"{row['number']}")})
        pipeline.prepare(alone)
        pipeline.train(alone)
        mine = tmp_path / "all" / "sweep" / "metrics" / f"trial-{row['number']:02d}.jsonl"
        for key in ("loss", "val_loss"):
            want = curve(tmp_path / f"{row['number']}" / "adapter" / "metrics.jsonl", key)
            assert len(want) >= 4
            assert curve(mine, key) == pytest.approx(want, rel=1e-5)


def test_the_winner_is_an_ordinary_run(recipe: Path, tmp_path: Path) -> None:
    tried = ranged(recipe, tmp_path, {"train.learning_rate": [1e-4, 1e-2, 3e-2]}, halving=2)
    sweep(tried)
    found = table(tmp_path)
    assert {row["state"] for row in found["trials"]} == {"complete", "stopped"}
    assert found["trials"][0]["val_loss"] == min(row["val_loss"] for row in found["trials"])
    best = variant(tried, found["trials"][0]["values"])
    said: list[str] = []

    class Ui(pipeline.Silent):
        def say(self, text: str) -> None:
            said.append(text)

    pipeline.run(best, Ui())
    assert said == ["dataset: up to date", "adapter: up to date", "evidence: up to date"]
    said.clear()
    sweep(tried, Ui())
    assert "sweep: up to date" in said
    evidence = json.loads((tmp_path / "evidence" / "evidence.json").read_text())
    assert "3 configurations" in evidence["verdict"]["statement"]
    for page in ("report.html", "report.zh.html"):
        assert 'id="search-' in (tmp_path / page).read_text()


MIXED = """\
base: {base}
out: unset
data: {{sources: [mild.csv, grave.csv], prompt: "Condition: {{note}}", answer: chapter, val: 8, test: 8}}
balance: {{general: [general.jsonl]}}
train: {{epochs: 1, micro_batch_size: 8, learning_rate: 1e-2, eval_every: 2, log_every: 1, precision: fp32}}
dedup: {{near: ignore}}
evaluate: {{bootstrap_samples: 100, forgetting: false, memorisation_items: 0}}
"""


def test_data_mixes_are_tried_each_on_its_own_records(tiny_base: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("mild", "grave")):
        rows = [f"{name} note {i} of {'fever ' * (i % 5)},{('Skin', 'Blood')[(i + number) % 2]}" for i in range(32)]
        (tmp_path / f"{name}.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n")
    general = [{"instruction": f"What is {i} + {i}?", "output": str(2 * i)} for i in range(40)]
    (tmp_path / "general.jsonl").write_text("\n".join(map(json.dumps, general)))
    (tmp_path / "recipe.yaml").write_text(MIXED.format(base=tiny_base))
    ranges = {
        "balance.sources": [{"mild.csv": 1, "grave.csv": 1}, {"mild.csv": 3, "grave.csv": 0.5}],
        "balance.general_share": [0.1, 0.3], "train.learning_rate": [1e-2],
    }  # fmt: skip
    tried = ranged(tmp_path / "recipe.yaml", tmp_path / "run", ranges, halving=1)
    sweep(tried)
    found = table(tmp_path / "run")["trials"]
    assert len({row["total_steps"] for row in found}) >= 3  # mixes of different sizes
    assert not list((tmp_path / "run").glob(".sweep-*"))
    for row in (found[0], found[-1]):
        alone = variant(tried, row["values"]).model_copy(update={"out": str(tmp_path / f"{row['number']}")})
        pipeline.prepare(alone)
        pipeline.train(alone)
        mine = tmp_path / "run" / "sweep" / "metrics" / f"trial-{row['number']:02d}.jsonl"
        for key in ("loss", "val_loss"):
            want = curve(tmp_path / f"{row['number']}" / "adapter" / "metrics.jsonl", key)
            assert curve(mine, key) == pytest.approx(want, rel=1e-5)
    records = [tmp_path / name / "dataset" / "records.parquet" for name in ("run", f"{found[0]['number']}")]
    assert records[0].read_bytes() == records[1].read_bytes()
    with pytest.raises(RecipeError, match="list the values"):
        sweep(ranged(tmp_path / "recipe.yaml", tmp_path / "open", {"balance.general_share": {"min": 0, "max": 0.5}}))


def company(base: Any, count: int) -> Together:
    fused = fuse(base.model)
    trainers = []
    for number in range(count):
        config = TrainConfig(micro_batch_size=2 + number, learning_rate=1e-2, warmup_ratio=0.0)
        rank = (4, 64, 16, 8)[number % 4]
        adapter = new_adapter(base.model, AdapterConfig(rank=rank), seed=number)
        records = random_records(24, base.model.config.vocab_size, seed=number)
        plan = make_plan(config, 24, base.config.hidden_size, base.device)
        trainers.append(Trainer(base, adapter, config, plan, number, records, [], Path("none"), print, fused))
    together = Together(base, fused, 400, print)
    together.hold(trainers)
    return together


def test_a_nan_in_one_adapter_leaves_the_others_bit_identical(tiny_base: Path) -> None:
    weights = []
    for planted in (False, True):
        base = load_base(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
        together = company(base, 8)
        for number in range(5):
            if planted and number == 2:
                layer = next(iter(together.trainers[3].adapter.layers.values()))
                layer.lora_a.data[0, 0] = torch.nan
            for trainer, result in zip(together.trainers, together.round(), strict=True):
                assert result.is_skipped == (planted and number >= 2 and trainer is together.trainers[3])
                trainer.progress.step += 1
        weights.append([trainer.adapter.tensors() for trainer in together.trainers])
    for number, (clean, beside) in enumerate(zip(*weights, strict=True)):
        assert number == 3 or all(torch.equal(clean[name], beside[name]) for name in clean)


def test_memory_that_runs_out_in_one_update_lets_every_adapter_step_once(tiny_base: Path) -> None:
    weights = []
    for planted in (False, True):
        base = load_base(str(tiny_base), dtype=torch.float32, device=torch.device("cpu"))
        together = company(base, 4)
        left = [planted]

        def fail(*_: Any, left: list[bool] = left) -> None:
            if left.pop() if left else False:
                raise torch.OutOfMemoryError("planted")

        together.trainers[2].optimizer.register_step_pre_hook(fail)
        for _ in range(3):
            results = together.round()
            assert not any(result.is_skipped for result in results)
            for trainer in together.trainers:
                trainer.progress.step += 1
        steps = [int(next(iter(t.optimizer.state.values()))["step"]) for t in together.trainers]
        assert steps == [3, 3, 3, 3]
        assert together.budget == 400
        weights.append([trainer.adapter.tensors() for trainer in together.trainers])
    for clean, beside in zip(*weights, strict=True):
        assert all(torch.equal(clean[name], beside[name]) for name in clean)
    left += [True, True]  # for good: a sentence, and still nobody has stepped twice
    with pytest.raises(RunError, match="out of memory in the optimizer's step"):
        together.round()
    steps = [int(next(iter(t.optimizer.state.values()))["step"]) for t in together.trainers]
    assert steps == [4, 3, 3, 4]  # they step in the order of their ranks, 4, 8, 16 and 64


def test_a_diverged_configuration_leaves_and_the_sweep_goes_on(recipe: Path, tmp_path: Path) -> None:
    tried = ranged(recipe, tmp_path, {"train.learning_rate": [1e-2, 1e30]}, halving=1)
    sweep(tried)
    states = {row["values"]["train.learning_rate"]: row["state"] for row in table(tmp_path)["trials"]}
    assert states == {1e-2: "complete", 1e30: "diverged"}


def test_adapters_join_as_others_leave(recipe: Path, tmp_path: Path) -> None:
    ranges = {"train.learning_rate": {"min": 1e-4, "max": 1e-1}, "train.epochs": [1, 2], "adapter.rank": [2, 8]}
    loaded = load_recipe(recipe, [], str(tmp_path))
    few = loaded.model_copy(update={"sweep": SweepConfig.model_validate(
        {"ranges": ranges, "trials": 7, "at_once": 2, "method": "bayes"}
    )})  # fmt: skip
    sweep(few)
    assert sorted(row["number"] for row in table(tmp_path)["trials"]) == list(range(7))


class Stopper(pipeline.Silent):
    """Sends this process a real signal after some steps of the sweep."""

    def __init__(self, done: int) -> None:
        self.done = done

    def progress(self, what: str, done: int, total: int, **numbers: float) -> None:
        if what.startswith("sweep") and done >= self.done:
            self.done = total + 1
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_sweep_ends_with_the_same_table(recipe: Path, tmp_path: Path) -> None:
    ranges: dict[str, Any] = {"adapter.rank": [2, 8], "train.learning_rate": [1e-3, 3e-2]}
    sweep(ranged(recipe, tmp_path / "whole", ranges, halving=2))
    tried = ranged(recipe, tmp_path / "stopped", ranges, halving=2)
    for done in (5, 20):
        with pytest.raises(Interrupted, match="run again to go on"):
            sweep(tried, Stopper(done))
    sweep(tried)
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "stopped" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_ray_cluster_of_two_nodes_ends_with_the_same_table(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="the extra `ray` is not installed")
    ranges: dict[str, Any] = {"adapter.rank": [2, 8], "train.learning_rate": [1e-3, 3e-2]}
    sweep(ranged(recipe, tmp_path / "here", ranges, halving=2))
    searched = recipe.with_name("ray.yaml")
    searched.write_text(recipe.read_text() + f"sweep: {json.dumps({'ranges': ranges, 'halving': 2})}\n")
    code = (
        "import sys\nfrom ray.cluster_utils import Cluster\nfrom metier.cli import main\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1, 'include_dashboard': False})\n"
        "cluster.add_node(num_cpus=1)\n"
        "sys.argv += ['--set', f'scale.ray={cluster.address}']\n"
        "try:\n    main()\nfinally:\n    cluster.shutdown()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, "sweep", str(searched), "--out", str(tmp_path / "there")],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    here, there = table(tmp_path / "here"), table(tmp_path / "there")
    assert [row["number"] for row in there["trials"]] == [row["number"] for row in here["trials"]]
    for mine, theirs in zip(here["trials"], there["trials"], strict=True):
        assert theirs.pop("val_loss") == pytest.approx(mine.pop("val_loss"), rel=1e-5)
        assert theirs == mine


def test_the_search_replayed_decides_alike() -> None:
    config = SweepConfig.model_validate(
        {"ranges": {"train.learning_rate": {"min": 1e-4, "max": 1e-2}, "adapter.target_modules": ["all-linear", ["v"]]},
         "method": "bayes", "trials": 12}
    )  # fmt: skip
    whole = Search(config, 0)
    for _ in range(6):
        whole.ask()
    assert whole.compare(0, {0: 3.0, 1: 1.0, 2: 2.0, 3: 5.0, 4: 4.0, 5: 6.0}) == {0, 3, 4, 5}
    for number in (0, 3, 4, 5):
        whole.tell(number, "stopped", 9.0)
    again = Search(config, 0, json.loads(json.dumps(whole.events)))
    assert again.events == whole.events
    assert again.compare(1, {1: 2.0, 2: float("nan")}) == whole.compare(1, {1: 2.0, 2: float("nan")}) == {2}
    assert [again.ask() for _ in range(4)] == [whole.ask() for _ in range(4)]


@pytest.mark.parametrize(
    ("ranges", "words"),
    [({"train.max_seq_len": [1]}, "cannot be varied"), ({"train.learning_rat": [1]}, "did you mean"),
     ({"adapter.rank": []}, "no value"), ({"train.learning_rate": {"min": 1e-2, "max": 1e-3}}, "is not below")],
)  # fmt: skip
def test_wrong_ranges_are_refused_in_a_sentence(recipe: Path, ranges: dict[str, Any], words: str) -> None:
    text = recipe.read_text() + f"sweep: {{ranges: {json.dumps(ranges)}}}\n"
    (recipe.parent / "wrong.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe.parent / "wrong.yaml", [], "unset")


def test_a_value_that_its_key_refuses_is_told_before_anything_is_done(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(MetierError, match=r"adapter\.rank"):
        sweep(ranged(recipe, tmp_path / "run", {"adapter.rank": [8, -1]}))
