"""Where every source row stands: kept as a record, merged into one, or rejected with a reason; the sums are checked."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np

from metier.data.dedup import Merged, Pair, without
from metier.data.lines import Row, Source
from metier.data.records import Record, Rejection
from metier.data.spool import Spool
from metier.errors import DataError

EXAMPLES = 3


class Rejections:
    """Rejected rows: in memory where each one stands, 25 bytes, on disk what else there is to say."""

    def __init__(self, sources: list[Source], spool: Spool) -> None:
        self._sources, self._spool = sources, spool
        self._number = {source: number for number, source in enumerate(sources)}
        self._problems: dict[str, int] = {}
        self._source, self._problem, self._row, self._place = array("i"), array("i"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._row)

    def __iter__(self) -> Iterator[Rejection]:
        """In the order of the files and rows."""
        problems = list(self._problems)
        for at in np.lexsort((self._row, self._source)).tolist():
            byte_offset, place = self._spool.get(self._place[at])
            row = Row(self._row[at], byte_offset, place)
            yield Rejection(self._sources[self._source[at]], row, problems[self._problem[at]])

    def add(self, source: Source, row: Row, problem: str) -> None:
        self._source.append(self._number[source])
        self._problem.append(self._problems.setdefault(problem, len(self._problems)))
        self._row.append(row.number)
        self._place.append(self._spool.put((row.byte_offset, row.place)))

    def by_source(self) -> Counter[Source]:
        """How many of each file."""
        return Counter({self._sources[number]: count for number, count in Counter(self._source).items()})

    def by_reason(self) -> dict[str, int]:
        """How many for each reason, the most frequent first."""
        problems = list(self._problems)
        counted = {problems[number]: count for number, count in Counter(self._problem).items()}
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    def examples(self) -> dict[str, list[str]]:
        """The first rows (file:row) for each reason."""
        places: dict[str, list[str]] = {problem: [] for problem in self.by_reason()}
        for item in self:
            if len(places[item.problem]) < EXAMPLES:
                places[item.problem].append(f"{item.source.name}:{item.row.number}")
        return places


class Accounts:
    """The rows of `sources` on their way; `pairs` are near-duplicates, by their positions in `records`.

    `spool` has the records' texts. `forgotten`: the places (file, row) of rows that must not come back.
    """

    def __init__(self, sources: list[Source], spool: Spool, forgotten: set[tuple[str, int]]) -> None:
        self.sources, self.spool, self.forgotten = sources, spool, forgotten
        self.rows = Counter[Source]()
        self.records: list[Record] = []
        self.rejected = Rejections(sources, spool)
        self.merged: list[Merged] = []
        self.pairs: list[Pair] = []

    def reject(self, records: list[Record], problem: str) -> None:
        """Takes records out for a reason."""
        for record in records:
            self.rejected.add(record.source, record.row, problem)
        self.records, self.pairs = without(self.records, self.pairs, records)

    def merge(self, merged: list[Merged]) -> None:
        """Takes out the records that went into others."""
        self.merged += merged
        self.records, self.pairs = without(self.records, self.pairs, [item.record for item in merged])

    def counts(self) -> dict[Source, dict[str, int]]:
        """Rows, kept, merged and rejected of each file; that they add up is what makes nothing get lost."""
        kept = Counter(record.source for record in self.records)
        merged = Counter(item.record.source for item in self.merged)
        rejected = self.rejected.by_source()
        found = {}
        for source in self.sources:
            row = {"rows": self.rows[source], "kept": kept[source], "merged": merged[source]}
            found[source] = {**row, "rejected": rejected[source]}
            if kept[source] + merged[source] + rejected[source] != self.rows[source]:
                raise AssertionError(f"{source.name}: {found[source]}")
        return found

    def sort(self) -> None:
        """Merged rows in the order of the files."""
        order = {source: position for position, source in enumerate(self.sources)}
        self.merged.sort(key=lambda item: (order[item.record.source], item.record.row.number))

    def refuse_too_few(self) -> None:
        """Raises `DataError` when nothing is left to train on."""
        if any(not record.source.is_test and record.method is None for record in self.records):
            return
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in list(self.rejected.by_reason().items())[:3])
        rows = sum(not item.source.is_test for item in self.rejected)
        first = next((item for item in self.rejected if not item.source.is_test), None)
        raise DataError(
            f"no record is left to train on: all {rows:,} rows of `data.sources` were rejected: {reasons}",
            hint=f"the first is {first.source.name}, {first.reason}; `data.prompt` and `data.answer` name the columns"
            if first
            else None,
        )
