"""metrics.jsonl, always; TensorBoard and Weights & Biases only when the recipe asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from metier.artifacts import disk_errors
from metier.errors import RecipeError


class Metrics:
    """Appends one JSON object a line to `path`, from `num_bytes` on: what a killed run wrote later is cut off."""

    def __init__(self, path: Path, num_bytes: int, report_to: list[str], run_name: str) -> None:
        with disk_errors(path):
            path.touch()
            self._file = path.open("r+b")
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)
        self._tensorboard = _tensorboard(path.parent.parent / "tensorboard") if "tensorboard" in report_to else None
        self._wandb = _wandb(run_name) if "wandb" in report_to else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the file, and what else was reported to."""
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def log(self, **values: float | int) -> int:
        """Writes one line (`step` is one of the values) and returns the file's length in bytes."""
        with disk_errors(Path(self._file.name)):
            self._file.write((json.dumps(values) + "\n").encode())
            self._file.flush()
        for name, value in values.items():
            if self._tensorboard and name != "step":
                self._tensorboard.add_scalar(name, value, values["step"])
        if self._wandb:
            self._wandb.log(dict(values), step=int(values["step"]))
        return self._file.tell()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RecipeError(
            "train.report_to names tensorboard, which is not installed", hint="pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder))


def _wandb(run_name: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise RecipeError("train.report_to names wandb, which is not installed", hint="pip install wandb") from None
    return wandb.init(project="metier", name=run_name)
