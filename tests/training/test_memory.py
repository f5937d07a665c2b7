"""Tries to make a step that ran out of memory, or recomputed its activations, end otherwise than one that did not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.model.lora import attach
from metier.model.recompute import set_recompute
from metier.recipe import AdapterConfig
from metier.training.pack import collate
from metier.training.step import loss_sum
from tests.model.tiny import KINDS, Kind, tiny_model
from tests.training.test_pack import random_records

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
# One step of 256 records, about 7,000 tokens: attention's mask of one pass over all of them takes 50 MB and more.
RECIPE = """\
base: {base}
out: unset
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 0, test: 0}}
adapter: {{rank: 4, dropout: 0.1}}
train:
  {{max_steps: 3, micro_batch_size: 256, micro_batch_tokens: 8192, learning_rate: 1e-2, save_every: 1, precision: fp32,
    log_every: 1, device: cpu}}
"""
# `room` bytes above what the process has mapped when training begins.
LIMITED = """
import resource, sys
from pathlib import Path
from metier import pipeline
from metier.cli import _fail
from metier.errors import MetierError
from metier.recipe import load_recipe

class Ui:
    def say(self, text):
        print(text, file=sys.stderr)
        if text.startswith("trainable params") and (room := int(sys.argv[3])):
            mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))
    def progress(self, *args, **numbers):
        pass

loaded = load_recipe(Path(sys.argv[1]), sys.argv[4:], sys.argv[2])
try:
    pipeline.prepare(loaded, Ui())
    pipeline.train(loaded, Ui())
except MetierError as error:
    _fail(f"error: {error}", error.exit_code)
"""


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    rows = [f"note {i} with {'fever ' * (i % 5)}and pain,{('Skin', 'Blood')[i * 7 % 2]}" for i in range(300)]
    (folder / "notes.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=tiny_base))
    return folder / "recipe.yaml"


def train(recipe: Path, out: Path, *overrides: str, room: int = 0) -> tuple[int, str]:
    """`metier prepare` and `train` in a process that may map `room` bytes more than it has at the first step."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(recipe), str(out), str(room), *overrides],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def manifest_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter" / "manifest.json").read_text())  # type: ignore[no-any-return]


def test_out_of_memory_halves_the_pass_and_the_result_is_that_of_the_smaller_pass(recipe: Path, tmp_path: Path) -> None:
    code, stderr = train(recipe, tmp_path / "limited", room=100 << 20)
    assert code == 0, stderr
    assert "step 1: out of memory; passes of 4096 tokens, and the step is done again from its start" in stderr
    manifest = manifest_of(tmp_path / "limited")
    assert manifest["step_backs"] == [{"step": 1, "remedy": "passes of 4096 tokens"}]
    assert (manifest["micro_batch_tokens"], manifest["recompute"], manifest["steps"]) == (4096, "none", 3)
    code, stderr = train(recipe, tmp_path / "smaller", "train.micro_batch_tokens=4096")
    assert code == 0, stderr
    assert manifest_of(tmp_path / "smaller")["step_backs"] == []
    assert (tmp_path / "limited" / ADAPTER).read_bytes() == (tmp_path / "smaller" / ADAPTER).read_bytes()


def test_too_little_memory_recomputes_and_then_stops_with_a_sentence(recipe: Path, tmp_path: Path) -> None:
    code, stderr = train(recipe, tmp_path, room=8 << 20)
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert "passes of 4096 tokens" in stderr
    assert "activations are recomputed" in stderr
    assert "error: out of memory in step 1, with passes of 4096 tokens and recomputation: full" in stderr
    assert "metier plan" in stderr
    assert not (tmp_path / "adapter").exists()


def gradients(kind: Kind, dtype: torch.dtype, *, recompute: str) -> dict[str, torch.Tensor]:
    model = tiny_model(kind)[0].to(dtype)
    adapter = attach(model, AdapterConfig(rank=4, dropout=0.2), seed=0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b += 0.05
    model.train()
    set_recompute(model, recompute)
    torch.manual_seed(3)
    torch.autograd.backward(loss_sum(model, collate(random_records(5, model.config.vocab_size))))
    return {name: p.grad for name, p in adapter.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_gradients_are_equal_bit_for_bit_with_dropout(kind: Kind, dtype: torch.dtype) -> None:
    kept, again = gradients(kind, dtype, recompute="none"), gradients(kind, dtype, recompute="full")
    assert kept.keys() == again.keys()
    assert len(kept) > 10
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name]), name


def test_recomputing_keeps_fewer_tensors() -> None:
    model = tiny_model("llama3")[0]
    attach(model, AdapterConfig(rank=4), seed=0)
    model.train()
    batch = collate(random_records(5, model.config.vocab_size))
    sizes = []
    for recompute in ("none", "full"):
        set_recompute(model, recompute)
        kept: list[int] = []

        def count(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss_sum(model, batch)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 2
