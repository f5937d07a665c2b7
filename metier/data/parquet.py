"""Parquet -> rows, 20,000 at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import lru_cache

import polars

from metier.data.archives import Packed, open_packed
from metier.data.lines import Row, Source
from metier.data.trial import survives
from metier.errors import DataError

ROWS_AT_ONCE = 20_000
# Polars is compiled code that a damaged file can make abort: another process reads the file first.
_TRIAL = """
import sys
import polars
table, start = polars.scan_parquet(sys.stdin.buffer.read().decode(), glob=False), 0
while len(block := table.slice(start, 20_000).collect()):
    start += 20_000
"""
_TRIAL_PACKED = "import io, sys, polars\npolars.read_parquet(io.BytesIO(sys.stdin.buffer.read()))"
_MAGIC = b"PAR1"
_BROKEN = (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError)


def parquet_columns(source: Source) -> list[str]:
    """The columns of the file. Raises `DataError` for what is no Parquet file."""
    try:
        return _scan(source).collect_schema().names()
    except _BROKEN:
        raise _damaged(source) from None


def read_parquet(source: Source) -> Iterator[Row]:
    """Every row, with the values as the file types them. Raises `DataError` for a damaged file."""
    table, start = _scan(source), 0
    while True:
        try:
            block = table.slice(start, ROWS_AT_ONCE).collect()
        except _BROKEN:
            raise _damaged(source) from None
        for number, fields in enumerate(block.iter_rows(named=True), start=start + 1):
            yield Row(number, fields=fields)
        start += len(block)
        if len(block) < ROWS_AT_ONCE:
            return


@lru_cache(maxsize=256)
def _is_sound(packed: Packed, size: int, changed: int) -> bool:
    with open_packed(packed) as file:
        if file.peek(4)[:4] != _MAGIC:
            return False
        if packed.member or packed.path.suffix.lower() == ".gz":
            return survives(_TRIAL_PACKED, file.read())
        file.seek(-min(size, 4), os.SEEK_END)
        return file.read() == _MAGIC and survives(_TRIAL, os.fsencode(packed.path))


def _scan(source: Source) -> polars.LazyFrame:
    status = source.path.stat()
    if not _is_sound(source.packed, status.st_size, status.st_mtime_ns):
        raise _damaged(source)
    try:
        if source.member or source.path.suffix.lower() == ".gz":
            with open_packed(source.packed) as file:
                return polars.scan_parquet(io.BytesIO(file.read()))
        return polars.scan_parquet(source.path, glob=False)
    except _BROKEN:
        raise _damaged(source) from None


def _damaged(source: Source) -> DataError:
    size = source.path.stat().st_size
    return DataError(f"{source.shown} is not a Parquet file, or a damaged one ({size} bytes)", hint="export it again")
