"""Records, rejections, merged rows and label conflicts -> the Parquet files of a data set."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars
from numpy.typing import NDArray
from polars.io.plugins import register_io_source

from metier.artifacts import atomic_file, digest_json
from metier.data.alike import Digests, groups_of
from metier.data.dedup import Merged, Pair
from metier.data.partitions import Workers, parts
from metier.data.records import Record, Rejection, language_of, same_input
from metier.errors import RunError

Ids = NDArray[np.uint64]
Places = NDArray[np.int8]
Identity = tuple[str, int, tuple[str, ...], str | None, int]  # file, row, turns, method, number

# The rows of a group of records.parquet at most, and the bytes of their texts: what is held at once, a few times.
AT_ONCE = 100_000
BYTES_AT_ONCE = 2**27
PIECE = 10_000
LANGUAGES = ("zh", "en", "other")
RECORDS_SCHEMA: dict[str, Any] = {
    "record_id": polars.String,
    "split": polars.String,
    "group_id": polars.String,
    "messages": polars.List(polars.Struct({"role": polars.String, "content": polars.String})),
    "label": polars.String,
    "language": polars.String,
    "source_file": polars.String,
    "source_row": polars.Int64,
    "parent_id": polars.String,
    "method": polars.String,
    "weight": polars.Float64,
}
REJECTED_SCHEMA: dict[str, Any] = {
    "source_file": polars.String,
    "source_row": polars.Int64,
    "byte_offset": polars.Int64,
    "reason": polars.String,
}
MERGED_SCHEMA: dict[str, Any] = {
    "source_file": polars.String,
    "source_row": polars.Int64,
    "byte_offset": polars.Int64,
    "group_id": polars.String,
    "record_id": polars.String,
    "how": polars.String,
}
SUBJECTS_SCHEMA: dict[str, Any] = dict.fromkeys(("record_id", "subject_hash", "entity_type"), polars.String)
CONFLICTS_SCHEMA: dict[str, Any] = {
    "record_id": polars.String,
    "label": polars.String,
    "other_record_id": polars.String,
    "other_label": polars.String,
    "similarity": polars.Float64,
}


def identity_part(part: Sequence[Identity]) -> tuple[Ids, Places, NDArray[np.int64]]:
    """Of some records the record_id, as a number, the language, by its place in LANGUAGES, and the bytes of text."""
    ids, languages, sizes = [], [], []
    for file, row, turns, method, number in part:
        messages = [{"role": turns[at], "content": turns[at + 1]} for at in range(0, len(turns), 2)]
        ids.append(int(digest_json([file, row, messages, *([method, number] if method else [])])[:16], 16))
        languages.append(LANGUAGES.index(language_of(messages)))
        sizes.append(sum(len(text.encode()) for text in turns[1::2]))
    return np.array(ids, np.uint64), np.array(languages, np.int8), np.array(sizes, np.int64)


class Identities:
    """The ids of records, found again by record: 16 hexadecimal digits that follow from where the record stands and
    what is in it. `languages`, by their places in LANGUAGES, and `sizes` in bytes are in the records' order.
    """

    def __init__(self, records: list[Record], workers: Workers) -> None:
        asked = ([_identity(record) for record in part] for part in parts(records))
        found = [identity_part([]), *workers.map(identity_part, asked)]
        ids, self.languages, self.sizes = (np.concatenate(some) for some in zip(*found, strict=True))
        # By address: a dict would take eight times the memory.
        addresses = _addresses(records)
        order = np.argsort(addresses)
        self._addresses, self._ids = addresses[order], ids[order]

    def of(self, records: Sequence[Record]) -> list[str]:
        """The record_id of each of the records, also of others."""
        asked = _addresses(records)
        places = np.minimum(np.searchsorted(self._addresses, asked), len(self._ids) - 1)
        ids = self._ids[places]
        others = np.flatnonzero(self._addresses[places] != asked).tolist()
        ids[others] = identity_part([_identity(records[i]) for i in others])[0]
        return [f"{number:016x}" for number in ids.tolist()]


def _addresses(records: Sequence[Record]) -> Ids:
    return np.fromiter(map(id, records), dtype=np.uint64, count=len(records))


def _identity(record: Record) -> Identity:
    return record.source.name, record.row_number, record.turns, record.method, record.number


class RecordsTable:
    """The rows of records.parquet, so many at a time; `weights` has a label's weight in training.

    `subjects` has the rows of subjects.parquet of those that were given: the records are read once.
    """

    def __init__(self, records: list[Record], identities: Identities, task: str, weights: dict[str, float]) -> None:
        self._records, self._identities, self._task, self._weights = records, identities, task, weights
        self.rows = rows_at_once(identities.sizes)
        self.subjects: list[polars.DataFrame] = []

    def __iter__(self) -> Iterator[polars.DataFrame]:
        for start in range(0, len(self._records), self.rows):
            table = self._group(start, min(start + self.rows, len(self._records)))
            if self._weights:
                of_label = polars.col("label").replace_strict(self._weights, default=None, return_dtype=polars.Float64)
                table = table.with_columns(weight=polars.when(polars.col("split") == "train").then(of_label))
            yield table

    def _group(self, start: int, stop: int) -> polars.DataFrame:
        """In pieces, because the lists that a table is made of take more memory than the table."""
        identities, bounds = self._identities, [*range(start, stop, PIECE), stop]
        pieces = [
            _frame(self._records[a:b], identities, identities.languages[a:b], task=self._task, subjects=self.subjects)
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        return polars.concat(pieces, rechunk=True)


def rows_at_once(sizes: NDArray[np.int64]) -> int:
    """How many rows of records.parquet are held and written at once: fewer where their texts are long."""
    most = min(AT_ONCE, len(sizes))
    heaviest = int(np.add.reduceat(sizes, np.arange(0, len(sizes), AT_ONCE)).max()) if most else 0
    return AT_ONCE if heaviest <= BYTES_AT_ONCE else max(1, most * BYTES_AT_ONCE // heaviest)


def _frame(
    records: list[Record], identities: Identities, languages: Places, *, task: str, subjects: list[polars.DataFrame]
) -> polars.DataFrame:
    ids, parents = identities.of(records), iter(identities.of([r.parent for r in records if r.parent]))
    rows, removed = [], []
    at, roles, texts = list[int](), list[str](), list[str]()
    for position, (record, record_id, language) in enumerate(zip(records, ids, languages.tolist(), strict=True)):
        is_labelled = task == "classification" and record.method != "general"
        rows.append(
            (
                record_id, record.split, record.group_id, record.answer if is_labelled else None, LANGUAGES[language],
                record.source.name, record.row_number, next(parents) if record.parent else None, record.method,
            )
        )  # fmt: skip
        turns = record.turns
        at += [position] * (len(turns) // 2)
        roles += turns[::2]
        texts += turns[1::2]
        removed += _removed(record_id, record)
    subjects.append(polars.DataFrame(removed, schema=SUBJECTS_SCHEMA, orient="row"))
    # list[struct{role, content}] from flat columns: from nested lists polars takes six times the memory.
    flat = polars.DataFrame({"record": at, "role": roles, "content": texts})
    grouped = flat.group_by("record", maintain_order=True).agg(polars.struct("role", "content").alias("messages"))
    names = [name for name in RECORDS_SCHEMA if name not in ("messages", "weight")]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    made = columns | {"messages": grouped["messages"], "weight": None}
    return polars.DataFrame({name: made[name] for name in RECORDS_SCHEMA}, schema=RECORDS_SCHEMA)


def _removed(record_id: str, record: Record) -> list[tuple[str, str, str]]:
    """Rows of subjects.parquet."""
    return [(record_id, hashed, entity_type) for entity_type, hashed in dict.fromkeys(record.removed)]


def rejected_table(rejected: Iterable[Rejection]) -> polars.DataFrame:
    """The rows of rejected.parquet."""
    rows = ((item.source.name, item.row.number, item.row.byte_offset, item.reason) for item in rejected)
    frames = [polars.DataFrame(schema=REJECTED_SCHEMA)]
    while some := list(islice(rows, AT_ONCE)):
        frames.append(polars.DataFrame(some, schema=REJECTED_SCHEMA, orient="row"))
    return polars.concat(frames, rechunk=True)


def merged_into(merged: list[Merged]) -> list[Record]:
    """The record that each row ended in."""
    end = {item.record: item.into for item in merged}
    found = []
    for item in merged:
        record = item.into
        while record in end:  # merged itself, later
            record = end[record]
        found.append(record)
    return found


def merged_table(merged: list[Merged], ids: list[str]) -> polars.DataFrame:
    """The rows of merged.parquet: which row went into which record; `ids` are those of `merged_into`."""
    return polars.DataFrame(
        {
            "source_file": [item.record.source.name for item in merged],
            "source_row": [item.record.row.number for item in merged],
            "byte_offset": [item.record.row.byte_offset for item in merged],
            "group_id": [item.record.group_id for item in merged],
            "record_id": ids,
            "how": [item.how for item in merged],
        },
        schema=MERGED_SCHEMA,
    )


def conflicts_table(records: list[Record], pairs: list[Pair], task: str, identities: Identities) -> polars.DataFrame:
    """The rows of conflicts.parquet: equal inputs and near-duplicates with different labels, the most similar first."""
    if task != "classification":
        return polars.DataFrame(schema=CONFLICTS_SCHEMA)
    near = {(a, b): s for a, b, s in pairs if records[a].answer != records[b].answer}
    found = sorted(
        ((a, b, s) for (a, b), s in (near | dict.fromkeys(_contradictions(records), 1.0)).items()),
        key=lambda pair: (-pair[2], pair[0], pair[1]),
    )
    ones, others = [records[one] for one, _, _ in found], [records[other] for _, other, _ in found]
    rows = zip(identities.of(ones), ones, identities.of(others), others, found, strict=True)
    return polars.DataFrame(
        [(one_id, one.answer, other_id, other.answer, s) for one_id, one, other_id, other, (_, _, s) in rows],
        schema=CONFLICTS_SCHEMA,
        orient="row",
    )


def _contradictions(records: list[Record]) -> set[tuple[int, int]]:
    """Each record whose like has another label, with the first of those."""
    own, inputs = [position for position, record in enumerate(records) if record.method is None], Digests()
    for position in own:
        inputs.add(same_input(records[position]))
    found = set()
    for group in ([own[i] for i in some] for some in groups_of(inputs.keys())):
        firsts: dict[str, int] = {}
        for position in group:
            firsts.setdefault(records[position].answer, position)
        for position in group if len(firsts) > 1 else ():
            other = next(first for label, first in firsts.items() if label != records[position].answer)
            found.add((min(position, other), max(position, other)))
    return found


def subjects_table(found: list[polars.DataFrame], merged: list[Merged], ids: list[str]) -> polars.DataFrame:
    """subjects.parquet: keyed hashes of what was taken out of each record, and of the rows merged into these `ids`."""
    rows = [row for record_id, item in zip(ids, merged, strict=True) for row in _removed(record_id, item.record)]
    return polars.concat([*found, polars.DataFrame(rows, schema=SUBJECTS_SCHEMA, orient="row")], rechunk=True)


def write_parquet(path: Path, schema: dict[str, Any], frames: Iterable[polars.DataFrame], rows: int = AT_ONCE) -> None:
    """A Parquet file, written frame after frame of so many rows; the same frames give the same bytes.

    Raises `RunError`.
    """

    def given(
        columns: list[str] | None, predicate: polars.Expr | None, rows: int | None, size: int | None
    ) -> Iterator[polars.DataFrame]:
        return iter(frames)

    with atomic_file(path) as file:
        target = _Target(file)
        try:
            register_io_source(given, schema=schema).sink_parquet(  # type: ignore[call-overload]
                target, compression="zstd", maintain_order=True, row_group_size=rows if rows < AT_ONCE else None
            )
        except polars.exceptions.ComputeError:
            raise target.error or RunError(f"`{path}` could not be written") from None


class _Target:
    """A file that keeps what the disk refused, of which polars tells the words alone."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The one who opened it closes it."""


def parquet_bytes(table: polars.DataFrame) -> bytes:
    """A Parquet file's content; the same table gives the same bytes."""
    # Through memory, so that a full disk raises the OSError that artifacts turns into a sentence.
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()
