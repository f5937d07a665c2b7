"""What every reader shares: a source file, a row with its place in it, and text with its byte offsets.

A line that does not fit the file's encoding comes out all the same, with the problem said, so that it can be
rejected by its place. Memory holds one line (64 MiB at most) or one block.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from metier.data.archives import Packed, open_packed
from metier.data.encodings import Encoding, detect_encoding, named_encoding, sample_lines
from metier.errors import DataError

MAX_RECORD_BYTES = 64 * 2**20
BLOCK_BYTES = 2**20
SAMPLE_BYTES = 2**16
# UTF-8 among lines of another encoding: of as many bytes above ASCII, chance makes no valid UTF-8.
SURE_UTF8_BYTES = 12


@dataclass(frozen=True, slots=True)
class Source:
    """One table, list or text to read. `name` is what the data set calls it: no path of this machine.

    `member` is the file inside a zip archive, `part` the sheet of a workbook or the split of a JSON file.
    """

    path: Path
    name: str
    format: str  # csv, tsv, json, jsonl, parquet, excel or text
    is_test: bool
    member: str = ""
    part: str = ""
    encoding: str = "auto"
    header_line: int | None = None
    passage_chars: int = 2000
    note: str = ""

    @property
    def packed(self) -> Packed:
        return Packed(self.path, self.member)

    @property
    def shown(self) -> str:
        """For errors: the path, and what in it."""
        inner = ", ".join(part for part in (self.member, self.part) if part)
        return f"`{self.path}` ({inner})" if inner else f"`{self.path}`"


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

    def __reduce__(self) -> tuple[type[Row], tuple[Any, ...]]:
        """For another process: a third of the time of how dataclasses with slots are pickled."""
        return Row, (self.number, self.byte_offset, self.place, self.fields, self.problem)


class Line(NamedTuple):
    """`number` from 1; `text` has its line end; `problem` says which byte does not fit the encoding."""

    number: int
    offset: int
    text: str
    problem: str | None


def encoding_of(source: Source) -> Encoding:
    """How the file is written: as the recipe says, by its mark, or as its bytes make likely. Raises `DataError`."""
    status = source.path.stat()
    return _encoding(source.packed, source.encoding, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _encoding(packed: Packed, name: str, size: int, changed: int) -> Encoding:
    with open_packed(packed) as file:
        head = file.read(SAMPLE_BYTES)
        if name != "auto":
            return named_encoding(name, head)

        def blocks() -> Iterator[bytes]:
            yield head
            while block := file.read(BLOCK_BYTES):
                yield block

        return detect_encoding(head, sample_lines(blocks(), SAMPLE_BYTES), packed.path)


def read_lines(source: Source) -> Iterator[Line]:
    """Every line of the file. Lines end in LF or CRLF, or in CR where the file has no LF in its first 64 KiB.

    Raises `DataError` for a line above 64 MiB.
    """
    encoding = encoding_of(source)
    with open_packed(source.packed) as file:
        head = file.peek(SAMPLE_BYTES)
        is_cr = b"\r" in head and b"\n" not in head
        file.read(encoding.mark)
        if is_cr or not _keeps_line_ends(encoding.codec):
            yield from _split_text(source, encoding, "\r" if is_cr else "\n")
            return
        offset, number = encoding.mark, 0
        while raw := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(raw) > MAX_RECORD_BYTES:
                raise _too_long(source, number)
            yield _line(number, offset, raw, encoding)
            offset += len(raw)


def _line(number: int, offset: int, raw: bytes, encoding: Encoding) -> Line:
    codec = encoding.codec
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as error:
        problem = f"byte {offset + error.start} does not fit {encoding.label}"
        return Line(number, offset, raw.decode(codec, "surrogateescape"), problem)
    if codec != "utf-8" and not raw.isascii() and _is_surely_utf8(raw):
        return Line(number, offset, text, f"UTF-8 text in a file that is {encoding.label}")
    return Line(number, offset, text, None)


def _is_surely_utf8(raw: bytes) -> bool:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return False
    return len(raw) - sum(character.isascii() for character in text) >= SURE_UTF8_BYTES


def read_blocks(source: Source) -> Iterator[str]:
    """The file's text in blocks of about 1 MiB, without its mark. Raises `DataError` for a byte that does not fit."""
    encoding = encoding_of(source)
    decoder = codecs.getincrementaldecoder(encoding.codec)()
    with open_packed(source.packed) as file:
        file.read(encoding.mark)
        offset = encoding.mark
        while True:
            raw = file.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, not raw)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source.shown}: byte {offset - pending + error.start} does not fit {encoding.label}",
                    hint="name the right encoding as `data.encoding`, or export the file as UTF-8",
                ) from None
            offset += len(raw)
            if text:
                yield text
            if not raw:
                return


def _split_text(source: Source, encoding: Encoding, end: str) -> Iterator[Line]:
    """Lines of a text whose line ends cannot be seen in its bytes: UTF-16, or CR alone."""
    errors = "surrogatepass" if encoding.codec.startswith(("utf-16", "utf-32")) else "surrogateescape"
    decoder = codecs.getincrementaldecoder(encoding.codec)(errors)
    rest, offset, number = "", encoding.mark, 0
    with open_packed(source.packed) as file:
        file.read(encoding.mark)
        while True:
            raw = file.read(BLOCK_BYTES)
            try:
                rest += decoder.decode(raw, not raw)
            except UnicodeDecodeError:
                rest += "\udc80"  # half a code unit at the very end
            *lines, rest = rest.split(end)
            if len(rest) > MAX_RECORD_BYTES:
                raise _too_long(source, number + 1)
            for text in [f"{line}{end}" for line in lines] + ([rest] if rest and not raw else []):
                number += 1
                size = len(text.encode(encoding.codec, errors))
                is_broken = any("\ud800" <= character <= "\udfff" for character in text)
                yield Line(number, offset, text, f"it does not fit {encoding.label}" if is_broken else None)
                offset += size
            if not raw:
                return


def _keeps_line_ends(codec: str) -> bool:
    """Whether the byte 0A is a line end and nothing else."""
    return not codec.startswith(("utf-16", "utf-32", "utf_16", "utf_32", "utf-7", "iso2022", "hz"))


def _too_long(source: Source, number: int) -> DataError:
    return DataError(
        f"{source.shown}, line {number} is longer than {MAX_RECORD_BYTES // 2**20} MiB",
        hint="records are lines; a file without line ends cannot be read",
    )
