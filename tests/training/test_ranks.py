"""Tries to make two processes learn something else than one, lose a step when they are stopped, or write twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ADAPTER = "adapter/adapter_model.safetensors"
# 9 records a step, of uneven length: the ranks' shares differ; the last step has 3.
RECIPE = """\
base: {base}
out: unset
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 7, test: 8}}
adapter: {{rank: 4}}
train:
  {{epochs: 2, micro_batch_size: 9, learning_rate: 1e-3, save_every: 2, eval_every: 4, log_every: 1, precision: fp32,
    device: cpu, micro_batch_tokens: 256}}
evaluate: {{bootstrap_samples: 100}}
"""


@pytest.fixture(scope="module")
def recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    rows = [f"note {i} with {'fever ' * (i % 7)}and pain,{('Skin', 'Blood')[i * 7 % 2]}" for i in range(48)]
    (folder / "notes.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=tiny_base))
    return folder / "recipe.yaml"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(recipe: Path, out: Path, processes: int, *overrides: str) -> subprocess.Popen[str]:
    run = ["-m", "metier", "run", str(recipe), "--out", str(out)]
    run += [word for override in overrides for word in ("--set", override)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", free_port()]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *run],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def losses(out: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "adapter" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def one(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    process = start(recipe, out, 1)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return out


def assert_equal(one: Path, two: Path) -> None:
    for name in ("loss", "val_loss", "grad_norm"):
        assert losses(two, name) == pytest.approx(losses(one, name), rel=1e-5)
    want, got = load_file(one / ADAPTER), load_file(two / ADAPTER)
    assert want.keys() == got.keys()
    whole = torch.cat([t.flatten() for t in want.values()])
    apart = torch.cat([(got[name] - t).flatten() for name, t in want.items()])
    assert float(apart.norm() / whole.norm()) < 1e-5
    manifests = [json.loads((out / "adapter" / "manifest.json").read_text()) for out in (one, two)]
    assert [m["num_processes"] for m in manifests] == [1, 2]
    for key in ("key", "steps", "num_train_tokens", "num_loss_tokens", "best_step"):
        assert manifests[0][key] == manifests[1][key], key


def test_two_processes_learn_what_one_learns_and_one_of_them_writes(recipe: Path, one: Path, tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "run", 2)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert_equal(one, tmp_path / "run")
    assert stdout.count("report:") == 1
    assert stderr.count("trainable params") == 1
    audit = [json.loads(line)["action"] for line in (tmp_path / "run" / "audit.jsonl").read_text().splitlines()]
    assert audit == ["recipe", "prepare", "train", "evaluate", "report"]
    assert (tmp_path / "run" / "evidence" / "evidence.json").exists()


def test_two_processes_with_dropout_learn_what_one_learns(recipe: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        process = start(recipe, tmp_path / str(processes), processes, "adapter.dropout=0.2", "train.epochs=1")
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
    assert_equal(tmp_path / "1", tmp_path / "2")


# Rank 1 alone may map only `room` bytes more than it has when training begins.
LIMITED = """
import resource, sys
from metier.cli import main
from metier.training import loop, ranks

room, begin = int(sys.argv.pop(1)), loop.Trainer.__post_init__

def begin_limited(trainer):
    begin(trainer)
    if room and ranks.rank() == 1:
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))

loop.Trainer.__post_init__ = begin_limited
main()
"""


def test_one_rank_out_of_memory_steps_all_ranks_back_alike(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(LIMITED)
    rows = [f"note {i} with {'fever ' * (i % 5)}and pain,{('Skin', 'Blood')[i * 7 % 2]}" for i in range(300)]
    (tmp_path / "notes.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n")
    text = recipe.read_text().replace("val: 7, test: 8", "val: 0, test: 20").replace("epochs: 2,", "max_steps: 2,")
    text = text.replace("micro_batch_size: 9", "micro_batch_size: 256").replace("{rank: 4}", "{rank: 4, dropout: 0.1}")
    (tmp_path / "recipe.yaml").write_text(text)
    made = subprocess.run(
        [sys.executable, "-m", "metier", "prepare", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "limited")],
        cwd=ROOT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    shutil.copytree(tmp_path / "limited", tmp_path / "smaller")
    for out, room, tokens in (("limited", 50 << 20, 4096), ("smaller", 0, 2048)):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
             str(tmp_path / "limited.py"), str(room), "train", str(tmp_path / "recipe.yaml"), "--out",
             str(tmp_path / out), "--set", f"train.micro_batch_tokens={tokens}"],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("step 1: out of memory; passes of 2048 tokens" in done.stderr) == (room > 0), done.stderr
    limited, smaller = (tmp_path / out / ADAPTER for out in ("limited", "smaller"))
    assert json.loads((limited.parent / "manifest.json").read_text())["step_backs"] == [
        {"step": 1, "remedy": "passes of 2048 tokens"}
    ]
    assert limited.read_bytes() == smaller.read_bytes()


def test_two_processes_stopped_by_sigterm_go_on_where_they_were(recipe: Path, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(recipe, out, 2)
    metrics = out / ".adapter.partial" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode != 0
    assert not (out / "adapter").exists(), "the run was over before it was stopped"
    assert list((out / ".adapter.partial" / "checkpoints").glob("step-*"))
    process = start(recipe, out, 2)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert "resuming after step" in stderr
    assert_equal(one, out)
