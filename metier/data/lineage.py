"""A person -> the rows, records, splits and adapters that hold what is theirs; and the way out again.

A subject is named by a value (a patient's number, a name), by its keyed hash (keys.py), by a record_id, or by
`file:row`. A record is the subject's when its group_id is the value or has its hash, when its text holds the value as
a word, when a row of the subject's was merged into it, or when it was made of such a record. An adapter learned from
a record when it was trained on a data set whose train split holds it; by val it was chosen, by test it was judged.
`forget` makes the data set anew and keeps the digests that it had: what was trained on it before is still known.

`forgotten.json` in the run's folder lists the rows that must not come back: `prepare` rejects them from then on. It
holds places and keyed hashes, no identifiers. `revoked.json` in the folder of an adapter (or of `full`, all weights)
says that it learned from them, or may have: where it was trained on a data set that is no longer there.

Limits: rows that were rejected are not known by person, and may come back where the recipe changes; what an adapter
was merged into, quantised or copied to is not known here. A value that de-identification removed is found where the
data set has a subjects.parquet (record_id, subject_hash).
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars

from metier import artifacts
from metier.data.accounts import EXAMPLES
from metier.data.card import data_card
from metier.data.croissant import croissant
from metier.data.tables import parquet_bytes
from metier.errors import DataError, RunError
from metier.keys import keyed_hash

FORGOTTEN = "forgotten.json"
MODELS = ("adapter", "full")  # what a run trains on its data set
REASON = "forgotten on request"
ROW = ("source_file", "source_row")
_HASH = re.compile(r"[0-9a-f]{32}")
# What `complete` writes by itself into a manifest; all else is the stage's own.
_CORE = {
    "kind", "metier_version", "key", "digest", "config", "parents", "files", "libraries", "python", "machine", "timing",
}  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """What of a subject is in one run.

    records: the columns record_id, split, source_file, source_row, parent_id and why, of records.parquet.
    merged: those of merged.parquet, of rows that went into records. adapter: the digest of the run's adapter, `learned`
    the number of the records that it was trained on; None where it was trained on another data set. forgotten: how many
    rows were forgotten earlier. models: the folders of what learned from the records, or may have.
    """

    run: Path
    records: polars.DataFrame
    merged: polars.DataFrame
    adapter: str | None
    learned: int | None
    in_evidence: int
    forgotten: int
    models: list[Path]


def subject_hash(subject: str, key: bytes) -> str:
    """The keyed hash of a value; a hash is itself."""
    return subject if _HASH.fullmatch(subject) else keyed_hash(subject, key)


def trace(subject: str, run: Path, key: bytes) -> Trace:
    """Finds a subject in the run. Raises `RunError` where the run has no complete data set."""
    manifest = _dataset(run)
    folder = run / "dataset"
    records = polars.read_parquet(folder / "records.parquet")
    merged = polars.read_parquet(folder / "merged.parquet")
    is_own = merged["group_id"].map_elements(_named(subject, key), return_dtype=polars.Boolean, skip_nulls=True)
    places = merged["source_file"] + ":" + merged["source_row"].cast(polars.String)
    own_rows = merged.filter(is_own.fill_null(False) | (places == subject))
    why = _reasons(records, subject, key, folder)
    for record_id in own_rows["record_id"].to_list():
        why.setdefault(record_id, "a row was merged into it")
    parents = records.filter(polars.col("parent_id").is_in(list(why)))
    for record_id in parents["record_id"].to_list():
        why.setdefault(record_id, "made of such a record")
    found = records.filter(polars.col("record_id").is_in(list(why))).select(
        "record_id", "split", *ROW, "parent_id",
        polars.col("record_id").replace_strict(why, default="", return_dtype=polars.String).alias("why"),
    )  # fmt: skip
    merged = merged.filter(polars.col("record_id").is_in(found["record_id"].to_list()))
    adapter = artifacts.read_manifest(run / "adapter")
    num_train = int((found["split"] == "train").sum())
    learned = {model: _learned(run / model, manifest, num_train) for model in MODELS}
    hashed = subject_hash(subject, key)
    items = run / "evidence" / "items.parquet"
    judged = polars.read_parquet(items, columns=["record_id"])["record_id"].to_list() if items.exists() else []
    return Trace(
        run=run,
        records=found,
        merged=merged,
        adapter=adapter["digest"] if adapter is not None else None,
        learned=learned["adapter"],
        in_evidence=len(set(judged) & set(found["record_id"].to_list())),
        forgotten=sum(row["subject_hash"] == hashed for row in _forgotten_rows(run)),
        models=[run / model for model, count in learned.items() if len(found) and count != 0],
    )


def _learned(model: Path, dataset: dict[str, Any], num_train: int) -> int | None:
    """How many of the records the model was trained on; None where it was trained on a data set that is not there."""
    manifest = artifacts.read_manifest(model)
    if manifest is None:
        return 0
    is_known = manifest.get("parents", {}).get("dataset") in (dataset["digest"], *dataset.get("was", []))
    return num_train if is_known else None


def forget(subject: str, run: Path, key: bytes) -> Trace:
    """Takes the subject's rows out of the run's data set for good and marks the adapter; returns what was there.

    The order survives a kill: first the rows that must not come back, then the adapter's mark, then the data set, whose
    key is another from then on. Evidence that shows one of the records is removed. Raises `RunError`.
    """
    found = trace(subject, run, key)
    if not len(found.records):
        return found
    manifest = _dataset(run)
    digests = {source["file"]: source["sha256"] for source in manifest["sources"]}
    hashed = subject_hash(subject, key)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows = polars.concat([found.records.select(ROW), found.merged.select(ROW)]).unique().sort(ROW)
    path, earlier = run / FORGOTTEN, _forgotten_rows(run)
    known = {(row["source_file"], row["source_row"]) for row in earlier}  # by an attempt that was killed
    new = [
        {**row, "sha256": digests[row["source_file"]], "subject_hash": hashed, "time": now}
        for row in rows.iter_rows(named=True)
        if row["source_file"] in digests and (row["source_file"], row["source_row"]) not in known
    ]
    artifacts.write_json(path, {"rows": [*earlier, *new]})
    for model in found.models:
        mark = {"time": now, "subject_hash": hashed, "records": found.learned, "dataset": manifest["digest"]}
        marks = model / artifacts.REVOKED
        before = json.loads(marks.read_text(encoding="utf-8")) if marks.exists() else []
        artifacts.write_json(marks, [*before, mark])
    if found.in_evidence:
        shutil.rmtree(run / "evidence")
        for page in artifacts.PAGES:
            (run / page).unlink(missing_ok=True)
    _write_without(run, manifest, found)
    return found


def read_forgotten(out: Path) -> list[dict[str, Any]]:
    """The rows that must not come back: source_file, source_row, sha256 of the file. `out` is the data set's folder."""
    return [
        {name: row[name] for name in ("source_file", "source_row", "sha256")} for row in _forgotten_rows(out.parent)
    ]


def _forgotten_rows(run: Path) -> list[dict[str, Any]]:
    path = run / FORGOTTEN
    if not path.exists():
        return []
    names = ("source_file", "source_row", "sha256", "subject_hash", "time")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [{name: row[name] for name in names} for row in rows]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"`{path}` is damaged: which rows must not come back cannot be told", hint="restore it from a copy"
        ) from None


def forgotten_places(forgotten: list[dict[str, Any]], digests: dict[str, str]) -> set[tuple[str, int]]:
    """(file, row) of the forgotten rows. Raises `DataError` when a file changed since: its rows cannot be told."""
    for row in forgotten:
        if digests.get(row["source_file"], row["sha256"]) != row["sha256"]:
            raise DataError(
                f"`{row['source_file']}` was changed after a person was forgotten in it: row {row['source_row']} may "
                "be another one now",
                hint=f"take the person out of the new file, and the file's rows out of {FORGOTTEN}; or put "
                "the old file back",
            )
    return {(row["source_file"], row["source_row"]) for row in forgotten}


def _write_without(run: Path, manifest: dict[str, Any], found: Trace) -> None:
    """The data set again, without the records and the rows that went into them; the counts follow."""
    started, folder = time.time(), run / "dataset"
    gone = found.records["record_id"].to_list()
    tables = {name: polars.read_parquet(folder / f"{name}.parquet") for name in ("records", "rejected", "merged")}
    own = found.records.filter(polars.col("parent_id").is_null()).select(ROW)
    rows = polars.concat([own, found.merged.select(ROW)]).sort(ROW)
    rejected = rows.with_columns(
        polars.lit(-1, dtype=polars.Int64).alias("byte_offset"), polars.lit(REASON).alias("reason")
    )
    tables["records"] = tables["records"].filter(~polars.col("record_id").is_in(gone))
    tables["merged"] = tables["merged"].filter(~polars.col("record_id").is_in(gone))
    tables["rejected"] = polars.concat([tables["rejected"], rejected.select(tables["rejected"].columns)])
    conflicts = polars.read_parquet(folder / "conflicts.parquet")
    is_gone = polars.col("record_id").is_in(gone) | polars.col("other_record_id").is_in(gone)
    tables["conflicts"] = conflicts.filter(~is_gone)
    details = {name: value for name, value in manifest.items() if name not in _CORE}
    _count_again(details, tables, own, found.merged)
    details["was"] = [*manifest.get("was", []), manifest["digest"]]
    work = artifacts.work_folder(folder, artifacts.digest_json(["forgotten", manifest["digest"], sorted(gone)]))
    tables |= {path.stem: _rest(path, gone) for path in folder.glob("*.parquet") if path.stem not in tables}
    for name, table in tables.items():
        artifacts.write_atomic(work / f"{name}.parquet", parquet_bytes(table))
    for path in folder.glob("*.jsonl"):  # samples for a person to read
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if not _is_of(line, rows)]
        artifacts.write_atomic(work / path.name, "".join(lines).encode())
    artifacts.write_atomic(work / "DATA_CARD.md", data_card(details).encode())
    artifacts.write_json(work / "croissant.json", croissant(details, work))
    artifacts.complete(
        work, folder, kind="dataset", key=(work / "key").read_text(), config=manifest["config"], parents={},
        started=started, details=details,
    )  # fmt: skip


def _rest(path: Path, gone: list[str]) -> polars.DataFrame:
    """Another table of the data set, without what it says of the records."""
    table = polars.read_parquet(path)
    return table.filter(~polars.col("record_id").is_in(gone)) if "record_id" in table.columns else table


def _is_of(line: str, rows: polars.DataFrame) -> bool:
    entry = json.loads(line)
    return (entry.get("source_file"), entry.get("source_row")) in set(rows.rows())


def _count_again(
    details: dict[str, Any], tables: dict[str, polars.DataFrame], own: polars.DataFrame, merged: polars.DataFrame
) -> None:
    records, counts = tables["records"], details["counts"]
    for source in details["sources"]:
        kept = int((own["source_file"] == source["file"]).sum())
        into = int((merged["source_file"] == source["file"]).sum())
        source["kept"], source["merged"] = source["kept"] - kept, source["merged"] - into
        source["rejected"] += kept + into
    for what in ("kept", "merged", "rejected"):
        counts[what] = sum(source[what] for source in details["sources"])
    counts["synthetic"] = int(records["parent_id"].is_not_null().sum())
    reasons = details["rejected_by_reason"]
    details["rejected_by_reason"] = {**reasons, REASON: reasons.get(REASON, 0) + len(own) + len(merged)}
    first = [f"{file}:{row}" for file, row in polars.concat([own, merged.select(ROW)]).head(EXAMPLES).rows()]
    details["rejected_examples"] = {REASON: first} | details["rejected_examples"]
    details["splits"] = {name: int((records["split"] == name).sum()) for name in details["splits"]}
    details["languages"] = {name: int((records["language"] == name).sum()) for name in details["languages"]}
    details["label_conflicts"] = len(tables["conflicts"])


def _reasons(records: polars.DataFrame, subject: str, key: bytes, folder: Path) -> dict[str, str]:
    """record_id -> why it is the subject's."""
    why: dict[str, str] = {}
    is_named = _named(subject, key)
    known = {group: is_named(group) for group in records["group_id"].drop_nulls().unique().to_list()}
    hashed = subject_hash(subject, key)
    listed = folder / "subjects.parquet"
    by_hash = set()
    if listed.exists():
        table = polars.read_parquet(listed).filter(polars.col("subject_hash") == hashed)
        by_hash = set(table["record_id"].to_list())
    word = _folded(subject)
    edge = r"(?<![a-z0-9])", r"(?![a-z0-9])"
    pattern = re.compile(
        (edge[0] if word[:1].isascii() else "") + re.escape(word) + (edge[1] if word[-1:].isascii() else "")
    )
    for row in records.select("record_id", "group_id", "messages", *ROW).iter_rows(named=True):
        if row["group_id"] is not None and known[row["group_id"]]:
            why[row["record_id"]] = "group_id"
        elif row["record_id"] == subject or f"{row['source_file']}:{row['source_row']}" == subject:
            why[row["record_id"]] = "named"
        elif row["record_id"] in by_hash:
            why[row["record_id"]] = "found by de-identification"
        elif any(pattern.search(_folded(turn["content"])) for turn in row["messages"]):
            why[row["record_id"]] = "in its text"
    return why


def _named(subject: str, key: bytes) -> Callable[[str], bool]:
    """Whether a group_id is the subject: the value, its hash, or a value with this hash."""
    hashed = subject_hash(subject, key)
    return lambda group: group in (subject, hashed) or keyed_hash(group, key) == hashed


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _dataset(run: Path) -> dict[str, Any]:
    manifest = artifacts.read_manifest(run / "dataset")
    if manifest is None or not artifacts.is_whole(run / "dataset", manifest):
        raise RunError(f"`{run}` has no complete data set", hint="name the folder of a run, such as runs/icd10")
    return manifest
