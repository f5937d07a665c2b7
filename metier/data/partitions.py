"""One function over many partitions -> their results, in the partitions' order, whoever did the work.

The work is done in this process, on processes of this machine, or on a Ray cluster, as the recipe's `scale` says. A
stage is a function (partition, *shared) -> result that looks at nothing else, so that the result is the same on any
number of workers. A few partitions at a time are on their way: memory does not grow with their number.

Limits: a partition that raises ends the work; one that kills its process does so with a sentence.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from types import TracebackType
from typing import Any, TypeVar

from metier.errors import MetierError, RunError
from metier.recipe.scale import ScaleConfig

P = TypeVar("P", bound=Sized)
R = TypeVar("R")
T = TypeVar("T")

PART = 2_000  # records in a partition
# Fewer records are done here: to start a process takes longer.
FEW = 20_000
MOST = 16


def parts(items: Sequence[T], size: int = PART) -> Iterator[Sequence[T]]:
    """The items in partitions of `size`, the last one shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


class Workers:
    """Those who work on partitions. A context: processes and the connection end with it."""

    def __init__(self, config: ScaleConfig | None = None) -> None:
        config = config or ScaleConfig(workers=1)
        self.number = min(MOST, os.cpu_count() or 1) if config.workers == "auto" else config.workers
        self._is_auto = config.workers == "auto"
        self._pool: ProcessPoolExecutor | None = None
        self._ray = config.connect() if config.ray else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if self._ray is not None:
            self._ray.shutdown()

    def map(self, function: Callable[..., R], partitions: Iterable[P], *shared: Any) -> Iterator[R]:
        """`function(partition, *shared)` of each partition. `function` is a module's, what it takes can be pickled.

        Raises what `function` raises, and `RunError` when a process was killed or the cluster fails.
        """
        if self._ray is not None:
            return self._on_ray(function, partitions, shared)
        if self.number == 1:
            return (function(part, *shared) for part in partitions)
        return self._on_processes(function, iter(partitions), shared)

    def _on_processes(
        self, function: Callable[..., R], partitions: Iterator[P], shared: tuple[Any, ...]
    ) -> Iterator[R]:
        if self._pool is None and self._is_auto:
            first: list[P] = []
            count = 0
            while count < FEW and (part := next(partitions, None)) is not None:
                first.append(part)
                count += len(part)
            if count < FEW:
                yield from (function(part, *shared) for part in first)
                return
            partitions = chain(first, partitions)
        if self._pool is None:
            # A new interpreter for each: to fork a process in which polars has threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.number, mp_context=context, initializer=_end_with_parent)
        pool = self._pool
        waiting: deque[Any] = deque()
        try:
            for part in partitions:
                waiting.append(pool.submit(function, part, *shared))
                if len(waiting) > 2 * self.number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                "a worker process ended before its work was done",
                hint="it may have run out of memory: set `scale: {workers: 1}`. A script that calls metier needs "
                '`if __name__ == "__main__":` around the call',
            ) from None

    def _on_ray(self, function: Callable[..., R], partitions: Iterable[P], shared: tuple[Any, ...]) -> Iterator[R]:
        ray: Any = self._ray
        task = ray.remote(function)
        given = [ray.put(value) for value in shared]
        width = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting: deque[Any] = deque()
        try:
            for part in partitions:
                waiting.append(task.remote(part, *given))
                if len(waiting) > width:
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, MetierError) else error from None
        except ray.exceptions.RayError as error:
            raise RunError(f"the Ray cluster failed: {type(error).__name__}", hint="`ray status` shows it") from None


def _end_with_parent() -> None:
    """In a worker: ends it when the process that it works for was killed, which else nobody would."""
    # What partitions leave behind holds no cycles: to look for some after every 700 objects is 7 % of the time.
    gc.set_threshold(100_000)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
