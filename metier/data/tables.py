"""Records and rejections -> the two Parquet files of a data set."""

from __future__ import annotations

import io
from typing import Any

import polars

from metier.artifacts import digest_json
from metier.data.records import Record, Rejection, language_of

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
}
REJECTED_SCHEMA: dict[str, Any] = {
    "source_file": polars.String,
    "source_row": polars.Int64,
    "byte_offset": polars.Int64,
    "reason": polars.String,
}


def records_table(records: list[Record], splits: list[str], task: str) -> polars.DataFrame:
    """The rows of records.parquet; `splits` holds each record's split."""
    ids = [digest_json([r.source.name, r.row.number, r.messages])[:16] for r in records]
    return polars.DataFrame(
        {
            "record_id": ids,
            "split": splits,
            "group_id": [record.group_id for record in records],
            "messages": _messages(records),
            "label": [record.answer if task == "classification" else None for record in records],
            "language": [language_of(record.messages) for record in records],
            "source_file": [record.source.name for record in records],
            "source_row": [record.row.number for record in records],
            "parent_id": [None] * len(records),
        },
        schema=RECORDS_SCHEMA,
    )


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


def parquet_bytes(table: polars.DataFrame) -> bytes:
    """A Parquet file's content; the same table gives the same bytes."""
    # Through memory, so that a full disk raises the OSError that artifacts turns into a sentence.
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd")
    return buffer.getvalue()
