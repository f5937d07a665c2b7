"""Parquet -> rows, 20,000 at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator

import polars

from metier.data.archives import open_packed
from metier.data.lines import Row, Source
from metier.errors import DataError

ROWS_AT_ONCE = 20_000
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


def _scan(source: Source) -> polars.LazyFrame:
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
