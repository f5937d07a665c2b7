"""The recipe's sources -> tables, lists and texts to read, and each of them -> its columns and rows.

A source is a file, a glob, a folder or an archive. A zip archive gives one source a member, a workbook one a sheet, a
JSON file of splits one a split; the split `test` is test. Every row of a source comes out, readable or not: one that
cannot be read is a `Row` with a `problem`. What cannot be read at all raises `DataError`.

Limits: a workbook is read whole, and so is a JSON file that is one single object. Everything else is streamed.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from metier.data.archives import list_members
from metier.data.delimited import read_csv
from metier.data.dialects import find_dialect
from metier.data.json_rows import read_json, read_splits
from metier.data.json_shapes import TEST_SPLITS
from metier.data.lines import Row, Source, encoding_of
from metier.data.parquet import parquet_columns, read_parquet
from metier.data.plain_text import COLUMNS as TEXT_COLUMNS
from metier.data.plain_text import read_text
from metier.errors import DataError
from metier.recipe import DataConfig

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".xlsx": "excel", ".xlsm": "excel", ".xls": "excel", ".ods": "excel", ".txt": "text", ".md": "text",
    ".markdown": "text",
}  # fmt: skip


def find_sources(config: DataConfig) -> list[Source]:
    """What `sources` and `test_sources` name, in a fixed order, test sources last and only as test.

    Raises `DataError` for a missing file, a glob without a match, an unknown extension or a damaged archive.
    """
    test = _expand(config.test_sources)
    paths = [path for path in _expand(config.sources) if path not in test] + test
    if len(paths) == len(test):
        raise DataError("every file of `data.sources` is also in `data.test_sources`: nothing is left to train on")
    plain = {path.name for path in paths}
    folder = os.path.commonpath([path.parent for path in paths])
    names = [path.name if len(plain) == len(paths) else path.relative_to(folder).as_posix() for path in paths]
    sources = [
        Source(
            path, name, _format(path) or "zip", is_test=path in test, encoding=config.encoding,
            header_line=config.header_line, passage_chars=config.passage_chars,
        )
        for path, name in zip(paths, names, strict=True)
    ]  # fmt: skip
    parts = [part for source in sources for member in _members(source) for part in _parts(member)]
    return [part for part in parts if not part.is_test] + [part for part in parts if part.is_test]


def describe_source(source: Source) -> dict[str, str]:
    """For the manifest and for people: how the source is written, as far as that was found out."""
    found = {"format": source.format}
    if source.format in ("csv", "tsv", "json", "jsonl", "text"):
        found["encoding"] = encoding_of(source).label
    if source.format in ("csv", "tsv") and (dialect := find_dialect(source).describe()):
        found["dialect"] = dialect
    if source.note:
        found["note"] = source.note
    return found


def read_columns(source: Source) -> list[str]:
    """The source's columns; for JSON the keys of all its objects, as they first appear."""
    if source.format in ("csv", "tsv"):
        return find_dialect(source).columns
    if source.format == "parquet":
        return parquet_columns(source)
    if source.format == "excel":
        from metier.data.excel import sheet_columns

        return sheet_columns(source)
    if source.format == "text":
        return TEXT_COLUMNS
    columns: dict[str, None] = {}
    first_problem = None
    for row in read_rows(source):
        columns.update(dict.fromkeys(row.fields))
        if row.problem and not first_problem:
            first_problem = f"{row.place or f'row {row.number}'}: {row.problem}"
    if not columns:
        raise DataError(f"{source.shown}: no row could be read; {first_problem or 'its objects are empty'}")
    if broken := [name for name in columns if name.encode(errors="replace").decode() != name]:
        raise DataError(f"{source.shown}: the key {broken[0]!a} holds half of a surrogate pair", hint="export it again")
    return list(columns)


def read_rows(source: Source) -> Iterator[Row]:
    """Every data row of the source in order, readable or not; blank lines are no rows. Raises `DataError`."""
    count = 0
    for row in _reader(source.format)(source):
        count += 1
        yield row
    if count == 0:
        what = "has a header and no rows" if source.format in ("csv", "tsv", "excel") else "holds no rows"
        raise DataError(f"{source.shown} {what}", hint="take it out of `data.sources`, or export it again")


def _reader(name: str) -> Callable[[Source], Iterator[Row]]:
    if name == "excel":
        from metier.data.excel import read_excel

        return read_excel
    readers = {
        "csv": read_csv, "tsv": read_csv, "json": read_json, "jsonl": read_json, "parquet": read_parquet,
        "text": read_text,
    }  # fmt: skip
    return readers[name]


def _format(path: Path) -> str | None:
    """By the extension, before `.gz` if that is the last; None for a zip archive and for what is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        inner = FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner
    return FORMATS.get(path.suffix.lower())


def _is_read(path: Path) -> bool:
    return _format(path) is not None or path.suffix.lower() == ".zip"


def _expand(patterns: list[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(os.path.normpath(pattern))
        if path.is_dir():
            found.update(dict.fromkeys(_in_folder(path)))
        elif path.exists():
            found[path] = None
        elif not glob.has_magic(pattern):
            raise DataError(f"there is no source file `{path}`", hint="sources are relative to the recipe's folder")
        else:
            matches = [Path(os.path.normpath(m)) for m in sorted(glob.glob(pattern, recursive=True))]
            files = [match for match in matches if match.is_file()]
            if not files:
                raise DataError(
                    f"the source `{pattern}` matches no file", hint="sources are relative to the recipe's folder"
                )
            found.update(dict.fromkeys(files))
    for path in found:
        if str(path).encode(errors="replace").decode() != str(path):
            raise DataError(f"the file name {str(path)!a} is not UTF-8", hint="rename it, or narrow the glob")
        if not _is_read(path):
            raise DataError(
                f"`{path}` has the extension `{path.suffix}`, which is not read; known are {', '.join(FORMATS)}, "
                "these with .gz, and .zip",
                hint="export it as one of these, or narrow the glob",
            )
        if not os.access(path, os.R_OK):
            raise DataError(f"no permission to read `{path}`")
    return list(found)


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder and of those in it that can be read, hidden ones aside."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_read(path) and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"the folder `{folder}` holds no file that is read", hint=f"read are {', '.join(FORMATS)}")
    return files


def _members(source: Source) -> list[Source]:
    """A zip archive's members: its tables and lists, or where it has none its texts; what is left out is noted."""
    if source.format != "zip":
        return [source]
    members = {member: (name, FORMATS.get(Path(name).suffix.lower())) for member, name in list_members(source.path)}
    formats = {kind for _, kind in members.values()}
    if not formats - {None}:
        raise DataError(f"`{source.path}` holds no file that is read", hint=f"read are {', '.join(FORMATS)}")
    takes_text = formats <= {None, "text"}
    taken = [
        replace(source, name=f"{source.name}/{name}", member=member, format=kind)
        for member, (name, kind) in members.items()
        if kind and (takes_text or kind != "text")
    ]
    left = len(members) - len(taken)
    if left:
        taken[0] = replace(taken[0], note=f"{left} other {'file' if left == 1 else 'files'} of the archive left out")
    return taken


def _parts(source: Source) -> list[Source]:
    """A workbook's sheets, a JSON file's splits, or the source itself."""
    if source.format == "excel":
        from metier.data.excel import sheet_names

        sheets = sheet_names(source.path, source.member)
        only = len(sheets) == 1
        return [replace(source, name=source.name if only else f"{source.name}#{sheet}", part=sheet) for sheet in sheets]
    if source.format == "json" and (splits := read_splits(source)):
        return [
            replace(
                source, name=f"{source.name}#{split}", part=split,
                is_test=source.is_test or split.casefold() in TEST_SPLITS,
            )
            for split in splits
        ]  # fmt: skip
    return [source]
