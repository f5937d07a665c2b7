"""A real tiny model with a random adapter, and data sets on disk, for the evaluation to judge."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from metier.artifacts import complete, read_manifest, work_folder
from metier.model.load import Base
from metier.model.lora import attach, save_adapter
from metier.model.specialist import Specialist
from metier.recipe import AdapterConfig, EvaluateConfig
from tests.model.tiny import tiny_model

Row = dict[str, Any]
SCHEMA = {
    "record_id": pl.String, "split": pl.String, "group_id": pl.String,
    "messages": pl.List(pl.Struct({"role": pl.String, "content": pl.String})),
    "label": pl.String, "language": pl.String, "source_file": pl.String,
}  # fmt: skip


@pytest.fixture(scope="session")
def specialist() -> Specialist:
    """A llama of 2 layers with random weights and an adapter whose B is random too, so that it changes answers."""
    model, tokenizer = tiny_model("smollm2")
    model.requires_grad_(False)
    base = Base(model, tokenizer, Path("tiny"), "tiny", None, "0" * 64, torch.float32, torch.device("cpu"))
    adapter = attach(model, AdapterConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    adapter.load({k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in adapter.tensors().items()})
    return Specialist(base, adapter)


def classified(n: int, split: str, labels: list[str], language: str = "en", prompt: str = "note") -> list[Row]:
    """n records whose prompt ends with the number of its label."""
    return [
        {
            "record_id": f"{split}-{i:04d}", "split": split, "group_id": None, "language": language,
            "label": labels[i % len(labels)], "source_file": "notes.csv",
            "messages": [
                {"role": "user", "content": f"{prompt} {i} kind{i % len(labels)}"},
                {"role": "assistant", "content": labels[i % len(labels)]},
            ],
        }
        for i in range(n)
    ]  # fmt: skip


def write_dataset(folder: Path, rows: list[Row], task: str) -> Path:
    """A dataset artifact of these records."""
    work = work_folder(folder, "key")
    pl.DataFrame(rows, schema=SCHEMA).write_parquet(work / "records.parquet")
    splits = {s: sum(r["split"] == s for r in rows) for s in ("train", "val", "test")}
    labels = sorted({r["label"] for r in rows if r["label"]}) if task == "classification" else []
    complete(
        work, folder, kind="dataset", key="key", config={}, parents={}, started=time.time(),
        details={
            "counts": {"rows": len(rows) + 2, "kept": len(rows), "rejected": 2},
            "rejected_by_reason": {"answer is empty": 2}, "splits": splits, "task": task, "labels": labels,
        },
    )  # fmt: skip
    return folder


def build_run(run: Path, specialist: Specialist, rows: list[Row], task: str = "classification") -> Path:
    """A run's folder with dataset and adapter; evaluation is the test's part."""
    run.mkdir()
    write_dataset(run / "dataset", rows, task)
    work = work_folder(run / "adapter", "key")
    assert specialist.adapter is not None
    save_adapter(work, specialist.adapter, specialist.adapter.tensors(), base="tiny", revision=None)
    lines = [
        '{"step": 1, "loss": 2.5, "learning_rate": 0.001, "tok_per_sec": 900.0}',
        '{"step": 1, "val_loss": 2.6}',
    ]
    (work / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    parents = {"dataset": (read_manifest(run / "dataset") or {})["digest"]}
    complete(
        work, run / "adapter", kind="adapter", key="key", config={}, parents=parents, started=time.time(),
        details={"steps": 1, "trainable_parameters": 4096, "base": {"name": "/home/someone/models/tiny"}},
    )  # fmt: skip
    return run


@pytest.fixture
def make_run(tmp_path: Path, specialist: Specialist) -> Callable[..., Path]:
    """Makes a run's folder with dataset and adapter."""

    def make(rows: list[Row], task: str = "classification", name: str = "run") -> Path:
        return build_run(tmp_path / name, specialist, rows, task)

    return make


def judge(run: Path, specialist: Specialist, out: str = "evidence", **settings: Any) -> dict[str, Any]:
    """Evaluates a run with few resamples and returns the manifest."""
    from metier.evaluation.evaluate import evaluate

    config = EvaluateConfig(**{"bootstrap_samples": 200, "forgetting": False, "memorisation_items": 20, **settings})
    return evaluate(
        specialist, dataset=run / "dataset", adapter=run / "adapter", config=config, seed=3, out=run / out, key="key",
        progress=lambda what, done, total: None,
    )  # fmt: skip
