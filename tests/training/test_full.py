"""Tries to make full fine-tuning end otherwise after a kill, train what it should not, or take memory there is not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from metier import pipeline
from metier.errors import Interrupted, RunError
from metier.recipe import Recipe, load_recipe
from metier.training.full import refuse_too_large
from tests.training.notes import write_project

RECIPE = """\
base: {base}
out: unset
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 8, test: 8}}
adapter: {{rank: 4}}
train: {{max_steps: 10, micro_batch_size: 8, learning_rate: 1e-2, save_every: 4, log_every: 1, precision: fp32}}
dedup: {{near: ignore}}
evaluate: {{bootstrap_samples: 100, forgetting: false}}
"""


class Stopper:
    """A Ui that keeps what is said and sends a real signal to this process at a step, counted over all trainings."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.said = at, 0, list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, what: str, done: int, total: int, **numbers: float) -> None:
        self.count += what == "training"
        if self.count == self.at and what == "training":
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), RECIPE.format(base=tiny_base))


def full(recipe: Path, out: Path, ui: Stopper) -> Path:
    loaded = load_recipe(recipe, [], str(out))
    pipeline.prepare(loaded, ui)
    pipeline._full(loaded, out, ui)
    return out / "full"


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full(recipe, tmp_path_factory.mktemp("whole"), Stopper())


def test_every_weight_is_trained_and_the_rate_is_the_best_of_the_trials(whole: Path, tiny_base: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    after = safetensors.torch.load_file(whole / "model.safetensors")
    before = safetensors.torch.load_file(tiny_base / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    assert manifest["trainable_parameters"] == sum(t.numel() for t in after.values())
    trials = manifest["trials"]
    assert [t["learning_rate"] for t in trials] == [3e-4, 1e-3, 3e-3]
    assert manifest["peak_learning_rate"] == min(trials, key=lambda t: t["val_loss"])["learning_rate"]
    assert manifest["peak_memory_bytes"] > 0
    assert not (whole / "checkpoints").exists()


# In the first trial (2 steps each), between trials, at the start, middle and end of the training itself.
@pytest.mark.parametrize("at", [1, 2, 5, 7, 11, 16])
def test_a_stopped_full_fine_tuning_ends_with_the_same_bytes(
    recipe: Path, whole: Path, tmp_path: Path, at: int
) -> None:
    with pytest.raises(Interrupted):
        full(recipe, tmp_path, Stopper(at))
    again = full(recipe, tmp_path, Stopper())
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (again / "trials.json").read_bytes() == (whole / "trials.json").read_bytes()


def test_what_was_made_is_not_made_again(recipe: Path, tmp_path: Path) -> None:
    first, second = Stopper(), Stopper()
    full(recipe, tmp_path, first)
    full(recipe, tmp_path, second)
    assert first.count == 16 and second.count == 0
    assert "full fine-tuning: up to date" in second.said


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(RunError, match="to train all 70,000,000,000 weights takes about"):
        refuse_too_large(70_000_000_000, torch.device("cpu"))


def test_the_recipe_says_so_too(tiny_base: Path) -> None:
    data = {"sources": ["a.csv"]}
    recipe = Recipe.model_validate({"base": "b", "out": "o", "data": data, "evaluate": {"reference": "full"}})
    assert recipe.evaluate.reference == "full"
