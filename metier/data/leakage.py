"""Splits -> what of the held-out records training could have seen, and the certificate of it in the manifest.

Checked between train, val and test, after everything else is done, so that copies made for balance and augmentation
are seen too: the same prompt, the same group_id, near-duplicates (searched again, with other hashes than the groups
were made with), synthetic records whose parent is held out, and passages: runs of 50 characters, in Chinese 13, that
are not template text. Passages are counted and stay: two records may quote one sentence.

Benchmarks: every text of the named files is cut into such passages too; a record that holds one is rejected. Shorter
texts of a benchmark are compared as a whole with whole prompts.

Limits: a paraphrase in other words, or a translation, is not seen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np

from metier.data.accounts import Accounts
from metier.data.dedup import Comparison, Pair, find_pairs, without
from metier.data.lines import Source
from metier.data.partitions import parts
from metier.data.records import Record
from metier.data.shingles import Known, Template, batches, distinct, normalise, window_hashes
from metier.data.sources import read_rows
from metier.recipe import DedupConfig

PASSAGE_HAN, PASSAGE_OTHER = 13, 50
RANK = {"train": 0, "val": 1, "test": 2}


def certify(
    accounts: Accounts,
    splits: dict[int, str],
    made: list[Record],
    comparison: Comparison,
    *,
    config: DedupConfig,
    seed: int,
) -> dict[str, Any]:
    """Takes out what still leaks, and says what was checked and what a split by rows would have leaked.

    `splits`: id of a record -> its split. `made`: the synthetic records, of which those that leak are removed.
    """
    is_near, threshold = config.near != "ignore", config.threshold
    records = [*accounts.records, *made]
    of = [splits[id(record)] for record in records]
    late: list[Record] = []
    if is_near:
        found = late_leaks(records, of, comparison, threshold=threshold, seed=seed)
        late = [records[i] for i in found]
        gone = {id(record) for record in late}
        accounts.reject([r for r in late if r.parent is None], "near-duplicate of a held-out record")
        made[:] = [record for record in made if id(record) not in gone]
    records = [*accounts.records, *made]
    of = [splits[id(record)] for record in records]
    own = [record for record in accounts.records if record.method is None]
    by_row = row_split(own, [splits[id(record)] for record in own], seed)
    pairs_of_own = without(accounts.records, accounts.pairs, [r for r in accounts.records if r.method is not None])[1]
    return {
        "held_out_records": sum(split != "train" for split in of),
        "shared_with_train": overlap(records, of, accounts.pairs),
        "if_split_by_row": overlap(own, by_row, pairs_of_own),
        "near_duplicates_searched": is_near,
        "threshold": threshold,
        "found_late": len(late),
        "test_records_with_a_passage_of_train": shared_passages(records, of, comparison),
        "passage_chars": {"zh": PASSAGE_HAN, "other": PASSAGE_OTHER},
        "synthetic_of_held_out": sum(r.parent is not None and splits[id(r.parent)] != "train" for r in made),
    }


def test_leaks(records: list[Record], pairs: list[Pair]) -> dict[str, list[Record]]:
    """What would train on a test file's prompt, group or near-duplicate, by reason."""
    prompts = {record.prompt for record in records if record.source.is_test}
    groups = {record.group_id for record in records if record.source.is_test and record.group_id is not None}
    is_test = [record.source.is_test for record in records]
    near = {a if is_test[b] else b for a, b, _ in pairs if is_test[a] != is_test[b]}
    found: dict[str, list[Record]] = {}
    for position, record in enumerate(records):
        if record.source.is_test:
            continue
        if record.prompt in prompts:
            found.setdefault("same prompt as a test record", []).append(record)
        elif record.group_id in groups:
            found.setdefault("same group_id as a test record", []).append(record)
        elif position in near:
            found.setdefault("near-duplicate of a test record", []).append(record)
    return found


def benchmark_leaks(records: list[Record], benchmarks: list[Source]) -> dict[str, list[Record]]:
    """The records that hold a passage of a benchmark, or are one of its texts, by the benchmark's name."""
    texts = ["\n".join(turn["content"] for turn in record.messages) for record in records]
    found: dict[str, list[Record]] = {}
    taken: set[int] = set()
    for source in benchmarks:
        items = _texts_of(source)
        whole = {normalise([item]).text(0).tobytes() for item in items}
        hits = set(np.flatnonzero(Passages(items).shared(texts)).tolist())
        hits |= {i for i, record in enumerate(records) if normalise([record.prompt]).text(0).tobytes() in whole}
        found[source.name] = [records[position] for position in sorted(hits - taken)]
        taken |= hits
    return found


class Passages:
    """The passages of `texts`, template text aside, to look others' up in."""

    def __init__(self, texts: Sequence[str], template: Template | None = None) -> None:
        self._template = template or Template(texts)
        found = [window_hashes(self._template.own(batch), PASSAGE_HAN, PASSAGE_OTHER)[0] for _, batch in batches(texts)]
        hashes = np.concatenate(found) if found else np.empty(0, np.uint64)
        del found  # it is as large again
        self._known = Known(distinct(hashes))

    def shared(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[n]: which of `texts` hold one of the passages."""
        holds = np.zeros(len(texts), dtype=np.bool_)
        for first, batch in batches(texts):
            hashes, text, _ = window_hashes(batch, PASSAGE_HAN, PASSAGE_OTHER)
            holds[first + text[self._known.places(hashes)]] = True
        return holds


def late_leaks(
    records: list[Record], splits: Sequence[str], comparison: Comparison, *, threshold: float, seed: int
) -> list[int]:
    """Positions of records that are like one further on (train, val, test), found by a search with other hashes.

    Among them are synthetic records that became like a held-out one, and what was made of a record that goes.
    """
    once = [i for i, record in enumerate(records) if record.method != "repeat"]
    of = [splits[i] for i in once]
    pairs = find_pairs([records[i] for i in once], comparison, threshold, seed=seed + 1, splits=of)
    gone = {once[i] for i in crossing(of, pairs)}
    held = {(record.prompt, record.answer) for record, split in zip(records, splits, strict=True) if split != "train"}
    gone |= {i for i, record in enumerate(records) if record.parent and (record.prompt, record.answer) in held}
    parents = {id(records[i]) for i in gone}
    return sorted(gone | {i for i, record in enumerate(records) if id(record.parent) in parents})


def crossing(splits: Sequence[str], pairs: Iterable[Pair]) -> set[int]:
    """Of each near-duplicate pair that crosses a split, the record that is further from test."""
    return {
        left if RANK[splits[left]] < RANK[splits[right]] else right
        for left, right, _ in pairs
        if splits[left] != splits[right]
    }


def overlap(records: list[Record], splits: Sequence[str], pairs: list[Pair]) -> dict[str, int]:
    """How many val and test records have their like in train (or a test record in val), by kind."""
    counts = {"prompt": 0, "group_id": 0, "near_duplicate": 0}
    seen: dict[tuple[str, str], int] = {}
    for record, split in zip(records, splits, strict=True):
        for key in _keys(record):
            seen[key] = min(seen.get(key, 2), RANK[split])
    for record, split in zip(records, splits, strict=True):
        for kind in {kind for kind, value in _keys(record) if seen[kind, value] < RANK[split]}:
            counts[kind] += 1
    held = {b if RANK[splits[a]] < RANK[splits[b]] else a for a, b, _ in pairs if splits[a] != splits[b]}
    counts["near_duplicate"] = len(held)
    return counts


def row_split(records: list[Record], splits: Sequence[str], seed: int) -> list[str]:
    """The same sizes, drawn row by row: what is usually done, to show what it leaks."""
    order = sorted(
        range(len(records)),
        key=lambda i: hashlib.sha256(f"{seed}|{records[i].source.name}|{records[i].row.number}".encode()).digest(),
    )
    sizes = Counter(splits)
    names = [name for name in ("test", "val", "train") for _ in range(sizes[name])]
    drawn = [""] * len(records)
    for position, name in zip(order, names, strict=True):
        drawn[position] = name
    return drawn


def shared_passages(records: list[Record], splits: Sequence[str], comparison: Comparison) -> int:
    """How many test records share a passage with a training record."""
    texts = comparison.texts(records)
    # Sorted, because batches of one language take less time.
    test = sorted(text for text, split in zip(texts, splits, strict=True) if split == "test")
    train = sorted({text for text, split in zip(texts, splits, strict=True) if split == "train"})
    if not test or not train:
        return 0
    passages = Passages(test, comparison.template)
    # Threads, not processes: numpy lets others work meanwhile, and the passages, 8 bytes a character, are there once.
    with ThreadPoolExecutor(comparison.workers.number) as pool:
        shared = list(chain.from_iterable(pool.map(passages.shared, parts(train))))
    candidates = [text for text, is_shared in zip(train, shared, strict=True) if is_shared]
    return int(Passages(candidates, comparison.template).shared(test).sum()) if candidates else 0


def _keys(record: Record) -> list[tuple[str, str]]:
    keys = [("prompt", record.prompt)]
    return keys if record.group_id is None else [*keys, ("group_id", record.group_id)]


def _texts_of(source: Source) -> list[str]:
    """Every text of a file, whatever its columns: strings inside lists and objects too."""
    texts: dict[str, None] = {}

    def walk(value: Any) -> None:
        if isinstance(value, str):
            if len(value.strip()) >= 8:
                texts[value.strip()] = None
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for row in read_rows(source):
        walk(row.fields)
    return list(texts)
