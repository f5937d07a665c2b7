"""Records, rejections, merged rows and label conflicts -> the Parquet files of a data set."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import polars

from metier.artifacts import digest_json
from metier.data.dedup import Merged, Pair
from metier.data.partitions import Workers, parts
from metier.data.records import Message, Record, Rejection, language_of, same_input

Identity = tuple[str, int, list[Message], str | None, int]  # file, row, messages, method, number

AT_ONCE = 100_000
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
CONFLICTS_SCHEMA: dict[str, Any] = {
    "record_id": polars.String,
    "label": polars.String,
    "other_record_id": polars.String,
    "other_label": polars.String,
    "similarity": polars.Float64,
}


def record_id(record: Record) -> str:
    """16 hexadecimal digits that follow from where the record stands and what is in it."""
    return _id(*_identity(record))


def _identity(record: Record) -> Identity:
    return record.source.name, record.row.number, record.messages, record.method, record.number


def _id(file: str, row: int, messages: list[Message], method: str | None, number: int) -> str:
    return digest_json([file, row, messages, *([method, number] if method else [])])[:16]


def identity_part(part: Sequence[Identity]) -> list[tuple[str, str]]:
    """The record_id and the language of some records."""
    return [(_id(*identity), language_of(identity[2])) for identity in part]


def records_table(
    records: list[Record], splits: list[str], task: str, weights: dict[str, float], workers: Workers
) -> polars.DataFrame:
    """The rows of records.parquet; `splits` holds each record's split, `weights` a label's weight in training."""
    found = [one for some in workers.map(identity_part, _identities(records)) for one in some]
    ids = {id(record): record_id for record, (record_id, _) in zip(records, found, strict=True)}
    # Some at a time: the lists that a table is made of take more memory than the table.
    made = [
        polars.DataFrame(
            {
                "record_id": [record_id for record_id, _ in found[rows]],
                "split": splits[rows],
                "group_id": [record.group_id for record in some],
                "messages": _messages(some),
                "label": [r.answer if task == "classification" and r.method != "general" else None for r in some],
                "language": [language for _, language in found[rows]],
                "source_file": [record.source.name for record in some],
                "source_row": [record.row.number for record in some],
                "parent_id": [(ids.get(id(r.parent)) or record_id(r.parent)) if r.parent else None for r in some],
                "method": [record.method for record in some],
                "weight": None,
            },
            schema=RECORDS_SCHEMA,
        )
        for rows in (slice(start, start + AT_ONCE) for start in range(0, len(records), AT_ONCE))
        for some in [records[rows]]
    ]
    table = polars.concat(made, rechunk=False)
    if not weights:
        return table
    of_label = polars.col("label").replace_strict(weights, default=None, return_dtype=polars.Float64)
    return table.with_columns(weight=polars.when(polars.col("split") == "train").then(of_label))


def _identities(records: list[Record]) -> Iterator[list[Identity]]:
    return ([_identity(record) for record in part] for part in parts(records))


def _messages(records: list[Record]) -> polars.Series:
    """list[struct{role, content}], made from flat columns: from nested lists polars takes six times the memory."""
    turns = [(position, turn) for position, record in enumerate(records) for turn in record.messages]
    flat = polars.DataFrame(
        {
            "record": [position for position, _ in turns],
            "role": [turn["role"] for _, turn in turns],
            "content": [turn["content"] for _, turn in turns],
        }
    )
    grouped = flat.group_by("record", maintain_order=True).agg(polars.struct("role", "content").alias("messages"))
    return grouped["messages"]


def rejected_table(rejected: list[Rejection]) -> polars.DataFrame:
    """The rows of rejected.parquet."""
    return polars.DataFrame(
        {
            "source_file": [item.source.name for item in rejected],
            "source_row": [item.row.number for item in rejected],
            "byte_offset": [item.row.byte_offset for item in rejected],
            "reason": [item.reason for item in rejected],
        },
        schema=REJECTED_SCHEMA,
    )


def merged_table(merged: list[Merged]) -> polars.DataFrame:
    """The rows of merged.parquet: which row went into which record."""
    end = {id(item.record): item.into for item in merged}
    into = []
    for item in merged:
        record = item.into
        while id(record) in end:  # merged itself, later
            record = end[id(record)]
        into.append(record_id(record))
    return polars.DataFrame(
        {
            "source_file": [item.record.source.name for item in merged],
            "source_row": [item.record.row.number for item in merged],
            "byte_offset": [item.record.row.byte_offset for item in merged],
            "group_id": [item.record.group_id for item in merged],
            "record_id": into,
            "how": [item.how for item in merged],
        },
        schema=MERGED_SCHEMA,
    )


def conflicts_table(records: list[Record], pairs: list[Pair], task: str) -> polars.DataFrame:
    """The rows of conflicts.parquet: equal inputs and near-duplicates with different labels, the most similar first."""
    if task != "classification":
        return polars.DataFrame(schema=CONFLICTS_SCHEMA)
    near = {(a, b): s for a, b, s in pairs if records[a].answer != records[b].answer}
    found = sorted(
        ((a, b, s) for (a, b), s in (near | dict.fromkeys(_contradictions(records), 1.0)).items()),
        key=lambda pair: (-pair[2], pair[0], pair[1]),
    )
    return polars.DataFrame(
        [(record_id(records[a]), records[a].answer, record_id(records[b]), records[b].answer, s) for a, b, s in found],
        schema=CONFLICTS_SCHEMA,
        orient="row",
    )


def _contradictions(records: list[Record]) -> set[tuple[int, int]]:
    """Each record whose like has another label, with the first of those."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, record in enumerate(records):
        if record.method is None:
            groups.setdefault(same_input(record), []).append(position)
    found = set()
    for group in groups.values():
        firsts: dict[str, int] = {}
        for position in group:
            firsts.setdefault(records[position].answer, position)
        for position in group if len(firsts) > 1 else ():
            other = next(first for label, first in firsts.items() if label != records[position].answer)
            found.add((min(position, other), max(position, other)))
    return found


def subjects_table(found: dict[str, list[str]]) -> polars.DataFrame:
    """The rows of subjects.parquet: keyed hashes of what was taken out of each record."""
    return polars.DataFrame(found, schema=dict.fromkeys(("record_id", "subject_hash", "entity_type"), polars.String))


def parquet_bytes(table: polars.DataFrame) -> bytes:
    """A Parquet file's content; the same table gives the same bytes."""
    # Through memory, so that a full disk raises the OSError that artifacts turns into a sentence.
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()
