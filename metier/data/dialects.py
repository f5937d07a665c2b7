"""The first rows of a table -> how it is written: delimiter, quotes, the header's line, the columns.

Every delimiter and quote that a spreadsheet may have used cuts the first lines; the one that makes the most rows as
wide as their header wins. Before the header may stand `sep=;`, comments (#) and title rows, which have one cell filled.

A title is told from the header of a one-column file only where at least four in five rows below are as wide as the row
that then is the header; where that leaves two columns and no name that is known, `DataError` asks for
`data.header_line`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from metier.data.lines import MAX_RECORD_BYTES, Line, Source, read_lines
from metier.data.roles import KNOWN_COLUMNS
from metier.errors import DataError

FULL_WIDTH_COMMA = "\uff0c"
DELIMITERS = (",", ";", "\t", "|", FULL_WIDTH_COMMA)
MAX_TITLE_ROWS = 20
MAX_NAME_CHARS = 60
SAMPLE_ROWS = 200
SAMPLE_CHARS = 2**20
_SEPARATOR = re.compile(r'^"?sep=(.)"?$', re.IGNORECASE)
_BACKSLASHED = re.compile(r'(?<!\\)((?:\\\\)*)\\"')
_NUMBER = re.compile(r"[-+]?[\d.,]+%?")


@dataclass(frozen=True, slots=True)
class Dialect:
    """`header_line` is the header's first line; `unnamed` columns at the right end have no name and no values."""

    delimiter: str
    quote: str
    backslash: bool
    header_line: int
    columns: list[str]
    unnamed: int = 0

    def line(self, text: str) -> str:
        """A line as csv.reader takes it: `\\"` inside quotes becomes `""`; no other backslash means anything."""
        return _BACKSLASHED.sub(r'\1""', text) if self.backslash else text

    def describe(self) -> str:
        """For people, what is not plain CSV: `semicolons, header on line 3`."""
        names = {";": "semicolons", "\t": "tabs", "|": "bars", FULL_WIDTH_COMMA: "full-width commas"}
        parts = [names[self.delimiter]] if self.delimiter in names else []
        parts += ["single quotes"] if self.quote == "'" else []
        parts += ['\\" in quotes'] if self.backslash else []
        parts += [f"header on line {self.header_line}"] if self.header_line > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _Cut:
    """The sample cut one way: each row's cells with its first line."""

    dialect: Dialect
    rows: list[tuple[int, list[str]]]
    broken: int

    def fit(self) -> tuple[bool, float, int]:
        """Larger is better: a table at all, its rows as wide as the header, its columns."""
        width = len(self.rows[0][1]) if self.rows else 0
        widths = [len(cells) for _, cells in self.rows]
        share = widths.count(width) / (len(widths) + self.broken) if widths else 0.0
        skipped = 0.1 if self.rows and self.rows[0][0] > self.dialect.header_line else 0.0
        return (width > 1, share - skipped, width)


def find_dialect(source: Source) -> Dialect:
    """The dialect of a CSV or TSV file. Raises `DataError` for an empty file or an unusable header."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # of the whole process; the default refuses fields above 128 KiB
    sample = _sample(source)
    if not sample:
        raise DataError(f"{source.shown} is empty", hint="take it out of `data.sources`, or export it again")
    separator = _SEPARATOR.match(sample[0].text.strip())
    if separator and len(sample) > 1:
        sample = sample[1:]
    text = "".join(line.text for line in sample)
    delimiters = separator.group(1) if separator else "\t" if source.format == "tsv" else DELIMITERS
    quote = "'" if '"' not in text and _is_single_quoted(sample) else '"'
    start = sample[0].number
    cuts = []
    for delimiter in delimiters:
        for backslash in (False, True) if '\\"' in text else (False,):
            cut = _cut(sample, Dialect(delimiter, quote, backslash, start, []))
            cuts.append(_below_titles(cut, source))
    best = max(cuts, key=_Cut.fit)
    if not best.rows:
        raise _broken_header(source, sample[0])
    line, cells = best.rows[0]
    if problem := next((s.problem for s in sample if s.number == line and s.problem), None):
        raise DataError(
            f"{source.shown}, line {line}: the header cannot be read: {problem}", hint="set `data.encoding`"
        )
    _check_title(source, best, start)
    columns, unnamed = column_names(cells, source, lambda at: all(_is_blank(c, at) for _, c in best.rows[1:]))
    return replace(best.dialect, header_line=line, columns=columns, unnamed=unnamed)


def _sample(source: Source) -> list[Line]:
    sample: list[Line] = []
    size = 0
    for line in read_lines(source):
        if source.header_line and line.number < source.header_line:
            continue
        if line.text.strip():
            sample.append(line)
            size += len(line.text)
        if len(sample) == SAMPLE_ROWS or size > SAMPLE_CHARS:
            break
    return sample


def _is_single_quoted(sample: list[Line]) -> bool:
    cells = re.compile(r"(^|[,;\t|])'[^']*'(?=$|[,;\t|\r\n])")
    return sum(bool(cells.search(line.text)) for line in sample) >= 0.8 * len(sample)


def _cut(sample: list[Line], dialect: Dialect) -> _Cut:
    """Reads the sample; a row that is broken, or that the sample's end breaks off, is no row."""
    rows: list[tuple[int, list[str]]] = []
    broken, position = 0, 0
    while position < len(sample):
        start = position
        reader = csv.reader(
            (dialect.line(line.text) for line in sample[start:]),
            delimiter=dialect.delimiter, quotechar=dialect.quote, strict=True,
        )  # fmt: skip
        try:
            for cells in reader:
                rows.append((sample[position].number, cells))
                position = start + reader.line_num
        except csv.Error:
            broken += 1
            position = start + max(reader.line_num, 1)
    return _Cut(dialect, rows, broken)


def _below_titles(cut: _Cut, source: Source) -> _Cut:
    """The cut without title rows and comments, where what is left has a header and rows as wide."""
    if source.header_line:
        return cut
    titles = 0
    while titles < min(MAX_TITLE_ROWS, len(cut.rows) - 1) and _is_title(cut.rows[titles][1]):
        titles += 1
    rows = cut.rows[titles:]
    if titles == 0 or len(rows) < 2 or not looks_like_header(rows[0][1]):
        return cut
    alike = sum(len(cells) == len(rows[0][1]) for _, cells in rows) / len(rows)
    if alike < 0.8 or cut.dialect.delimiter == FULL_WIDTH_COMMA:
        return cut
    return _Cut(cut.dialect, rows, cut.broken)


def _is_title(cells: list[str]) -> bool:
    return sum(bool(cell.strip()) for cell in cells) <= 1 or cells[0].lstrip().startswith("#")


def looks_like_header(cells: list[str]) -> bool:
    """Two names or more: filled, short, distinct, no numbers (empty ones at the right end aside)."""
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    return (
        len(names) > 1
        and len(set(names)) == len(names)
        and all(0 < len(name) <= MAX_NAME_CHARS and not _NUMBER.fullmatch(name) for name in names)
    )


def _check_title(source: Source, best: _Cut, start: int) -> None:
    """A one-column file whose rows hold one comma each looks like a title above two columns."""
    line, cells = best.rows[0]
    if line == start or len(cells) > 2 or any(cell.strip().casefold() in KNOWN_COLUMNS for cell in cells):
        return
    raise DataError(
        f"{source.shown}: line {start} has one field and the rows below have two; "
        "it is a title, or the only column's name",
        hint=f"if it is a title, set `data.header_line: {line}`; if a name, put rows with commas in quotes",
    )


def _is_blank(cells: list[str], at: int) -> bool:
    return at >= len(cells) or not cells[at].strip()


def column_names(cells: list[str], source: Source, is_blank: Callable[[int], bool]) -> tuple[list[str], int]:
    """(names, columns without a name at the right end). `is_blank(position)`: whether a column holds nothing.

    Raises `DataError` for a column without a name, and for two of one name.
    """
    names = [cell.strip().strip("\ufeff\u200b\u3000") for cell in cells]
    unnamed = 0
    while names and not names[-1] and is_blank(len(names) - 1):
        names.pop()
        unnamed += 1
    if names and any("\0" in name for name in names):
        raise DataError(
            f"{source.shown}: the header holds NUL bytes", hint="it is damaged, or no text: export it again"
        )
    for position, name in enumerate(names, start=1):
        if not name:
            raise DataError(
                f"{source.shown}: column {position} of {len(names)} has no name in the header",
                hint="name it; an index column is left out by pandas' `to_csv(..., index=False)`",
            )
        if names.index(name) != position - 1:
            raise DataError(f"{source.shown}: two columns are named `{name}`", hint="give each column its own name")
    return names, unnamed


def _broken_header(source: Source, first: Line) -> DataError:
    return DataError(
        f"{source.shown}, line {first.number}: the header is not valid CSV",
        hint="export it again with LF or CRLF line ends, and quotes inside quotes written twice",
    )
