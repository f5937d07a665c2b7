"""Tries to make a sweep whose configurations are spread over two processes end otherwise than one process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metier.recipe import load_recipe
from metier.sweep import sweep
from tests.training.notes import write_project
from tests.training.test_ranks import ADAPTER, ROOT, free_port
from tests.training.test_sweep import RECIPE, curve, table

# Four of six at a time, so that some join as others leave.
RANGES = """\
sweep:
  halving: 2
  ranges: {adapter.dropout: [0.0, 0.2], train.learning_rate: [3e-4, 1e-2, 3e-2]}
"""


def test_two_processes_end_with_the_table_and_the_adapters_of_one(tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_project(tmp_path, RECIPE.format(base=tiny_base) + RANGES)
    one, two = tmp_path / "one", tmp_path / "two"
    sweep(load_recipe(recipe, ["sweep.at_once=4"], str(one)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "-m",
         "metier", "sweep", str(recipe), "--out", str(two), "--set", "sweep.at_once=2"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    want, got = table(one), table(two)
    for key in ("method", "num_trials", "rungs", "winner", "seed"):
        assert want[key] == got[key]
    assert {row["state"] for row in want["trials"]} == {"complete", "stopped"}
    for mine, theirs in zip(want["trials"], got["trials"], strict=True):
        assert theirs == mine | {"val_loss": pytest.approx(mine["val_loss"], rel=1e-5)}
        for key in ("loss", "val_loss"):
            paths = [out / "sweep" / "metrics" / f"trial-{mine['number']:02d}.jsonl" for out in (one, two)]
            assert curve(paths[1], key) == pytest.approx(curve(paths[0], key), rel=1e-5)
    first, second = (load_file(out / ADAPTER) for out in (one, two))
    apart = torch.cat([(second[key] - t).flatten() for key, t in first.items()])
    assert float(apart.norm() / torch.cat([t.flatten() for t in first.values()]).norm()) < 1e-4
    actions = [json.loads(line)["action"] for line in (two / "audit.jsonl").read_text().splitlines()]
    assert actions.count("sweep") == actions.count("train") == actions.count("evaluate") == 1
