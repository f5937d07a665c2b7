"""Plain, gzip and zip files -> bytes. Nothing is unpacked to disk, so that a member's name can lead nowhere.

What a packed file may become is bounded: 200 times its packed size, or 256 MiB where that is more. Members that lead
out of the archive, have a password or stand twice are refused. File names of Chinese zip programs, which carry no mark
of their encoding, are read as GB18030.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from metier.errors import DataError

MAX_MEMBERS = 10_000
MAX_RATIO = 200
ALWAYS_ALLOWED = 256 * 2**20


class Packed(NamedTuple):
    """A file, or a member of a zip archive (by the name that the archive holds)."""

    path: Path
    member: str = ""


class _Bounded(io.RawIOBase):
    """Passes bytes on, up to a limit."""

    def __init__(self, file: BinaryIO, limit: int, path: Path) -> None:
        self._file, self._left, self._limit, self._path = file, limit, limit, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise DataError(
                f"`{self._path}` unpacks to more than {self._limit // 2**20:,} MiB, over {MAX_RATIO} times its size",
                hint="if that is meant, unpack it and name the files",
            )
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def open_packed(packed: Packed) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a file or member, unpacked as they are read. Raises `DataError` for a damaged archive."""
    path, member = packed
    try:
        if member:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                limit = max(ALWAYS_ALLOWED, MAX_RATIO * archive.getinfo(member).compress_size)
                yield io.BufferedReader(_Bounded(file, limit, path), 2**16)  # type: ignore[arg-type]
        elif path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as unpacked:
                limit = max(ALWAYS_ALLOWED, MAX_RATIO * path.stat().st_size)
                yield io.BufferedReader(_Bounded(unpacked, limit, path), 2**16)  # type: ignore[arg-type]
        else:
            with open(path, "rb", buffering=2**16) as plain:
                yield plain  # type: ignore[misc]
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError) as error:
        if isinstance(error, OSError) and not member and path.suffix.lower() != ".gz":
            raise
        raise DataError(f"`{path}` is damaged or cut off: {error}", hint="copy or export it again") from None


def list_members(path: Path) -> list[tuple[str, str]]:
    """(name in the archive, name as people read it) of every file in a zip archive, by name. Raises `DataError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"`{path}` is no zip archive, or a damaged one: {error}", hint="copy it again") from None
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"`{path}` holds {len(infos):,} files; up to {MAX_MEMBERS:,} are read")
    members = {}
    for info in infos:
        parts = PurePosixPath(info.filename).parts
        if info.filename.startswith("/") or ".." in parts or "\\" in info.filename or ":" in info.filename:
            raise DataError(f"`{path}` holds a file whose name leads out of it", hint="pack it again")
        if parts[0] == "__MACOSX" or parts[-1].startswith("."):
            continue
        if info.flag_bits & 1:
            raise DataError(f"`{path}` needs a password", hint="unpack it and name the files")
        if info.filename in members:
            raise DataError(f"`{path}` holds two files of the same name", hint="pack it again")
        members[info.filename] = info.filename if info.flag_bits & 0x800 else _readable(info.filename)
    return sorted(members.items())


def _readable(name: str) -> str:
    """zipfile takes a name without mark for cp437."""
    raw = name.encode("cp437", "replace")
    if raw.isascii():
        return name
    for codec in ("utf-8", "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode(codec)
    return name
