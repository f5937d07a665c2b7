"""CSV and TSV -> rows, streamed, after RFC 4180 to the letter once the dialect is known.

A row with too few or too many fields is a rejected row, and so is one with a byte that does not fit the encoding. A
quote that is closed wrongly makes every line it spans a rejected row, because nobody can tell text from rows there; a
quote that never closes stops the reading with `DataError`. Blank lines, and what stands above the header, are no rows.

Limits: a record is at most 64 MiB.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from metier.data.dialects import Dialect, find_dialect
from metier.data.lines import MAX_RECORD_BYTES, Line, Row, Source, read_lines
from metier.errors import DataError


class _CsvLines:
    """Feeds csv.reader, which takes exactly the lines of one record; remembers these lines."""

    def __init__(self, source: Source, dialect: Dialect) -> None:
        self._lines = (line for line in read_lines(source) if line.number >= dialect.header_line)
        self._dialect = dialect
        self.record: list[Line] = []
        self.is_blank = False
        self.ended = False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None or (self.record and line.offset - self.record[0].offset > MAX_RECORD_BYTES):
            self.ended = True
            raise StopIteration
        self.is_blank = not line.text.strip("\r\n ")
        if not self.is_blank or not self.record:
            # The text itself goes to the reader alone: what stays here is the place.
            self.record.append(line._replace(text=""))
        return self._dialect.line(line.text)


def read_csv(source: Source) -> Iterator[Row]:
    """Every data row of a CSV or TSV file. Raises `DataError` for a broken header or a quote that never closes."""
    dialect = find_dialect(source)
    lines = _CsvLines(source, dialect)
    reader = csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote, strict=True)
    number = -1  # the header is no row
    while True:
        lines.record.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            start = lines.record[0].number
            if lines.ended:
                raise DataError(
                    f"{source.shown}, line {start}: a quote opens in this row and never closes, so that the rows "
                    "after it cannot be told apart",
                    hint="close the quote, or write a quote inside a quoted field twice; if the file was cut off, "
                    "export it again",
                ) from None
            problem = "a bare carriage return in a field" if "new-line" in str(error) else f"not valid CSV: {error}"
            for line in lines.record:
                number += 1
                quoted = "" if line.number == start else f" (in a quote opened on line {start})"
                yield Row(number, line.offset, f"line {line.number}{quoted}", problem=problem)
            continue
        if lines.is_blank:
            continue
        number += 1
        if number > 0:
            yield _row(number, lines.record, values, dialect)


def _row(number: int, record: list[Line], values: list[str], dialect: Dialect) -> Row:
    first, last = record[0], record[-1]
    place = f"line {first.number}" if first.number == last.number else f"lines {first.number} to {last.number}"
    columns, wide = dialect.columns, len(dialect.columns) + dialect.unnamed
    problem = next((line.problem for line in record if line.problem), None)
    if problem is None and len(values) not in (len(columns), wide):
        fields = "1 field" if len(values) == 1 else f"{len(values)} fields"
        problem = f"{fields}, expected {len(columns)}"
    elif problem is None and any(value.strip() for value in values[len(columns) :]):
        problem = "a value in a column without a name"
    if problem:
        return Row(number, first.offset, place, problem=problem)
    return Row(number, first.offset, place, dict(zip(columns, values, strict=False)))
