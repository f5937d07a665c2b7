"""A person -> the rows, records, splits and adapters that hold what is theirs; and the way out again.

A subject is named by a value (a patient's number, a name), by its keyed hash (keys.py), by a record_id, or by
`file:row`. A record is the subject's when its group_id is the value or its hash, when its text holds the value, when
its row was merged into it, or when it was made of such a record. An adapter learned from a record when it was trained
on a data set whose train split holds it; through val it was chosen, through test measured.

`forgotten.json` in the run's folder lists the rows that must not come back: `prepare` rejects them from then on. It
holds places and keyed hashes, no identifiers.

Limits: what an adapter was merged into, quantised or copied to is not known here; a value that de-identification
removed is found by its hash in subjects.parquet, where there is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metier.data.accounts import Accounts
from metier.errors import DataError, RunError

FORGOTTEN = "forgotten.json"
REVOKED = "revoked.json"
REASON = "forgotten on request"


@dataclass
class Trace:
    """What of a subject is in one run. `records`: record_id, split, source_file, source_row, parent_id, why."""

    run: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    adapter: str | None = None
    learned: bool = False


def read_forgotten(out: Path) -> list[dict[str, Any]]:
    """The rows that must not come back: source_file, source_row, sha256 of the file. `out` is the data set's folder."""
    path = out.parent / FORGOTTEN
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [{name: row[name] for name in ("source_file", "source_row", "sha256")} for row in rows]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"`{path}` is damaged: which rows must not come back cannot be told", hint="restore it from a copy"
        ) from None


def forget_rows(accounts: Accounts, forgotten: list[dict[str, Any]], digests: dict[str, str]) -> None:
    """Rejects the forgotten rows. Raises `DataError` when a file changed since, so that its rows cannot be told."""
    for row in forgotten:
        if digests.get(row["source_file"], row["sha256"]) != row["sha256"]:
            raise DataError(
                f"`{row['source_file']}` was changed after a person was forgotten in it: row {row['source_row']} may "
                "be another one now",
                hint=f"take the person out of the new file, and the file's rows out of {FORGOTTEN}; or put "
                "the old file back",
            )
    places = {(row["source_file"], row["source_row"]) for row in forgotten}
    accounts.reject([r for r in accounts.records if (r.source.name, r.row.number) in places], REASON)
