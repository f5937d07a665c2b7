"""Raw files -> RUN/dataset: records.parquet, rejected.parquet, DATA_CARD.md and the manifest.

read -> clean -> deidentify -> dedup -> group -> split -> balance and augment train only -> certify -> write.
Every row of every source is a record, merged into one, or a rejected row with its place and reason; the counts are
checked before anything is written. The same files, recipe and seed give the same bytes.

Limits: the kept records are held in memory once.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import polars

from metier import artifacts
from metier.data.accounts import Accounts
from metier.data.alike import Ints
from metier.data.augment import Variation, augment
from metier.data.balance import LEFT_OUT, NOT_NEEDED, check_balance, class_weights, general_excess, left_out, repeated
from metier.data.canaries import canaries_table, planted
from metier.data.card import data_card
from metier.data.clean import contradictions
from metier.data.croissant import croissant
from metier.data.dedup import Comparison, Merged, find_pairs, join_groups, merge_exact, merge_near
from metier.data.deidentify.records import open_privacy, policy_key, review_lines
from metier.data.leakage import benchmark_leaks, certify, test_leaks
from metier.data.lineage import forgotten_places, read_forgotten
from metier.data.lines import Source
from metier.data.paraphrase import ask_base, base_key
from metier.data.partitions import Workers
from metier.data.proposals import propose
from metier.data.read_records import GENERAL, find_files, read_records
from metier.data.records import Record
from metier.data.roles import Roles
from metier.data.sources import describe_source
from metier.data.split import number_groups, split_groups
from metier.data.spool import Spool
from metier.data.tables import (
    LANGUAGES,
    RECORDS_SCHEMA,
    Identities,
    RecordsTable,
    conflicts_table,
    merged_into,
    merged_table,
    parquet_bytes,
    rejected_table,
    subjects_table,
    write_parquet,
)
from metier.data.terms import coverage
from metier.domains import load_domain
from metier.errors import DataError, RunError
from metier.recipe import DataConfig, DedupConfig, Recipe

MAX_LABELS = 256
MAX_LABEL_CHARS = 100
MIN_RECORDS_PER_LABEL = 5
MIN_RECORDS_OF_ONE_CLASS = 20
# The sections of the recipe that this stage owns: a change in one of them makes the data set anew.
OWNED = {"seed", "domain", "data", "clean", "privacy", "dedup", "balance", "augment"}


def dataset_key(recipe: Recipe, out: Path) -> tuple[str, dict[str, str]]:
    """What `prepare` is asked for, and the digests of the source files in it. Raises `DataError` for a missing one."""
    of_path: dict[Path, str] = {}  # an archive is digested once, not once a member
    digests = {}
    for source in find_files(recipe).every:
        if source.path not in of_path:
            of_path[source.path] = artifacts.digest_file(source.path)
        digests[source.name] = of_path[source.path]
    return _key(recipe, digests, read_forgotten(out)), digests


def prepare(
    recipe: Recipe,
    *,
    out: Path,
    progress: Callable[[str], None],
    asked: tuple[str, dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Reads the sources and completes the artifact `out`; returns its manifest. `asked` is `dataset_key`, if known.

    Raises `DataError` when a source or the records as a whole cannot be used, `RunError` when `out` cannot be
    written; an earlier data set in `out` is then as it was.
    """
    started = time.time()
    key, digests = asked or dataset_key(recipe, out)
    with _no_cycles():
        with Workers(recipe.scale) as workers:
            made = _make(recipe, digests, out=out, workers=workers, progress=progress)
        work = artifacts.work_folder(out, key)
        try:
            _write(work, made)
            return artifacts.complete(
                work, out, kind="dataset", key=key, config=recipe.model_dump(include=OWNED), parents={},
                started=started, details=made.details,
            )  # fmt: skip
        except RunError:
            shutil.rmtree(work, ignore_errors=True)  # half a data set is of no use: it is made anew
            raise


@dataclass(frozen=True, slots=True)
class Made:
    """What is to be written: the records, the tables that are there by name, rows merged into others with the ids of
    these, the manifest's entries, and, where something was taken out, the records for a person to read.
    """

    records: RecordsTable
    tables: dict[str, polars.DataFrame]
    merged: list[Merged]
    merged_ids: list[str]
    details: dict[str, Any]
    review: list[dict[str, Any]] | None


@contextlib.contextmanager
def _no_cycles() -> Iterator[None]:
    """Python's search for cycles off: records hold none, and to walk a million of them again and again takes a third
    of this process's time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _make(
    recipe: Recipe, digests: dict[str, str], *, out: Path, workers: Workers, progress: Callable[[str], None]
) -> Made:
    seed, details = recipe.seed, dict[str, Any]()
    files, forgotten = find_files(recipe), forgotten_places(read_forgotten(out), digests)
    privacy = open_privacy(recipe.privacy, domain_policy=_domain_policy(recipe), seed=seed)
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    accounts = Accounts([*files.sources, *files.general], Spool(folder), forgotten)
    roles, cleaned = read_records(accounts, files, recipe, privacy=privacy, workers=workers, progress=progress)
    details["privacy"], review = privacy.rewrite_records(accounts.records, workers, progress)
    accounts.refuse_too_few()
    task = _task(recipe.data, [record for record in accounts.records if record.method is None])
    check_balance(recipe.balance, [source.name for source in files.sources], task)
    if task == "classification":
        other = contradictions(accounts.records, recipe.clean.contradictions, cleaned)
        accounts.reject(other, "same prompt as a record with another label")
    progress("looking for duplicates")
    comparison, benchmarks = _deduplicate(accounts, files.benchmarks, recipe.dedup, task, workers)
    accounts.refuse_too_few()
    _split(recipe.data, accounts, task, seed)
    made, details["paraphrases"] = _balance_and_augment(accounts, recipe, comparison, progress)
    progress("checking what the splits share")
    details["leakage"] = certify(accounts, made, comparison, config=recipe.dedup, seed=seed)
    details["leakage"]["benchmarks"] = benchmarks
    accounts.sort()
    records = [*accounts.records, *made]
    weights = class_weights(_train(accounts.records) + made, recipe.balance, task=task)
    details["class_weights"] = weights
    identities = Identities(records, workers)
    merged_ids = identities.of(merged_into(accounts.merged))
    tables = {
        "rejected": rejected_table(accounts.rejected),
        "merged": merged_table(accounts.merged, merged_ids),
        "conflicts": conflicts_table(accounts.records, accounts.pairs, task, identities),
    }
    details = _describe_all(accounts, records, identities, comparison, recipe=recipe, digests=digests) | details
    details["roles"], details["label_conflicts"] = _describe(roles), len(tables["conflicts"])
    details |= {"cleaning": cleaned.report(recipe.clean), "columns": propose(files.sources[0], roles[files.sources[0]])}
    counts = details["counts"]
    progress(f"{counts['kept']:,} of {counts['rows']:,} rows kept, {counts['rejected']:,} rejected")
    if recipe.data.canaries:
        tables["canaries"] = canaries_table(recipe.data.canaries, seed)
    table = RecordsTable(records, identities, task, weights)
    return Made(table, tables, accounts.merged, merged_ids, details, review if privacy.policy else None)


def _key(recipe: Recipe, digests: dict[str, str], forgotten: list[dict[str, Any]]) -> str:
    asked: dict[str, Any] = {"stage": "dataset", "recipe": recipe.model_dump(include=OWNED), "sources": digests}
    asked |= {"domain": load_domain(recipe.domain).model_dump()} if recipe.domain else {}
    asked |= policy_key(recipe.privacy, _domain_policy(recipe))
    asked |= ({"forgotten": forgotten} if forgotten else {}) | base_key(recipe)
    return artifacts.digest_json(asked)


def _describe(roles: dict[Source, Roles]) -> dict[str, str]:
    """The roles of all files together: they differ in optional columns alone."""
    return {role: column for found in roles.values() for role, column in found.describe().items()}


def _domain_policy(recipe: Recipe) -> str | None:
    return load_domain(recipe.domain).privacy_policy if recipe.domain else None


def _deduplicate(
    accounts: Accounts, benchmarks: list[Source], config: DedupConfig, task: str, workers: Workers
) -> tuple[Comparison, dict[str, dict[str, Any]]]:
    """Merges copies, finds near-duplicates, and rejects what would train on a test file or a benchmark."""
    if config.exact:
        accounts.records, merged = merge_exact(accounts.records)
        accounts.merged += merged
    comparison = Comparison(accounts.records, task, workers, accounts.spool.folder)
    if config.near != "ignore":
        accounts.pairs = find_pairs(accounts.records, comparison, config.threshold)
    for problem, records in test_leaks(accounts.records, accounts.pairs).items():
        accounts.reject(records, problem)
    found = benchmark_leaks(accounts.records, benchmarks)
    for name, records in found.items():
        accounts.reject(records, f"shares a passage with {name}")
    if config.near == "merge":
        accounts.merge(merge_near(accounts.records, accounts.pairs, task))
    return comparison, {name: {"records_rejected": len(records)} for name, records in found.items()}


def _split(config: DataConfig, accounts: Accounts, task: str, seed: int) -> None:
    """Gives every record its split. Groups that hold general instructions alone are for training."""
    named = join_groups(accounts.records, accounts.pairs, accounts.merged)
    is_own = [record.method != GENERAL and not record.source.is_test for record in accounts.records]
    own = list(compress(accounts.records, is_own))
    group = number_groups((record.group for record in compress(named, is_own)), seed)
    strata = _most_frequent(group, [record.answer for record in own]) if task == "classification" else None
    test = 0 if any(record.source.is_test for record in accounts.records) else config.test
    splits = split_groups(np.bincount(group).tolist(), val=config.val, test=test, strata=strata)
    for record in accounts.records:
        record.split = "test" if record.source.is_test else "train"
    for record, number in zip(own, group.tolist(), strict=True):
        record.split = splits[number]


def _most_frequent(group: Ints, labels: list[str]) -> list[int]:
    """For each group the place, among the labels in order, of its most frequent one, of equal ones the first."""
    place = {label: number for number, label in enumerate(sorted(set(labels)))}
    found, counts = np.unique(group * len(place) + [place[label] for label in labels], return_counts=True)
    most = np.lexsort((found % len(place), -counts, found // len(place)))
    first = np.unique(found[most] // len(place), return_index=True)[1]
    frequent: list[int] = (found[most][first] % len(place)).tolist()
    return frequent


def _balance_and_augment(
    accounts: Accounts, recipe: Recipe, comparison: Comparison, progress: Callable[[str], None]
) -> tuple[list[Record], dict[str, Any]]:
    """The synthetic records, all of them for training, and what the base was asked for; what balance leaves out is
    rejected.
    """
    seed, task, domain = recipe.seed, comparison.task, load_domain(recipe.domain) if recipe.domain else None
    left = left_out(_train(accounts.records), recipe.balance, task=task, seed=seed)
    accounts.reject(left, LEFT_OUT)
    train = _train(accounts.records)
    asked = ask_base(train, recipe, domain, progress)
    variation = Variation(recipe.augment, domain, seed, task)
    made = augment(train, variation, rewritten=asked.messages, workers=comparison.workers)
    made += repeated(train, recipe.balance, task=task, seed=seed)
    general = [record for record in accounts.records if record.method == GENERAL]
    accounts.reject(general_excess(general, len(train) + len(made), recipe.balance, seed=seed), NOT_NEEDED)
    for record in made:
        record.split = "train"
    return made, asked.report()


def _train(records: list[Record]) -> list[Record]:
    """The recipe's own training records."""
    return [r for r in records if r.split == "train" and r.method != GENERAL]


def _write(work: Path, made: Made) -> None:
    """The data set's files but for the manifest."""
    if made.review is not None:
        artifacts.write_atomic(work / "privacy_review.jsonl", review_lines(made.review))
    own, tables = made.records, made.tables
    frames = chain(own, [planted(tables["canaries"])]) if "canaries" in tables else own
    write_parquet(work / "records.parquet", RECORDS_SCHEMA, frames, own.rows)
    if made.review is not None:
        tables["subjects"] = subjects_table(own.subjects, made.merged, made.merged_ids)
    for name, table in tables.items():
        artifacts.write_atomic(work / f"{name}.parquet", parquet_bytes(table))
    artifacts.write_atomic(work / "DATA_CARD.md", data_card(made.details).encode())
    artifacts.write_json(work / "croissant.json", croissant(made.details, work))


def _describe_all(
    accounts: Accounts, records: list[Record], identities: Identities, comparison: Comparison, *, recipe: Recipe,
    digests: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The manifest's entries about rows and records."""
    counts = accounts.counts()
    task, own = comparison.task, [record for record in accounts.records if record.method is None]
    methods = Counter(record.method for record in records if record.parent)
    languages = np.bincount(identities.languages, minlength=len(LANGUAGES)).tolist()
    splits = Counter(record.split for record in records)
    total = {what: sum(c[what] for c in counts.values()) for what in ("rows", "kept", "merged", "rejected")}
    return {
        "counts": total | {"synthetic": methods.total()},
        "rejected_by_reason": accounts.rejected.by_reason(),
        "rejected_examples": accounts.rejected.examples(),
        "merged_by_kind": dict(sorted(Counter(item.how for item in accounts.merged).items())),
        "near_duplicate_pairs": len(accounts.pairs),
        "synthetic_by_method": dict.fromkeys(recipe.augment.methods, 0) | dict(sorted(methods.items())),
        "splits": {name: splits[name] for name in ("train", "val", "test")},
        "languages": dict(zip(LANGUAGES, languages, strict=True)),
        "task": task,
        "labels": sorted({record.answer for record in own}) if task == "classification" else [],
        "sources": [
            {"file": s.name, "sha256": digests[s.name], **counts[s], **describe_source(s)} for s in accounts.sources
        ],
        "seed": recipe.seed,
    } | _covered(accounts.records, recipe, comparison.workers)


def _covered(records: list[Record], recipe: Recipe, workers: Workers) -> dict[str, Any]:
    """What of the domain's glossary stands in the records."""
    if not recipe.domain:
        return {}
    domain = load_domain(recipe.domain)
    return {"domain": {"name": domain.name, **coverage(domain, records, workers)}}


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
    answers = set[str]()
    for record in records:
        answers.add(record.answer)
        if len(answers) > MAX_LABELS:
            break
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
