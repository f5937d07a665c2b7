"""The recipe's sources -> files, and each file -> its columns and rows.

Every row of a file comes out, readable or not: one that cannot be read is a `Row` with a `problem`. A file that
cannot be read at all raises `DataError`. Files are UTF-8, with or without a byte-order mark.

Limits: CSV and JSON Lines are streamed; JSON and Parquet are read whole.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import polars

from metier.data.delimited import csv_layout, read_csv
from metier.data.json_rows import read_json, read_jsonl
from metier.data.lines import Row, Source
from metier.errors import DataError
from metier.recipe import DataConfig

FORMATS = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet"}


def find_sources(config: DataConfig) -> list[Source]:
    """The files that `sources` and `test_sources` name, in a fixed order, test files last and only as test.

    Raises `DataError` for a missing file, a glob without a match, a folder or an unknown extension.
    """
    test = _expand(config.test_sources)
    paths = [path for path in _expand(config.sources) if path not in test] + test
    if len(paths) == len(test):
        raise DataError("every file of `data.sources` is also in `data.test_sources`: nothing is left to train on")
    plain = {path.name for path in paths}
    folder = os.path.commonpath([path.parent for path in paths])
    names = [path.name if len(plain) == len(paths) else path.relative_to(folder).as_posix() for path in paths]
    return [
        Source(path, name, FORMATS[path.suffix.lower()], is_test=path in test)
        for path, name in zip(paths, names, strict=True)
    ]


def read_columns(source: Source) -> list[str]:
    """The file's columns; for JSON the keys of all its objects, as they first appear."""
    if source.format in ("csv", "tsv"):
        return csv_layout(source)[1]
    if source.format == "parquet":
        return _open_parquet(source).columns
    columns: dict[str, None] = {}
    first_problem = None
    for row in read_rows(source):
        columns.update(dict.fromkeys(row.fields))
        if row.problem and not first_problem:
            first_problem = f"{row.place or f'row {row.number}'}: {row.problem}"
    if not columns:
        raise DataError(f"`{source.path}`: no row could be read; {first_problem or 'its objects are empty'}")
    if broken := [name for name in columns if name.encode(errors="replace").decode() != name]:
        raise DataError(
            f"`{source.path}`: the key {broken[0]!a} holds half of a surrogate pair", hint="export it again"
        )
    return list(columns)


def read_rows(source: Source) -> Iterator[Row]:
    """Every data row of the file in order, readable or not; blank lines are no rows. Raises `DataError`."""
    readers = {"csv": read_csv, "tsv": read_csv, "json": read_json, "jsonl": read_jsonl, "parquet": _read_parquet}
    count = 0
    for row in readers[source.format](source):
        count += 1
        yield row
    if count == 0:
        what = "has a header and no rows" if source.format in ("csv", "tsv") else "holds no rows"
        raise DataError(f"`{source.path}` {what}", hint="take it out of `data.sources`, or export it again")


def _expand(patterns: list[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(os.path.normpath(pattern))
        if path.is_dir():
            raise DataError(f"the source `{path}` is a folder", hint=f"name its files with a glob: `{path}/*.csv`")
        if path.exists():
            found[path] = None
            continue
        if not glob.has_magic(pattern):
            raise DataError(f"there is no source file `{path}`", hint="sources are relative to the recipe's folder")
        matches = [Path(os.path.normpath(m)) for m in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(m)]
        if not matches:
            raise DataError(
                f"the source `{pattern}` matches no file", hint="sources are relative to the recipe's folder"
            )
        found.update(dict.fromkeys(matches))
    for path in found:
        if str(path).encode(errors="replace").decode() != str(path):
            raise DataError(f"the file name {str(path)!a} is not UTF-8", hint="rename it, or narrow the glob")
        if path.suffix.lower() not in FORMATS:
            raise DataError(
                f"`{path}` has the extension `{path.suffix}`, which is not read; known are {', '.join(FORMATS)}",
                hint="export it as one of these, or narrow the glob; a spreadsheet can be saved as CSV UTF-8",
            )
        if not os.access(path, os.R_OK):
            raise DataError(f"no permission to read `{path}`")
    return list(found)


def _open_parquet(source: Source) -> polars.DataFrame:
    try:
        with source.path.open("rb") as file:
            return polars.read_parquet(file)
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError):
        raise DataError(
            f"`{source.path}` is not a Parquet file, or a damaged one ({source.path.stat().st_size} bytes)",
            hint="export it again",
        ) from None


def _read_parquet(source: Source) -> Iterator[Row]:
    for number, fields in enumerate(_open_parquet(source).iter_rows(named=True), start=1):
        yield Row(number, fields=fields)
