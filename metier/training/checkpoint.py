"""Checkpoints: written aside, fsynced, renamed; verified by digest before use; the last two are kept.

Data order, dropout and schedule are functions of (seed, step), so the step number is the data cursor
and the RNG state at once (docs/adr/0005). What must be stored: the adapter, AdamW's moments, the best
adapter so far, and a few numbers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from metier.artifacts import digest_bytes, digest_file, digest_json, disk_errors, fsync_dir, write_atomic, write_json

KEEP = 2


@dataclass
class Progress:
    """Where a run stands; everything else that a resumed run needs follows from the seed.

    `micro_batch_tokens` and `recompute` are what the run found to fit; `step_backs` says when they were changed.
    """

    step: int = 0
    num_tokens: int = 0
    num_loss_tokens: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    best_val_loss: float | None = None
    best_step: int = 0
    metrics_bytes: int = 0
    seconds: float = 0.0
    micro_batch_tokens: int = 0
    recompute: str = "none"
    step_backs: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(folder: Path, progress: Progress, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
    """Writes `folder/step-N` so that it is there whole or not at all, then removes all but the last two.

    `tensors` are flat by name; `extra` is JSON (the loss scaler). Raises `RunError` on a full disk,
    with the earlier checkpoints intact.
    """
    final = folder / f"step-{progress.step:08d}"
    aside = folder / f".{final.name}.tmp"
    with disk_errors(final):
        folder.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
            write_atomic(aside / "state.safetensors", data)
            state = {"progress": asdict(progress), "extra": extra, "sha256": digest_bytes(data)}
            write_json(aside / "state.json", state | {"digest": digest_json(state)})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
            fsync_dir(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old)


def load_checkpoint(
    folder: Path, say: Callable[[str], None], *, last: int | None = None
) -> tuple[Progress, dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint (of step `last` or before) that is whole, or None.

    A damaged one is named through `say` and passed over.
    """
    for path in _newest_first(folder):
        if last is not None and int(path.name.removeprefix("step-")) > last:
            continue
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            digest = state.pop("digest")
            if digest != digest_json(state) or digest_file(path / "state.safetensors") != state["sha256"]:
                raise ValueError("its digest does not match")
            tensors = safetensors.torch.load_file(path / "state.safetensors")
            return Progress(**state["progress"]), tensors, state["extra"]
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            say(f"checkpoint {path.name} is damaged ({error}); the one before it is used")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)
