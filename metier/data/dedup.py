"""Records -> no record twice, the pairs that are near-duplicates, and the groups that must not cross a split.

Exact: all messages are the same after NFKC and with runs of white space as one space; the later row is merged into
the earlier one. Near: the Jaccard similarity of shingles (minhash.py) of what `Comparison` takes of a record. Groups:
records that share a group_id or a prompt, or are near-duplicates, directly or through others, are one group.

The records of test files are never merged. What is found does not depend on the order of rows or files.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metier.data.partitions import Workers
from metier.data.records import Record

Pair = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class Merged:
    """A row that is no record of its own: `record` went into `into`, because it is `exact` or `near` to it."""

    record: Record
    into: Record
    how: str


def merge_exact(records: list[Record]) -> tuple[list[Record], list[Merged]]:
    """The records without exact copies, and the copies."""
    first: dict[bytes, Record] = {}
    kept: list[Record] = []
    merged: list[Merged] = []
    for record in records:
        into = record if record.source.is_test else first.setdefault(_same(record), record)
        if into is record:
            kept.append(record)
        else:
            merged.append(Merged(record, into, "exact"))
    return kept, merged


class Comparison:
    """What of a record is compared with others, fixed by the records that it is made of, and who compares.

    The prompts where answers are labels, else prompts and answers; without system messages, without what the recipe's
    template gave to all, and (minhash.py) without text that many share.
    """

    def __init__(self, records: list[Record], task: str, workers: Workers | None = None) -> None:
        from metier.data.shingles import Template

        self.workers = workers or Workers()
        self.task = task
        self._begin = self._end = ""
        texts = self.texts(records)
        if len(texts) >= 3:
            self._begin = os.path.commonprefix([min(texts), max(texts)])
            backwards = [text[len(self._begin) :][::-1] for text in texts]
            self._end = os.path.commonprefix([min(backwards), max(backwards)])[::-1]
        self.template = Template(sorted(self.texts(records)))

    def texts(self, records: list[Record]) -> list[str]:
        """Each record's own words."""
        found = []
        for record in records:
            turns = [turn["content"] for turn in record.messages if turn["role"] != "system"]
            text = "\n".join(turns[:-1] if self.task == "classification" else turns)
            text = text.removeprefix(self._begin)
            found.append(text.removesuffix(self._end))
        return found


def find_pairs(
    records: list[Record],
    comparison: Comparison,
    threshold: float,
    *,
    seed: int = 0,
    splits: Sequence[str] | None = None,
) -> list[Pair]:
    """(position, position, similarity) of all pairs found with at least that Jaccard similarity.

    `splits`: each record's split; then only pairs that cross splits are looked for.
    """
    import numpy as np

    from metier.data.minhash import near_duplicates

    texts = comparison.texts(records)
    order = sorted(range(len(texts)), key=texts.__getitem__)
    ordered = [texts[i] for i in order]
    number = {name: place for place, name in enumerate(sorted(set(splits or ())))}
    sides = np.array([number[splits[i]] for i in order]) if splits else None
    found = near_duplicates(
        ordered, threshold=threshold, seed=seed, template=comparison.template, sides=sides, workers=comparison.workers
    )
    triples = zip(found.left.tolist(), found.right.tolist(), found.similarity.tolist(), strict=True)
    pairs = ((order[left], order[right], similarity) for left, right, similarity in triples)
    return sorted((min(a, b), max(a, b), similarity) for a, b, similarity in pairs)


def merge_near(records: list[Record], pairs: list[Pair], task: str) -> list[Merged]:
    """Which records to merge: of near-duplicates with the same label the longest stays, and none else like it.

    A record goes only into one that it is itself a near-duplicate of: a chain of small changes is not one record.
    """
    like: dict[int, list[int]] = {}
    for left, right, _ in pairs:
        if task != "classification" or records[left].answer == records[right].answer:
            like.setdefault(left, []).append(right)
            like.setdefault(right, []).append(left)
    into: dict[int, int] = {}
    for position in sorted(like, key=lambda i: (-_length(records[i]), i)):
        if position in into or records[position].source.is_test:
            continue
        free = (i for i in like[position] if i not in into and not records[i].source.is_test)
        into.update({i: position for i in free if _rank(records, i) > _rank(records, position)})
    return [Merged(records[i], records[into[i]], "near") for i in sorted(into)]


def without(records: list[Record], pairs: list[Pair], gone: Iterable[Record]) -> tuple[list[Record], list[Pair]]:
    """The records and pairs that are left when some records are gone."""
    dropped = {id(record) for record in gone}
    place: dict[int, int] = {}
    kept: list[Record] = []
    for position, record in enumerate(records):
        if id(record) not in dropped:
            place[position] = len(kept)
            kept.append(record)
    return kept, [(place[a], place[b], s) for a, b, s in pairs if a in place and b in place]


def join_groups(records: list[Record], pairs: list[Pair], merged: list[Merged]) -> list[str]:
    """Each record's group: the least name among all that are joined with it, so that it is the same in any order."""
    parent = list(range(len(records)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    place = {id(record): position for position, record in enumerate(records)}
    members = [(position, record) for position, record in enumerate(records)]
    members += [(place[id(m.into)], m.record) for m in merged if id(m.into) in place]
    for position, record in members:
        keys = [("prompt", _folded(record.prompt))]
        keys += [("group", record.group_id)] if record.group_id is not None else []
        for key in keys:
            parent[root(position)] = root(first.setdefault(key, position))
    for left, right, _ in pairs:
        parent[root(left)] = root(right)
    names: dict[int, str] = {}
    for position, record in members:
        names[root(position)] = min(names.get(root(position), record.group), record.group)
    return [names[root(position)] for position in range(len(records))]


def _same(record: Record) -> bytes:
    turns = "\0".join(f"{turn['role']}\1{_folded(turn['content'])}" for turn in record.messages)
    return hashlib.sha256(turns.encode()).digest()


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _length(record: Record) -> int:
    return sum(len(turn["content"]) for turn in record.messages)


def _rank(records: list[Record], position: int) -> tuple[int, int]:
    return (-_length(records[position]), position)
