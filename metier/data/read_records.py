"""The recipe's files -> their rows as cleaned records, or as rejected rows with place and reason; every row is counted.

The files are read here, one after the other; what is made of their rows is a function over partitions (partitions.py).
The records come in the order of the files and rows, whoever worked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from metier.data.accounts import Accounts
from metier.data.clean import Cleaned, clean_part, find_boilerplate
from metier.data.deidentify.records import Privacy
from metier.data.lineage import REASON as FORGOTTEN
from metier.data.lines import Row, Source
from metier.data.partitions import PART, Workers
from metier.data.proposals import suggest
from metier.data.records import Record, Rejected, Rejection, build_record
from metier.data.roles import Roles, UnclearRoles, find_roles
from metier.data.sources import find_sources, read_columns, read_rows
from metier.errors import DataError
from metier.recipe import CleanConfig, DataConfig, Recipe

GENERAL = "general"


@dataclass(frozen=True, slots=True)
class Files:
    """The files that a recipe names, by what they are for; `every` has them all, in a fixed order."""

    sources: list[Source]
    general: list[Source]
    benchmarks: list[Source]

    @property
    def every(self) -> list[Source]:
        return [*self.sources, *self.general, *self.benchmarks]


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of one source. `method` marks what is made of them."""

    source: Source
    roles: Roles
    method: str | None
    rows: list[Row]

    def __len__(self) -> int:
        return len(self.rows)


def find_files(recipe: Recipe) -> Files:
    """Raises `DataError` for a missing file."""
    found = {"general": recipe.balance.general, "benchmarks": recipe.dedup.benchmarks}
    others = {
        folder: [
            dataclasses.replace(source, name=f"{folder}/{source.name}")
            for source in (find_sources(DataConfig(sources=names)) if names else [])
        ]
        for folder, names in found.items()
    }
    return Files(find_sources(recipe.data), **others)


def read_records(
    accounts: Accounts,
    files: Files,
    recipe: Recipe,
    *,
    privacy: Privacy,
    workers: Workers,
    progress: Callable[[str], None],
) -> tuple[dict[Source, Roles], Cleaned]:
    """Fills `accounts`; returns the roles of the recipe's own sources and what cleaning did. Raises `DataError`."""
    columns = {source: read_columns(source) for source in files.sources}
    roles = _roles(recipe.data, columns)
    privacy.check_columns([name for names in columns.values() for name in names])
    every = dict(roles)
    for source in files.general:
        config = DataConfig(sources=recipe.data.sources)
        every[source] = find_roles(config, read_columns(source), source.path)

    def partitions() -> Iterator[Part]:
        for position, source in enumerate(accounts.sources, start=1):
            progress(f"reading {source.name} ({position} of {len(accounts.sources)})")
            method = GENERAL if source in files.general else None
            rows = map(privacy.rewrite_row, _counted(accounts, source, progress))
            while part := list(islice(rows, PART)):
                yield Part(source, every[source], method, part)

    cleaned = Cleaned([])
    for done in workers.map(build_part, partitions(), recipe.clean):
        for record in done.records:
            record.store(accounts.spool)
        for item in done.rejected:
            accounts.rejected.add(item.source, item.row, item.problem)
        cleaned.add(done)
    find_boilerplate(cleaned, recipe.clean)
    accounts.records = cleaned.records
    return roles, cleaned


def build_part(part: Part, config: CleanConfig) -> Cleaned:
    """The records of some rows, each cleaned by itself."""
    records: list[Record] = []
    rejected: list[Rejection] = []
    for row in part.rows:
        try:
            if row.problem:
                raise Rejected(row.problem)
            record = build_record(part.source, row, part.roles)
            record.method = part.method
            records.append(record)
        except Rejected as error:
            place = Row(row.number, row.byte_offset, row.place)
            rejected.append(Rejection(part.source, place, str(error)))
    cleaned = clean_part(records, config)
    cleaned.rejected += rejected
    return cleaned


def _counted(accounts: Accounts, source: Source, progress: Callable[[str], None]) -> Iterator[Row]:
    """The rows of a source that are wanted."""
    count = 0
    for row in read_rows(source):
        count += 1
        if count % 100_000 == 0:
            progress(f"reading {source.name}: {count:,} rows")
        if (source.name, row.number) in accounts.forgotten:
            accounts.rejected.add(source, row, FORGOTTEN)
        else:
            yield row
    accounts.rows[source] = count


def _roles(config: DataConfig, columns: dict[Source, list[str]]) -> dict[Source, Roles]:
    roles = {}
    for source, names in columns.items():
        try:
            roles[source] = find_roles(config, names, source.path)
        except UnclearRoles as error:
            raise DataError(error.message, hint=suggest(source) or error.hint) from None
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
