"""After a training whose processes shared the base: the first one asks the model, the others hold their parts of it.

What the first process says, in this order: the key of what is to be trained, whether the others are needed for the
evaluation, and that they may go (`metier.pipeline`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

from metier.artifacts import read_manifest
from metier.model.device import Device
from metier.model.shards import Shards, shards_of
from metier.model.specialist import Specialist, load
from metier.training import ranks


def dismiss() -> None:
    """Lets the other processes go, where they are still here."""
    ranks.from_first(False)
    ranks.stop()


def is_shared(run: Path) -> bool:
    """Whether the run's adapter was trained on a base that was shared over processes."""
    return bool((read_manifest(run / "adapter") or {}).get("base_is_shared"))


def follow(run: Path, device: Device) -> None:
    """In all processes but the first: helps with the evaluation if that is asked for, until all may go."""
    if ranks.from_first(None):
        _, shards = _load(run, device, lambda text: None)
        shards.follow()
        ranks.from_first(None)
    ranks.stop()


@contextlib.contextmanager
def specialist_of(run: Path, device: Device, say: Callable[[str], None]) -> Iterator[Specialist]:
    """The run's model; a base that was shared in training is so again where the other processes are here."""
    if ranks.size() == 1 or not is_shared(run):
        yield load(run, device=device, say=say)
        return
    ranks.from_first(True)
    say(f"evaluating with the base's layers shared by {ranks.size()} processes")
    specialist, shards = _load(run, device, say)
    with shards.lead(specialist.base.model):
        yield specialist


def _load(run: Path, device: Device, say: Callable[[str], None]) -> tuple[Specialist, Shards]:
    gc.collect()  # the part of the base that was trained on, which its hooks refer to in circles
    specialist = load(run, device=device, shared=True, say=say)
    shards = shards_of(specialist.base.model)
    assert shards is not None
    return specialist, shards
