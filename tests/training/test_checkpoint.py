"""Tries to get numbers out of a damaged checkpoint, or to lose the good one on a full disk."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from metier.errors import RunError
from metier.training.checkpoint import Progress, load_checkpoint, save_checkpoint


def save(folder: Path, step: int, rows: int = 4) -> tuple[Progress, dict[str, torch.Tensor]]:
    progress = Progress(step=step, num_tokens=100 * step, best_val_loss=1 / 3, best_step=step, seconds=0.1 * step)
    tensors = {"adapter/a": torch.full((rows, 3), float(step)), "optimizer/step/a": torch.tensor(float(step))}
    save_checkpoint(folder, progress, tensors, {"scaler": {}})
    return progress, tensors


def load(folder: Path) -> tuple[int | None, list[str]]:
    """The step of the checkpoint that is used, after a look at its content, and what was said."""
    said: list[str] = []
    found = load_checkpoint(folder, said.append)
    if found is None:
        return None, said
    progress, tensors, extra = found
    step = progress.step
    assert progress == Progress(
        step=step, num_tokens=100 * step, best_val_loss=1 / 3, best_step=step, seconds=0.1 * step
    )
    assert torch.equal(tensors["adapter/a"], torch.full((4, 3), float(step)))
    assert extra == {"scaler": {}}
    return step, said


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 7)
    assert load(tmp_path / "checkpoints") == (7, [])


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert load(tmp_path / "checkpoints") == (None, [])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11, 1000):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000011", "step-00001000"]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_flipped_bit_never_gives_other_numbers(tmp_path: Path, name: str) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    path = tmp_path / "step-00000006" / name
    whole = path.read_bytes()
    found = []
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        step, said = load(tmp_path)
        assert step == (3 if said else 6)
        found.append(bool(said))
    # White space in the JSON may change without a change of meaning.
    assert all(found) if name == "state.safetensors" else sum(found) > 0.6 * len(found)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [cut, empty, grow, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    path = tmp_path / "step-00000006" / name
    damage(path)
    if name == "state.json" and damage is cut:
        damage(path)  # the first byte cut was the line's end
    step, [said] = load(tmp_path)
    assert step == 3
    assert "step-00000006 is damaged" in said


def test_two_damaged_ones_are_both_named_and_none_is_used(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    for path in tmp_path.glob("*/state.safetensors"):
        cut(path)
    step, said = load(tmp_path)
    assert step is None
    assert len(said) == 2


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".step-00000006.tmp")
    assert load(tmp_path) == (3, [])
    save(tmp_path, 6)
    assert load(tmp_path) == (6, [])
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 6)
    cut(tmp_path / "step-00000006" / "state.safetensors")
    save(tmp_path, 6)
    assert load(tmp_path) == (6, [])


def test_a_full_disk_leaves_the_good_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with files_of_at_most(10_000), pytest.raises(RunError, match="step-00000006.*could not be written|could not be"):
        save(tmp_path, 6, rows=1000)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    assert load(tmp_path) == (3, [])
