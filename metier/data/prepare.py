"""Raw files -> RUN/dataset: records.parquet, rejected.parquet, DATA_CARD.md and the manifest.

Every row of every source is either a record or a rejected row with its place and reason; the counts are checked
before anything is written. The same files, recipe and seed give the same bytes.

Limits: the kept records are held in memory once.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metier import artifacts
from metier.data.canaries import canaries_table, plant
from metier.data.card import data_card
from metier.data.lines import Source
from metier.data.records import Record, Rejected, Rejection, build_record
from metier.data.roles import Roles, find_roles
from metier.data.sources import find_sources, read_columns, read_rows
from metier.data.split import split_groups
from metier.data.tables import parquet_bytes, records_table, rejected_table
from metier.errors import DataError, RunError
from metier.recipe import DataConfig

MAX_LABELS = 256
MAX_LABEL_CHARS = 100
MIN_RECORDS_PER_LABEL = 5
MIN_RECORDS_OF_ONE_CLASS = 20


def dataset_key(config: DataConfig, seed: int) -> str:
    """What `prepare` is asked for, with the digests of the source files. Raises `DataError` for a missing source."""
    return _key(config, seed, {source.name: artifacts.digest_file(source.path) for source in find_sources(config)})


def prepare(config: DataConfig, *, seed: int, out: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Reads the sources and completes the artifact `out`; returns its manifest.

    Raises `DataError` when a source or the records as a whole cannot be used, `RunError` when `out` cannot be
    written; an earlier data set in `out` is then as it was.
    """
    started = time.time()
    sources = find_sources(config)
    digests = {source.name: artifacts.digest_file(source.path) for source in sources}
    key = _key(config, seed, digests)
    roles = _roles(config, {source: read_columns(source) for source in sources})
    records, rejected, rows = _read_all(sources, roles, progress)
    records, leaking = _without_test_leaks(records)
    rejected += leaking
    order = {source: position for position, source in enumerate(sources)}
    rejected.sort(key=lambda item: (order[item.source], item.row.number))
    counts = _counts(sources, rows, records, rejected)
    _refuse_too_few(records, rejected)
    task = _task(config, records)
    splits = _split(config, records, seed)
    table = records_table(records, splits, task)
    canaries = canaries_table(config.canaries, seed) if config.canaries else None
    details: dict[str, Any] = {
        "counts": {what: sum(count[what] for count in counts.values()) for what in ("rows", "kept", "rejected")},
        "rejected_by_reason": dict(_by_reason(rejected)),
        "splits": {name: splits.count(name) for name in ("train", "val", "test")},
        "languages": {name: int((table["language"] == name).sum()) for name in ("zh", "en", "other")},
        "task": task,
        "labels": sorted({record.answer for record in records}) if task == "classification" else [],
        "roles": _describe(roles),
        "canaries_planted": 0 if canaries is None else int(canaries["repeats"].sum()),
        "sources": [
            {"file": source.name, "sha256": digests[source.name], **counts[source], "format": source.format}
            for source in sources
        ],
        "seed": seed,
    }
    progress(f"{details['counts']['kept']:,} of {details['counts']['rows']:,} rows kept, {len(rejected):,} rejected")
    work = artifacts.work_folder(out, key)
    try:
        if canaries is not None:
            table = plant(table, canaries)
            artifacts.write_atomic(work / "canaries.parquet", parquet_bytes(canaries))
        artifacts.write_atomic(work / "records.parquet", parquet_bytes(table))
        artifacts.write_atomic(work / "rejected.parquet", parquet_bytes(rejected_table(rejected)))
        artifacts.write_atomic(work / "DATA_CARD.md", data_card(details).encode())
        return artifacts.complete(
            work, out, kind="dataset", key=key, config=config.model_dump(), parents={}, started=started, details=details
        )
    except RunError:
        shutil.rmtree(work, ignore_errors=True)  # half a data set is of no use: it is made anew
        raise


def _key(config: DataConfig, seed: int, digests: dict[str, str]) -> str:
    return artifacts.digest_json({"stage": "dataset", "config": config.model_dump(), "seed": seed, "sources": digests})


def _roles(config: DataConfig, columns: dict[Source, list[str]]) -> dict[Source, Roles]:
    roles = {source: find_roles(config, names, source.path) for source, names in columns.items()}
    first = next(iter(roles))
    for source, found in roles.items():
        if found.required != roles[first].required:
            raise DataError(
                f"`{first.path}` and `{source.path}` do not hold the same kind of records: "
                f"{_spelled(roles[first])} in the one, {_spelled(found)} in the other",
                hint="name the roles in the recipe, give the files the same columns, or train on them in two runs",
            )
    return roles


def _spelled(roles: Roles) -> str:
    return ", ".join(f"{role} `{column}`" for role, column in roles.describe().items() if role != "how")


def _describe(roles: dict[Source, Roles]) -> dict[str, str]:
    """The roles of all files together: they differ in optional columns alone."""
    return {role: column for found in roles.values() for role, column in found.describe().items()}


def _read(source: Source, roles: Roles) -> Iterator[Record | Rejection]:
    for row in read_rows(source):
        if row.problem:
            yield Rejection(source, row, row.problem)
            continue
        try:
            yield build_record(source, row, roles)
        except Rejected as error:
            yield Rejection(source, row, str(error))


def _read_all(
    sources: list[Source], roles: dict[Source, Roles], progress: Callable[[str], None]
) -> tuple[list[Record], list[Rejection], Counter[Source]]:
    records: list[Record] = []
    rejected: list[Rejection] = []
    rows: Counter[Source] = Counter()
    for position, source in enumerate(sources, start=1):
        progress(f"reading {source.name} ({position} of {len(sources)})")
        for item in _read(source, roles[source]):
            rows[source] += 1
            if isinstance(item, Rejection):
                rejected.append(item)
            else:
                records.append(item)
            if rows[source] % 100_000 == 0:
                progress(f"reading {source.name}: {rows[source]:,} rows")
    return records, rejected, rows


def _without_test_leaks(records: list[Record]) -> tuple[list[Record], list[Rejection]]:
    """Takes out what would train on a test file's prompt or group."""
    prompts = {record.prompt for record in records if record.source.is_test}
    groups = {record.group_id for record in records if record.source.is_test and record.group_id is not None}
    kept: list[Record] = []
    leaking: list[Rejection] = []
    for record in records:
        if record.source.is_test:
            kept.append(record)
        elif record.prompt in prompts:
            leaking.append(Rejection(record.source, record.row, "same prompt as a test record"))
        elif record.group_id in groups:
            leaking.append(Rejection(record.source, record.row, "same group_id as a test record"))
        else:
            kept.append(record)
    return kept, leaking


def _counts(
    sources: list[Source], rows: Counter[Source], records: list[Record], rejected: list[Rejection]
) -> dict[Source, dict[str, int]]:
    """Rows, kept and rejected of each file; that they add up is what makes nothing get lost."""
    kept = Counter(record.source for record in records)
    out = Counter(item.source for item in rejected)
    for source in sources:
        if kept[source] + out[source] != rows[source]:
            raise AssertionError(f"{source.name}: {rows[source]} rows, {kept[source]} kept, {out[source]} rejected")
    return {source: {"rows": rows[source], "kept": kept[source], "rejected": out[source]} for source in sources}


def _by_reason(rejected: list[Rejection]) -> list[tuple[str, int]]:
    return sorted(Counter(item.problem for item in rejected).items(), key=lambda item: (-item[1], item[0]))


def _refuse_too_few(records: list[Record], rejected: list[Rejection]) -> None:
    if any(not record.source.is_test for record in records):
        return
    reasons = "; ".join(f"{reason} ({count:,})" for reason, count in _by_reason(rejected)[:3])
    rows = sum(not item.source.is_test for item in rejected)
    raise DataError(
        f"no record is left to train on: all {rows:,} rows of `data.sources` were rejected: {reasons}",
        hint="`metier inspect` shows which columns were taken for prompt and answer, and the rejected rows",
    )


def _task(config: DataConfig, records: list[Record]) -> str:
    """`text`, or as the recipe says, or by the answers: few, short and repeated ones are labels."""
    if records[0].messages[0]["role"] == "text":
        if config.task == "classification":
            raise DataError(
                "`data.task` is classification, but the records are plain text without labels",
                hint="name `data.prompt` and `data.answer`",
            )
        return "text"
    if config.task == "generation":
        return "generation"
    answers = {record.answer for record in records}
    are_labels = (
        len(answers) <= MAX_LABELS
        and len(records) >= MIN_RECORDS_PER_LABEL * len(answers)
        and all(len(answer) <= MAX_LABEL_CHARS for answer in answers)
    )
    is_classification = config.task == "classification" or are_labels
    if is_classification and len(answers) == 1:
        if config.task == "classification" or len(records) >= MIN_RECORDS_OF_ONE_CLASS:
            raise DataError(
                f"only one class: all {len(records):,} records have the same answer, so there is nothing to learn",
                hint="check `data.answer`, or set `data.task: generation` if that is meant",
            )
        return "generation"
    return "classification" if is_classification else "generation"


def _split(config: DataConfig, records: list[Record], seed: int) -> list[str]:
    """Each record's split."""
    sizes = Counter(record.group for record in records if not record.source.is_test)
    test = 0 if config.test_sources else config.test
    splits = split_groups(sizes, val=config.val, test=test, seed=seed)
    return ["test" if record.source.is_test else splits[record.group] for record in records]
