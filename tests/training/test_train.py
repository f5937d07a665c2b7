"""Tries to make a run that is stopped, damaged or refused by the disk end otherwise than one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metier import pipeline
from metier.errors import Interrupted, RunError
from metier.model.chat import Renderer, eos_token_ids
from metier.model.specialist import load
from metier.recipe import load_recipe
from metier.training import step as step_module
from metier.training.checkpoint import load_checkpoint
from metier.training.labels import render_records
from metier.training.loop import Trainer
from metier.training.pack import pack_batches
from metier.training.step import StepResult, mean_loss
from metier.training.train import read_split
from tests.training.notes import write_project

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
RESULTS = (ADAPTER, "adapter/adapter_config.json", "evidence/evidence.json", "evidence/items.parquet")
NUM_STEPS = 15
# 32 training records in steps of 8: nearly four epochs. Dropout would show a random state that is not restored.
RECIPE = """\
base: {base}
out: unset
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 8, test: 8}}
adapter: {{rank: 4, dropout: 0.2}}
train:
  {{max_steps: 15, epochs: 9, micro_batch_size: 4, grad_accum_steps: 2, learning_rate: 1e-2, save_every: 4,
    eval_every: 5, log_every: 1, precision: fp32}}
dedup: {{near: ignore}}
evaluate: {{bootstrap_samples: 100}}
"""


class Stopper:
    """A Ui that keeps what is said and sends a real signal to this process after a step."""

    def __init__(self, step: int | None = None, number: int = signal.SIGTERM) -> None:
        self.step, self.number, self.said = step, number, list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int, **numbers: float) -> None:
        if what == "training" and done == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), RECIPE.format(base=tiny_base))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    pipeline.run(load_recipe(recipe, out=str(out)))
    return out


def train(recipe: Path, out: Path, ui: Stopper, *overrides: str) -> Path:
    """Data set and adapter."""
    loaded = load_recipe(recipe, list(overrides), str(out))
    pipeline.prepare(loaded, ui)
    return pipeline.train(loaded, ui)


def command_line(recipe: Path, out: Path, *overrides: str, before: str = "", after: str = "") -> subprocess.Popen[str]:
    """`metier run` in a process of its own; `before` and `after` are Python around it."""
    code = f"{before}\nfrom metier.cli import main\ntry:\n    main()\nfinally:\n    {after or 'pass'}"
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(recipe), "--out", str(out), *sets],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def steps_of(metrics: Path, value: str = "loss") -> list[int]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["step"] for line in lines if value in line]


def newest(out: Path) -> Path:
    return max((out / ".adapter.partial" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("step", [1, 5, 8, 11, NUM_STEPS - 1, NUM_STEPS])
def test_a_stopped_run_ends_with_the_same_bytes(recipe: Path, whole: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(Interrupted) as stopped:
        train(recipe, tmp_path, Stopper(step), "train.save_every=6")
    assert stopped.value.exit_code == 143
    assert f"stopped after step {step}, which is saved" in stopped.value.message
    ui = Stopper()
    train(recipe, tmp_path, ui)
    assert f"resuming after step {step} of {NUM_STEPS}" in ui.said
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    metrics = tmp_path / "adapter" / "metrics.jsonl"
    assert steps_of(metrics) == list(range(1, NUM_STEPS + 1))
    assert steps_of(metrics, "val_loss") == [5, 10, 15]
    assert steps_of(whole / "adapter" / "metrics.jsonl") == list(range(1, NUM_STEPS + 1))


def test_a_run_stopped_four_times_ends_with_the_same_bytes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    for step in (2, 4, 7, 12):
        with pytest.raises(Interrupted) as stopped:
            train(recipe, tmp_path, Stopper(step, signal.SIGINT))
        assert stopped.value.exit_code == 130
    train(recipe, tmp_path, Stopper())
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_the_reference_depends_on_dropout_and_seed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    for number, change in enumerate(("seed=1", "adapter.dropout=0")):
        train(recipe, tmp_path / str(number), Stopper(), change)
        assert (tmp_path / str(number) / ADAPTER).read_bytes() != (whole / ADAPTER).read_bytes()


def test_sigterm_and_ctrl_c_end_the_command_with_143_and_130_and_it_goes_on(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for number, code, enough in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 7)):
        process = command_line(recipe, out)
        metrics = out / ".adapter.partial" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= enough):
            time.sleep(0.001)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        assert not (out / "evidence").exists()
    process = command_line(recipe, out)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for name in RESULTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    recipe: Path, whole: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with pytest.raises(Interrupted):
        train(recipe, tmp_path, Stopper(10))
    damage(newest(tmp_path) / "state.safetensors")
    ui = Stopper()
    train(recipe, tmp_path, ui)
    assert any("step-00000010 is damaged" in text for text in ui.said)
    assert f"resuming after step 8 of {NUM_STEPS}" in ui.said
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert steps_of(tmp_path / "adapter" / "metrics.jsonl") == list(range(1, NUM_STEPS + 1))


def test_a_full_disk_keeps_the_checkpoint_and_exits_with_2(recipe: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(recipe, tmp_path, Stopper(5))
    kept = newest(tmp_path)
    size = (kept / "state.safetensors").stat().st_size
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))"
    process = command_line(recipe, tmp_path, before=limit)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "error: " in stderr
    assert "step-00000008" in stderr
    assert "Traceback" not in stderr
    assert newest(tmp_path) == kept
    assert load_checkpoint(kept.parent, pytest.fail) is not None
    train(recipe, tmp_path, Stopper())
    assert (tmp_path / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_run_again_does_nothing_and_loads_no_torch(recipe: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    started = time.monotonic()
    process = command_line(
        recipe, whole, after="import sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert time.monotonic() - started < 15
    assert stdout.splitlines()[-1] == "False False"
    assert stderr.count("up to date") == 3
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert {p.name for p in before.keys() ^ after.keys()} <= {".lock"}
    assert all(after[path] == then for path, then in before.items() if path in after and path.name != ".lock")


@pytest.mark.parametrize(
    ("change", "made_anew"),
    [
        ("train.log_every=3", []),
        ("train.save_every=5", []),
        ("evaluate.bootstrap_samples=150", ["evidence"]),
        ("train.learning_rate=0.005", ["adapter", "evidence"]),
        ("adapter.rank=2", ["adapter", "evidence"]),
        ("data.val=6", ["dataset", "adapter", "evidence"]),
    ],
)
def test_a_changed_setting_makes_anew_what_it_touches_alone(
    recipe: Path, whole: Path, tmp_path: Path, change: str, made_anew: list[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    stages = ("dataset", "adapter", "evidence")
    before = {name: (out / name / "manifest.json").stat().st_mtime_ns for name in stages}
    pipeline.run(load_recipe(recipe, [change], str(out)))
    assert [n for n in stages if (out / n / "manifest.json").stat().st_mtime_ns != before[n]] == made_anew


def test_the_adapter_with_the_lowest_validation_loss_is_kept(recipe: Path, tmp_path: Path) -> None:
    # A rate that stays high: the loss on notes never seen goes up and down.
    settings = ("train.learning_rate=0.1", "train.min_learning_rate=0.1", "train.eval_every=1", "seed=1")
    train(recipe, tmp_path, Stopper(), *settings)
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses), "the last is the best: this run shows nothing"
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert (manifest["best_step"], manifest["val_loss"]) == (best, losses[best])
    model = load(tmp_path)
    renderer = Renderer(model.base.tokenizer, eos_token_ids(model.base.path))
    config = load_recipe(recipe, list(settings)).train
    rendered, _ = render_records(*read_split(tmp_path / "dataset", "val"), renderer, config)
    assert mean_loss(model.base.model, pack_batches(rendered, 1024, 99)) == pytest.approx(losses[best], rel=1e-4)


def test_three_steps_that_are_not_finite_stop_the_run(recipe: Path, tmp_path: Path) -> None:
    settings = ("train.learning_rate=1e30", "train.save_every=1", "train.eval_every=1", "train.warmup_ratio=0")
    ui = Stopper()
    for _ in range(2):
        with pytest.raises(RunError, match="not finite in steps 2 to 4") as error:
            train(recipe, tmp_path, ui, *settings)
        assert "learning_rate" in str(error.value)
    assert any("step 3: the loss on the val split is not finite" in text for text in ui.said)
    assert any("step 2: loss or gradient not finite; the step is skipped" in text for text in ui.said)
    lines = [json.loads(line) for line in (tmp_path / ".adapter.partial" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 3]
    found = load_checkpoint(newest(tmp_path).parent, pytest.fail)
    assert found is not None
    progress, tensors, _ = found
    assert progress.step == 3
    assert all(bool(torch.isfinite(t).all()) for name, t in tensors.items() if name.startswith("adapter/"))
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Steps, from 1 on, in which `loss` or one number of the `gradient` is made NaN."""
    where: dict[int, str] = {}
    at: list[Trainer] = []
    attempt, accumulate = Trainer.attempt, step_module.accumulate

    def watched(trainer: Trainer) -> StepResult:
        at[:] = [trainer]
        return attempt(trainer)

    def poisoned(*arguments: Any) -> torch.Tensor:
        loss, what = accumulate(*arguments), where.get(at[0].progress.step + 1)
        if what == "gradient":
            grad = list(at[0].adapter.parameters.values())[-1].grad
            assert grad is not None
            grad[0, 0] = torch.nan
        return loss * torch.nan if what == "loss" else loss

    monkeypatch.setattr(Trainer, "attempt", watched)
    monkeypatch.setattr(step_module, "accumulate", poisoned)
    return where


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_planted_nan_is_skipped_counted_and_said_and_three_in_a_row_leave_a_run_that_goes_on(
    recipe: Path, tmp_path: Path, planted: dict[int, str], dropout: float
) -> None:
    settings = (f"adapter.dropout={dropout}", "train.save_every=1")
    planted |= {2: "loss", 4: "gradient", 5: "loss", 8: "gradient", 9: "loss", 10: "gradient"}
    ui = Stopper()
    with pytest.raises(RunError, match="not finite in steps 8 to 10; the weights are whole"):
        train(recipe, tmp_path, ui, *settings)
    for step in (2, 4, 5, 8, 9):
        assert f"step {step}: loss or gradient not finite; the step is skipped" in ui.said
    before, last = (load_checkpoint(newest(tmp_path).parent, pytest.fail, last=step) for step in (8, 9))
    assert before is not None
    assert last is not None
    assert (before[0].step, last[0].step, last[0].num_skipped, last[0].skipped_in_a_row) == (8, 9, 5, 2)
    # What was skipped left no trace in the adapter, in the moments, or in their count of steps.
    for name, tensor in last[1].items():
        assert bool(torch.isfinite(tensor).all()), name
        assert torch.equal(tensor, before[1][name]), name
    counts = {float(tensor) for name, tensor in last[1].items() if name.startswith("optimizer/step/")}
    assert counts == {4.0}
    planted.clear()
    train(recipe, tmp_path, ui, *settings)
    assert f"resuming after step 9 of {NUM_STEPS}" in ui.said
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert (manifest["steps"], manifest["num_skipped_steps"]) == (NUM_STEPS, 5)
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 4, 5, 8, 9]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 7, *range(10, NUM_STEPS + 1)]
