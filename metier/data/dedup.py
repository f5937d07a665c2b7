"""Records -> no record twice, the pairs that are near-duplicates, and the groups that must not cross a split.

Exact: all messages are the same after NFKC and with runs of white space as one space; the later row is merged into
the earlier one. Near: the Jaccard similarity of shingles (minhash.py) of what `Comparison` takes of a record. Groups:
records that share a group_id or a prompt, or are near-duplicates, directly or through others, are one group.

The records of test files are never merged. What is found does not depend on the order of rows or files.
"""

from __future__ import annotations

import os
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metier.data.alike import Digests, firsts
from metier.data.minhash import near_duplicates
from metier.data.partitions import Workers
from metier.data.records import Record
from metier.data.shingles import Template
from metier.data.spool import SortedTexts

Pair = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class Merged:
    """A row that is no record of its own: `record` went into `into`, because it is `exact` or `near` to it."""

    record: Record
    into: Record
    how: str


def merge_exact(records: list[Record]) -> tuple[list[Record], list[Merged]]:
    """The records without exact copies, and the copies."""
    own, contents = [record for record in records if not record.source.is_test], Digests()
    for record in own:
        contents.add("\0".join(f"{turn['role']}\1{_folded(turn['content'])}" for turn in record.messages))
    first = firsts(contents.keys())
    merged = [Merged(own[i], own[first[i]], "exact") for i in np.flatnonzero(first != np.arange(len(own))).tolist()]
    gone = {item.record for item in merged}
    return [record for record in records if record not in gone], merged


class Comparison:
    """What of a record is compared with others, fixed by the records that it is made of, and who compares.

    The prompts where answers are labels, else prompts and answers; without system messages, without what the recipe's
    template gave to all, and (minhash.py) without text that many share.
    """

    def __init__(
        self, records: list[Record], task: str, workers: Workers | None = None, folder: Path | None = None
    ) -> None:
        self.workers = workers or Workers()
        self.task, self.folder = task, folder
        self._begin, self._end = "", ""
        if len(records) >= 3:
            self._begin, self._end = _shared_ends(self.texts(records))
        ordered = SortedTexts(self.texts(records), folder)
        self.template = Template(ordered)
        self._first: tuple[list[Record], SortedTexts] | None = (records, ordered)

    def texts(self, records: Iterable[Record]) -> Iterator[str]:
        """Each record's own words."""
        for record in records:
            given = record.turns
            turns = [given[at + 1] for at in range(0, len(given), 2) if given[at] != "system"]
            text = "\n".join(turns[:-1] if self.task == "classification" else turns)
            yield text.removeprefix(self._begin).removesuffix(self._end)

    def ordered(self, records: list[Record]) -> SortedTexts:
        """These in order; of the records that the comparison was made of they are there once already."""
        first, self._first = self._first, None
        return first[1] if first and first[0] is records else SortedTexts(self.texts(records), self.folder)


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
    ordered = comparison.ordered(records)
    number = {name: place for place, name in enumerate(sorted(set(splits or ())))}
    sides = np.array([number[split] for split in splits], dtype=np.int8)[ordered.order] if splits else None
    found = near_duplicates(
        ordered, comparison.template, threshold=threshold, seed=seed, sides=sides, workers=comparison.workers,
        folder=comparison.folder,
    )  # fmt: skip
    left, right = ordered.order[found.left].tolist(), ordered.order[found.right].tolist()
    pairs = zip(left, right, found.similarity.tolist(), strict=True)
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
    dropped = set(gone)
    if not dropped:
        return records, pairs
    stays = np.array([record not in dropped for record in records], dtype=np.bool_)
    place = np.cumsum(stays) - 1
    kept = [record for record in records if record not in dropped]
    return kept, [(int(place[a]), int(place[b]), s) for a, b, s in pairs if stays[a] and stays[b]]


def join_groups(records: list[Record], pairs: list[Pair], merged: list[Merged]) -> list[Record]:
    """For each record the one whose `group` names its group: the least of all that are joined with it.

    So the name is the same in any order.
    """
    into = {item.into for item in merged}
    place = {record: position for position, record in enumerate(records) if record in into}
    late = [item for item in merged if item.into in place]
    members = [*records, *(item.record for item in late)]
    positions = [*range(len(records)), *(place[item.into] for item in late)]
    parent: dict[int, int] = {}  # of those alone that are joined with others

    def root(i: int) -> int:
        while (above := parent.setdefault(i, i)) != i:
            parent[i] = i = parent.setdefault(above, above)
        return i

    for member, first in _same_keys(members):
        parent[root(positions[member])] = root(positions[first])
    for left, right, _ in pairs:
        parent[root(left)] = root(right)
    for item in late:
        root(place[item.into])
    names: dict[int, Record] = {}
    for position, record in zip(positions, members, strict=True):
        if position in parent:
            named = names.setdefault(root(position), record)
            if record.group < named.group:
                names[root(position)] = record
    return [names[root(position)] if position in parent else record for position, record in enumerate(records)]


def _same_keys(members: list[Record]) -> Iterator[tuple[int, int]]:
    """(position, first position) of those that share a prompt or a group_id with an earlier one."""
    prompts, groups, grouped = Digests(), Digests(), array("q")
    for position, record in enumerate(members):
        prompts.add(_folded(record.prompt))
        if record.group_id is not None:
            groups.add(record.group_id)
            grouped.append(position)
    for digests, of in ((prompts, range(len(members))), (groups, grouped)):
        first = firsts(digests.keys())
        for place in np.flatnonzero(first != np.arange(len(first))).tolist():
            yield of[place], of[int(first[place])]


def _shared_ends(texts: Iterable[str]) -> tuple[str, str]:
    """What all texts begin with, and what all of the rest end with."""
    begin = end = None
    shortest = 0
    for text in texts:
        if begin is None or end is None:
            begin = end = text
            shortest = len(text)
        if not text.startswith(begin):
            begin = os.path.commonprefix([begin, text])
        if not text.endswith(end):
            end = os.path.commonprefix([end[::-1], text[::-1]])[::-1]
        shortest = min(shortest, len(text))
    begin, end = begin or "", end or ""
    return begin, end[max(0, len(end) - (shortest - len(begin))) :]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _length(record: Record) -> int:
    return sum(len(turn["content"]) for turn in record.messages)


def _rank(records: list[Record], position: int) -> tuple[int, int]:
    return (-_length(records[position]), position)
