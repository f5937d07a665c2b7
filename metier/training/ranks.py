"""Several processes, one training: what `torchrun` starts, joined through torch.distributed (gloo or NCCL).

Every rank holds the base, or its part of it (`metier.model.shards`), and the adapter. A step's records are divided over
the ranks; their summed losses, token counts and gradients are added up, so each rank makes the same update as one
process would on all the records. Rank 0 alone writes. In a single process every function here does nothing.

Limits: the run's folder and the base must be reachable by every rank.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
_trains_alone = False


def start(device: str) -> None:
    """Joins the process group that `torchrun` describes in the environment; `device` is the recipe's.

    Waits for the other ranks as long as it takes: rank 0 may be preparing the data. A process that torchrun ends
    meanwhile dies at once.
    """
    if distributed.is_initialized():
        return
    is_cuda = device != "cpu" and torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        distributed.init_process_group("nccl" if is_cuda else "gloo", timeout=datetime.timedelta(days=7))
    finally:
        signal.signal(signal.SIGTERM, before)


def stop() -> None:
    """Leaves the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[tuple[int, int]]:
    """Inside, this process trains by itself: `rank()` is 0 of 1. Yields its number and how many there are."""
    global _trains_alone
    place = rank(), size()
    _trains_alone = True
    try:
        yield place
    finally:
        _trains_alone = False


def rank() -> int:
    """This process's number, 0 to `size() - 1`."""
    return distributed.get_rank() if distributed.is_initialized() and not _trains_alone else 0


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() and not _trains_alone else 1


def from_everyone(value: T) -> list[T]:
    """Every process's `value`, in the order of their numbers, also of processes that train alone."""
    if not distributed.is_initialized():
        return [value]
    box: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(box, value)
    return box


def share(items: Sequence[T], lengths: Sequence[int]) -> list[T]:
    """This rank's part of `items`: the longest first, each to the rank with the fewest tokens so far."""
    tokens, mine = [0] * size(), []
    for index in sorted(range(len(items)), key=lambda i: -lengths[i]):
        lightest = tokens.index(min(tokens))
        tokens[lightest] += lengths[index]
        if lightest == rank():
            mine.append(index)
    return [items[index] for index in sorted(mine)]


def totals(*numbers: float) -> list[float]:
    """Each number summed over the ranks, in double precision; the same on every rank."""
    if size() == 1:
        return list(numbers)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    summed = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(summed)
    return summed.tolist()


def in_turn(passes: Sequence[T], *, together: bool) -> list[T | None]:
    """`passes`; with `together` as many as the rank with the most has, None where this one has none left."""
    missing = 0
    if together and size() > 1:
        missing = max(from_everyone(len(passes))) - len(passes)
    return [*passes, *[None] * missing]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its sum over the ranks; a rank without records has none and adds zero."""
    if size() == 1:
        return
    held = list(parameters)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in held])
    distributed.all_reduce(flat)
    for parameter, part in zip(held, torch.split(flat, [p.numel() for p in held]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def from_first(value: Any) -> Any:
    """Rank 0's `value` on every rank; what the others pass is ignored."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
