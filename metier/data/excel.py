"""Excel workbooks (xlsx, xlsm, xls, ods) -> rows of text, a sheet at a time, read whole.

Title rows above the header are passed over as in CSV; empty rows are no rows. Text cells stay as they are. A number is
the shortest text that gives the same number, whole numbers without a point; a date is ISO 8601.

Limits: Excel keeps 15 digits of a number, so an 18-digit identifier that was typed as one had lost its end before the
file was written: rows with such a number are rejected, and a leading zero that only the cell's format shows is not
seen. Formulas give their last stored value. A workbook unpacks to at most 2 GiB.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import python_calamine

from metier.data.archives import Packed, open_packed
from metier.data.dialects import MAX_TITLE_ROWS, column_names, looks_like_header
from metier.data.lines import Row, Source
from metier.data.trial import survives
from metier.errors import DataError

MAX_UNPACKED = 2 * 2**30
EXACT_DIGITS = 15
# The reader is compiled code that a damaged workbook can make abort: another process reads it first.
_TRIAL = """
import io, sys
import python_calamine
workbook = python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(sys.stdin.buffer.read()))
for name in workbook.sheet_names:
    workbook.get_sheet_by_name(name).to_python(skip_empty_area=False)
"""


def sheet_names(packed: Packed) -> list[str]:
    """The sheets that hold anything and are not hidden. Raises `DataError` for what is no workbook."""
    status = packed.path.stat()
    return _sheet_names(packed, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _sheet_names(packed: Packed, size: int, changed: int) -> list[str]:
    workbook = _open(packed)
    visible = [s.name for s in workbook.sheets_metadata if s.visible == python_calamine.SheetVisibleEnum.Visible]
    names = [name for name in visible if workbook.get_sheet_by_name(name).end is not None]
    if not names:
        raise DataError(f"`{packed.path}` holds no sheet with anything in it", hint="take it out of `data.sources`")
    return names


def sheet_columns(source: Source) -> list[str]:
    """The columns of a sheet."""
    return _table(source)[1]


def read_excel(source: Source) -> Iterator[Row]:
    """Every row below the header that is not empty."""
    header, columns, rows = _table(source)
    number = 0
    for position, cells in enumerate(rows, start=1):
        if position <= header or all(cell == "" for cell in cells):
            continue
        number += 1
        values = [_text(cell) for cell in cells]
        problem = None
        if any(value is None for value in values):
            problem = f"a number of more than {EXACT_DIGITS} digits, of which Excel keeps {EXACT_DIGITS}"
        place = f"sheet row {position}"
        fields = {} if problem else dict(zip(columns, values, strict=False))
        yield Row(number, -1, place, fields, problem)


def _table(source: Source) -> tuple[int, list[str], list[list[Any]]]:
    """(rows above the data, columns, all rows of the sheet from its first one)."""
    rows = _open(source.packed).get_sheet_by_name(source.part).to_python(skip_empty_area=False)
    header = source.header_line - 1 if source.header_line else _header(rows)
    if header >= len(rows):
        raise DataError(f"{source.shown}: the sheet has no row {header + 1}", hint="see `data.header_line`")
    cells = [_text(cell) or "" for cell in rows[header]]
    columns, _ = column_names(cells, source, lambda at: all(row[at] == "" for row in rows[header + 1 :]))
    return header + 1, columns, rows


def _header(rows: list[list[Any]]) -> int:
    """The position of the header: below titles (one cell filled in a wider sheet) and empty rows."""
    for position, row in enumerate(rows[: MAX_TITLE_ROWS + 1]):
        if sum(cell != "" for cell in row) <= (1 if len(row) > 1 else 0):
            continue
        return position if looks_like_header([_text(cell) or "" for cell in row]) else 0
    return 0


@lru_cache(maxsize=2)
def _workbook(packed: Packed, size: int, changed: int) -> python_calamine.CalamineWorkbook:
    with open_packed(packed) as file:
        raw = file.read()
    if raw.startswith(b"PK"):
        with contextlib.suppress(zipfile.BadZipFile, NotImplementedError), zipfile.ZipFile(io.BytesIO(raw)) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > MAX_UNPACKED:
                raise DataError(f"`{packed.path}` unpacks to {unpacked // 2**20:,} MiB", hint="save its sheets as CSV")
    if not survives(_TRIAL, raw):
        raise DataError(
            f"`{packed.path}` is no Excel workbook, or a damaged one, or has a password", hint="save it again as xlsx"
        )
    return python_calamine.CalamineWorkbook.from_filelike(io.BytesIO(raw))


def _open(packed: Packed) -> python_calamine.CalamineWorkbook:
    status = packed.path.stat()
    return _workbook(packed, status.st_size, status.st_mtime_ns)


def _text(cell: Any) -> str | None:
    """The cell as text; None for a number of which digits are lost."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, int | float):
        whole = int(cell) if cell == int(cell) else None
        if whole is not None:
            return None if len(str(abs(whole))) > EXACT_DIGITS else str(whole)
        return repr(cell)
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return cell.isoformat(" ") if isinstance(cell, datetime.datetime) else str(cell)
