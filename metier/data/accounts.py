"""Where every source row stands: kept as a record, merged into one, or rejected with a reason; the sums are checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from metier.data.dedup import Merged, Pair, without
from metier.data.lines import Source
from metier.data.records import Record, Rejection
from metier.data.spool import Spool
from metier.errors import DataError

EXAMPLES = 3


@dataclass
class Accounts:
    """The rows of `sources` on their way; `pairs` are near-duplicates, by their positions in `records`.

    `spool` has the records' texts. `forgotten`: the places (file, row) of rows that must not come back.
    """

    sources: list[Source]
    rows: Counter[Source] = field(default_factory=Counter)
    records: list[Record] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    forgotten: set[tuple[str, int]] = field(default_factory=set)
    spool: Spool = field(default_factory=Spool)

    def reject(self, records: list[Record], problem: str) -> None:
        """Takes records out for a reason."""
        self.rejected += [Rejection(record.source, record.row, problem) for record in records]
        self.records, self.pairs = without(self.records, self.pairs, records)

    def merge(self, merged: list[Merged]) -> None:
        """Takes out the records that went into others."""
        self.merged += merged
        self.records, self.pairs = without(self.records, self.pairs, [item.record for item in merged])

    def counts(self) -> dict[Source, dict[str, int]]:
        """Rows, kept, merged and rejected of each file; that they add up is what makes nothing get lost."""
        kept = Counter(record.source for record in self.records)
        merged = Counter(item.record.source for item in self.merged)
        rejected = Counter(item.source for item in self.rejected)
        found = {}
        for source in self.sources:
            row = {"rows": self.rows[source], "kept": kept[source], "merged": merged[source]}
            found[source] = {**row, "rejected": rejected[source]}
            if kept[source] + merged[source] + rejected[source] != self.rows[source]:
                raise AssertionError(f"{source.name}: {found[source]}")
        return found

    def by_reason(self) -> dict[str, int]:
        """How many rows were rejected for each reason, the most frequent first."""
        counted = Counter(item.problem for item in self.rejected)
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))

    def rejected_examples(self) -> dict[str, list[str]]:
        """The first rows (file:row) that were rejected for each reason."""
        places: dict[str, list[str]] = {problem: [] for problem in self.by_reason()}
        for item in self.rejected:
            if len(places[item.problem]) < EXAMPLES:
                places[item.problem].append(f"{item.source.name}:{item.row.number}")
        return places

    def sort(self) -> None:
        """Rejected and merged rows in the order of the files."""
        order = {source: position for position, source in enumerate(self.sources)}
        self.rejected.sort(key=lambda item: (order[item.source], item.row.number))
        self.merged.sort(key=lambda item: (order[item.record.source], item.record.row.number))

    def refuse_too_few(self) -> None:
        """Raises `DataError` when nothing is left to train on."""
        if any(not record.source.is_test and record.method is None for record in self.records):
            return
        reasons = "; ".join(f"{reason} ({count:,})" for reason, count in list(self.by_reason().items())[:3])
        rows = sum(not item.source.is_test for item in self.rejected)
        first = next((item for item in self.rejected if not item.source.is_test), None)
        raise DataError(
            f"no record is left to train on: all {rows:,} rows of `data.sources` were rejected: {reasons}",
            hint=f"the first is {first.source.name}, {first.reason}; `data.prompt` and `data.answer` name the columns"
            if first
            else None,
        )
