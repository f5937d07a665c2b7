"""Values too many to hold -> unnamed files beside the artifact, and back; memory holds where each one is.

`Spool` keeps single Python values, `Rows` the rows of a matrix, `SortedTexts` strings in order. Reading is by plain
reads, not by a mapping: mapped pages count as this process's memory, and a full disk would kill it. The files have no
name (the system's own temporary files), so that nothing is left of them whatever ends the process.

Limits: what is written stays until the file is closed; only the process that wrote values can read them.
"""

from __future__ import annotations

import heapq
import io
import marshal
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from metier.artifacts import disk_errors

BLOCK_BYTES = 2**18
GUESS_BYTES = 2**11  # most values are shorter: one read
HEAD_BYTES = 4
RUN_CHARS = 2**25  # sorted in memory at once


class _File:
    """An unnamed file in `folder` (absent: the system's place for such), written at its end through a buffer."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        with disk_errors(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 (it lives as long as self)
        self._buffer = bytearray()
        self.size = 0
        weakref.finalize(self, self._file.close)

    def append(self, data: bytes | memoryview) -> None:
        self._buffer += data
        self.size += len(data)
        if len(self._buffer) >= BLOCK_BYTES:
            self._flush()

    def read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start` on."""
        if self._buffer and start + size > self.size - len(self._buffer):
            self._flush()
        self._file.seek(start)
        found = self._file.read(size)
        while len(found) < size and (more := self._file.read(size - len(found))):  # one read has a limit of 2 GiB
            found += more
        return found

    def _flush(self) -> None:
        with disk_errors(self._folder):
            self._file.seek(0, io.SEEK_END)
            view = memoryview(self._buffer)
            while len(view):
                view = view[self._file.write(view) :]
        self._buffer = bytearray()


class Spool:
    """Python's plain values (str, int, bytes, tuple, list, ...), each found again by its place.

    Threads may share it: what is sent to other processes is read by a thread of its own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._lock = threading.Lock()
        self.folder, self._file = folder, _File(folder)
        self._last: tuple[int, Any] = (-1, None)
        self._view, self._begin = memoryview(b""), 0

    @property
    def end(self) -> int:
        """Where the next value will stand."""
        return self._file.size

    def put(self, value: Any) -> int:
        """Writes the value and returns its place."""
        data = marshal.dumps(value)
        with self._lock:
            place = self._file.size
            self._file.append(len(data).to_bytes(HEAD_BYTES, "little") + data)
        return place

    def get(self, place: int) -> Any:
        """The value at a place. Not to be changed: who asks for it again gets the same one."""
        last = self._last
        if place == last[0]:
            return last[1]
        with self._lock:
            at = place - self._begin + HEAD_BYTES
            try:
                if at < HEAD_BYTES:
                    raise EOFError
                value = marshal.loads(self._view[at:])  # what stands behind it does not count
            except EOFError:  # not in the block, or not the whole of it
                # Where values are asked for in order, many at once.
                size = BLOCK_BYTES if HEAD_BYTES <= at <= len(self._view) + HEAD_BYTES else GUESS_BYTES
                self._view, self._begin = memoryview(self._read(place, size)), place
                value = marshal.loads(self._view[HEAD_BYTES:])
        self._last = (place, value)
        return value

    def between(self, start: int, stop: int) -> Iterator[Any]:
        """The values from one place to another, in order."""
        block, at = b"", 0
        while start < stop:
            if at >= len(block) or _end(block, at) > len(block):
                block, at = self._read(start, BLOCK_BYTES), 0
            end = _end(block, at)
            yield marshal.loads(block[at + HEAD_BYTES : end])
            start, at = start + end - at, end

    def _read(self, place: int, size: int) -> bytes:
        """A block with at least the whole value at `place`."""
        block = self._file.read(place, size)
        if (missing := _end(block, 0) - len(block)) > 0:
            block += self._file.read(place + len(block), missing)
        return block


def _end(block: bytes, at: int) -> int:
    """Where the value that begins at `at` ends; beyond the block where not even its size is in it."""
    if at + HEAD_BYTES > len(block):
        return len(block) + 1
    return at + HEAD_BYTES + int.from_bytes(block[at : at + HEAD_BYTES], "little")


class Rows:
    """A matrix [n, width], or a vector [n] where `width` is None, that is written row after row."""

    def __init__(self, dtype: Any, width: int | None = None, *, folder: Path | None = None) -> None:
        self._file = _File(folder)
        self._dtype, self._shape = np.dtype(dtype), () if width is None else (width,)
        self._bytes = self._dtype.itemsize * (width or 1)

    def append(self, rows: NDArray[Any]) -> None:
        """More rows, [m, width] or [m]."""
        self._file.append(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())

    def whole(self) -> NDArray[Any]:
        """All rows."""
        return self._made(self._file.read(0, self._file.size))

    def take(self, numbers: Iterable[int]) -> NDArray[Any]:
        """The rows of these numbers."""
        return self._made(b"".join([self._file.read(n * self._bytes, self._bytes) for n in numbers]))

    def _made(self, data: bytes) -> NDArray[Any]:
        return np.frombuffer(data, dtype=self._dtype).reshape(-1, *self._shape)


class SortedTexts(Sequence[str]):
    """The texts in order, by code points; equal ones as they came. `order`: [n], where each one stood before.

    Runs that fit into memory are sorted there, written, and merged (Knuth, volume 3, 5.4).
    """

    def __init__(self, texts: Iterable[str], folder: Path | None = None) -> None:
        runs, self._spool = Spool(folder), Spool(folder)
        bounds, run, chars, first = [0], list[str](), 0, 0
        for text in texts:
            run.append(text)
            chars += len(text)
            if chars >= RUN_CHARS:
                for item in _sorted_run(run, first):
                    runs.put(item)
                bounds.append(runs.end)
                run, chars, first = [], 0, first + len(run)
        self._places, order = array("q"), array("q")
        written = (runs.between(*some) for some in zip(bounds, bounds[1:], strict=False))
        merged = heapq.merge(*written, _sorted_run(run, first))  # the last one need not be written
        for text, position in merged:
            self._places.append(self._spool.put(text))
            order.append(position)
        self.order = np.frombuffer(order, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self._spool.get(place) for place in self._places[at]]
        found: str = self._spool.get(self._places[at])
        return found


def _sorted_run(texts: list[str], first: int) -> Iterator[tuple[str, int]]:
    """(text, position) in order; `first` is the position of the first."""
    return ((texts[at], first + at) for at in sorted(range(len(texts)), key=texts.__getitem__))
