"""What every reader shares: a source file, a row with its place in it, and lines of UTF-8 with their byte offsets."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metier.errors import DataError


@dataclass(frozen=True, slots=True)
class Source:
    """One file of records. `name` is what the data set calls it: no path of this machine."""

    path: Path
    name: str
    format: str  # csv, tsv, json, jsonl or parquet
    is_test: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One data row: `number` from 1, `byte_offset` of its first byte (-1: the format has none).

    `place` is its line in a text file; `problem` says why it cannot be used, and `fields` is then empty.
    """

    number: int
    byte_offset: int = -1
    place: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def decode(raw: bytes, path: Path, offset: int) -> str:
    """UTF-8 to text; `offset` is where `raw` stands in the file."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        is_utf16 = offset == 0 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "UTF-16" if is_utf16 else "GB18030"
        raise DataError(
            f"`{path}` is not UTF-8: byte {offset + error.start} does not fit"
            + (" (it is UTF-16)" if is_utf16 else ""),
            hint=f"convert it from the encoding it was saved in, such as `iconv -f {encoding} -t UTF-8 {path.name} "
            f"> utf8-{path.name}`; in a spreadsheet, save as CSV UTF-8",
        ) from None


def read_lines(source: Source) -> Iterator[tuple[int, int, str]]:
    """(line from 1, byte offset, text with its line end); the byte-order mark belongs to no line."""
    with source.path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, start=1):
            mark = len(codecs.BOM_UTF8) if offset == 0 and raw.startswith(codecs.BOM_UTF8) else 0
            yield number, offset + mark, decode(raw[mark:], source.path, offset + mark)
            offset += len(raw)
