"""CSV and TSV -> rows, streamed, after RFC 4180 to the letter.

A row with too few or too many fields is a rejected row. A quote that is closed wrongly makes every line it spans a
rejected row, because nobody can tell text from rows there; a quote that never closes stops the reading with
`DataError`. Blank lines are no rows. The delimiter of a .csv file is whichever of , ; tab | cuts its first lines into
rows as wide as the header.

Limits: a record is at most 64 MiB, and line ends are LF or CRLF.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

from metier.data.lines import Row, Source, read_lines
from metier.errors import DataError

MAX_RECORD_BYTES = 64 * 2**20


class _CsvLines:
    """Feeds csv.reader, which takes exactly the lines of one record; remembers where these lines start."""

    def __init__(self, source: Source) -> None:
        self._lines = read_lines(source)
        self.record: list[tuple[int, int]] = []
        self.is_blank = False
        self.ended = False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        number, offset, text = next(self._lines, (0, 0, ""))
        if number == 0 or (self.record and offset - self.record[0][1] > MAX_RECORD_BYTES):
            self.ended = True
            raise StopIteration
        self.is_blank = not text.strip("\r\n ")
        if not self.is_blank or not self.record:
            self.record.append((number, offset))
        return text


def read_csv(source: Source) -> Iterator[Row]:
    """Every data row of a CSV or TSV file. Raises `DataError` for a broken header or a quote that never closes."""
    delimiter, columns = csv_layout(source)
    lines = _CsvLines(source)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = -1  # the header is no row
    while True:
        lines.record.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            start = lines.record[0][0]
            if lines.ended:
                raise DataError(
                    f"`{source.path}`, line {start}: a quote opens in this row and never closes, so that the rows "
                    "after it cannot be told apart",
                    hint="close the quote, or write a quote inside a quoted field twice; if the file was cut off, "
                    "export it again",
                ) from None
            problem = "a bare carriage return in a field" if "new-line" in str(error) else f"not valid CSV: {error}"
            for line, offset in lines.record:
                number += 1
                place = f"line {line}" if line == start else f"line {line} (in a quote opened on line {start})"
                yield Row(number, offset, place, problem=problem)
            continue
        if lines.is_blank:
            continue
        number += 1
        if number == 0:
            continue
        (line, offset), (last, _) = lines.record[0], lines.record[-1]
        place = f"line {line}" if line == last else f"lines {line} to {last}"
        if len(values) == len(columns):
            yield Row(number, offset, place, dict(zip(columns, values, strict=True)))
        else:
            fields = "1 field" if len(values) == 1 else f"{len(values)} fields"
            yield Row(number, offset, place, problem=f"{fields}, expected {len(columns)}")


def csv_layout(source: Source) -> tuple[str, list[str]]:
    """(delimiter, column names), from the header and the first lines. Raises `DataError` for an unusable header."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # of the whole process; the default refuses fields above 128 KiB
    sample: list[str] = []
    size = 0
    for _, _, text in read_lines(source):
        if text.strip():
            sample.append(text)
            size += len(text)
        if len(sample) == 50 or size > 2**20:
            break
    if not sample:
        raise DataError(f"`{source.path}` is empty", hint="take it out of `data.sources`, or export it again")
    if "\0" in sample[0]:
        raise DataError(
            f"`{source.path}`: the header holds NUL bytes; it is UTF-16 without a mark, or no text",
            hint=f"convert it, such as `iconv -f UTF-16LE -t UTF-8 {source.path.name} > utf8-{source.path.name}`",
        )
    delimiter = "\t" if source.format == "tsv" else max(",;\t|", key=lambda d: _fit(sample, d))
    try:
        columns = [name.strip() for name in next(csv.reader(sample, delimiter=delimiter, strict=True))]
    except csv.Error as error:
        cause = "its lines end in a bare carriage return" if "new-line" in str(error) else f"{error}"
        raise DataError(
            f"`{source.path}`: the header is not valid CSV: {cause}", hint="export it again with CRLF or LF line ends"
        ) from None
    for position, name in enumerate(columns, start=1):
        if not name:
            raise DataError(
                f"`{source.path}`: column {position} of {len(columns)} has no name in the header",
                hint="name it; an index column is left out by pandas' `to_csv(..., index=False)`",
            )
        if columns.index(name) != position - 1:
            raise DataError(f"`{source.path}`: two columns are named `{name}`", hint="give each column its own name")
    return delimiter, columns


def _fit(lines: list[str], delimiter: str) -> tuple[bool, float, int]:
    """How well a delimiter cuts the sample into rows as wide as its header; larger is better."""
    try:
        widths = [len(row) for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error:
        return (False, 0.0, 0)
    return (widths[0] > 1, widths.count(widths[0]) / len(widths), widths[0])
