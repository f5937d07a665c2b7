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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metier.data.accounts import Accounts
from metier.data.alike import Digests, Ints, Keys, digest, firsts
from metier.data.dedup import Comparison, Pair, find_pairs, without
from metier.data.lines import Source
from metier.data.partitions import parts
from metier.data.records import Record
from metier.data.shingles import Hashes, Known, Template, batches, distinct, normalise, window_hashes, window_marks
from metier.data.sources import read_rows
from metier.data.split import lots
from metier.recipe import DedupConfig

PASSAGE_HAN, PASSAGE_OTHER = 13, 50
RANK = {"train": 0, "val": 1, "test": 2}
Ranks = NDArray[np.int8]
_NONE = np.empty(0, np.uint64)


def certify(
    accounts: Accounts, made: list[Record], comparison: Comparison, *, config: DedupConfig, seed: int
) -> dict[str, Any]:
    """Takes out what still leaks, and says what was checked and what a split by rows would have leaked.

    `made`: the synthetic records, of which those that leak are removed.
    """
    is_near, threshold = config.near != "ignore", config.threshold
    late: list[Record] = []
    if is_near:
        late = late_leaks([*accounts.records, *made], comparison, threshold=threshold, seed=seed)
        gone = set(late)
        accounts.reject([r for r in late if r.parent is None], "near-duplicate of a held-out record")
        made[:] = [record for record in made if record not in gone] if gone else made
    records = [*accounts.records, *made]
    keys = SplitKeys.of(records)
    is_own = np.array([record.method is None for record in accounts.records] + [False] * len(made), dtype=np.bool_)
    own = [record for record in accounts.records if record.method is None]
    pairs_of_own = without(accounts.records, accounts.pairs, [r for r in accounts.records if r.method is not None])[1]
    ranks = ranks_of(records)
    return {
        "held_out_records": int((ranks > 0).sum()),
        "shared_with_train": overlap(keys, ranks, accounts.pairs),
        "if_split_by_row": overlap(keys.some(is_own), row_split(own, seed), pairs_of_own),
        "near_duplicates_searched": is_near,
        "threshold": threshold,
        "found_late": len(late),
        "test_records_with_a_passage_of_train": shared_passages(records, comparison),
        "passage_chars": {"zh": PASSAGE_HAN, "other": PASSAGE_OTHER},
        "synthetic_of_held_out": sum(r.parent is not None and r.parent.split != "train" for r in made),
    }


def test_leaks(records: list[Record], pairs: list[Pair]) -> dict[str, list[Record]]:
    """What would train on a test file's prompt, group or near-duplicate, by reason."""
    held = [record for record in records if record.source.is_test]
    if not held:
        return {}
    prompts = {digest(record.prompt) for record in held}
    groups = {record.group_id for record in held if record.group_id is not None}
    is_test = [record.source.is_test for record in records]
    near = {a if is_test[b] else b for a, b, _ in pairs if is_test[a] != is_test[b]}
    found: dict[str, list[Record]] = {}
    for position, record in enumerate(records):
        if record.source.is_test:
            continue
        if digest(record.prompt) in prompts:
            found.setdefault("same prompt as a test record", []).append(record)
        elif record.group_id in groups:
            found.setdefault("same group_id as a test record", []).append(record)
        elif position in near:
            found.setdefault("near-duplicate of a test record", []).append(record)
    return found


def benchmark_leaks(records: list[Record], benchmarks: list[Source]) -> dict[str, list[Record]]:
    """The records that hold a passage of a benchmark, or are one of its texts, by the benchmark's name."""
    found: dict[str, list[Record]] = {}
    taken: set[Record] = set()
    for source in benchmarks:
        items = _texts_of(source)
        whole = {normalise([item]).text(0).tobytes() for item in items}
        passages = Passages.of(items)
        hits = []
        for part in parts(records):
            is_shared = passages.shared(["\n".join(turn["content"] for turn in record.messages) for record in part])
            for record, is_hit in zip(part, is_shared.tolist(), strict=True):
                if record not in taken and (is_hit or normalise([record.prompt]).text(0).tobytes() in whole):
                    hits.append(record)
        found[source.name] = hits
        taken.update(hits)
    return found


class Passages:
    """Passages, by their hashes, to look texts up in."""

    def __init__(self, hashes: Hashes) -> None:
        self._known = Known(distinct(hashes))

    @classmethod
    def of(cls, texts: Sequence[str]) -> Passages:
        """Those of texts, without what many of them share."""
        template = Template(texts)
        found = (window_hashes(template.own(batch), PASSAGE_HAN, PASSAGE_OTHER)[0] for _, batch in batches(texts))
        return cls(np.concatenate([_NONE, *found]))

    def shared(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """[n]: which of `texts` hold one of the passages."""
        holds = np.zeros(len(texts), dtype=np.bool_)
        for first, batch in batches(texts):
            hashes, text, _ = window_hashes(batch, PASSAGE_HAN, PASSAGE_OTHER)
            holds[first + text[self._known.places(hashes)]] = True
        return holds


def late_leaks(records: list[Record], comparison: Comparison, *, threshold: float, seed: int) -> list[Record]:
    """Records that are like one further on (train, val, test), found by a search with other hashes.

    Among them are synthetic records that became like a held-out one, and what was made of a record that goes.
    """
    once = [record for record in records if record.method != "repeat"]
    splits = [record.split for record in once]
    gone = {once[i] for i in crossing(splits, find_pairs(once, comparison, threshold, seed=seed + 1, splits=splits))}
    synthetic = [record for record in records if record.parent]
    if synthetic:
        held = {_prompt_and_answer(record) for record in records if record.split != "train"}
        gone |= {record for record in synthetic if _prompt_and_answer(record) in held}
    parents = set(gone)
    return [record for record in records if record in gone or record.parent in parents] if gone else []


def _prompt_and_answer(record: Record) -> bytes:
    return digest(f"{record.prompt}\0{record.answer}")


def crossing(splits: Sequence[str], pairs: Iterable[Pair]) -> set[int]:
    """Of each near-duplicate pair that crosses a split, the record that is further from test."""
    return {
        left if RANK[splits[left]] < RANK[splits[right]] else right
        for left, right, _ in pairs
        if splits[left] != splits[right]
    }


def ranks_of(records: list[Record]) -> Ranks:
    """[n]: how near to test each record is: 0 in train, 1 in val, 2 in test."""
    return np.array([RANK[record.split] for record in records], dtype=np.int8)


@dataclass(frozen=True, slots=True)
class SplitKeys:
    """By what records must not cross a split: digests of prompt and group_id, each [n, 2]; `has_group`: [n]."""

    prompt: Keys
    group_id: Keys
    has_group: NDArray[np.bool_]

    @classmethod
    def of(cls, records: list[Record]) -> SplitKeys:
        prompts, groups, has_group = Digests(), Digests(), bytearray()
        for record in records:
            group_id = record.group_id
            prompts.add(record.prompt)
            groups.add(group_id or "")
            has_group.append(group_id is not None)
        return cls(prompts.keys(), groups.keys(), np.frombuffer(has_group, dtype=np.bool_))

    def some(self, chosen: NDArray[np.bool_]) -> SplitKeys:
        """Those of some of the records."""
        return SplitKeys(self.prompt[chosen], self.group_id[chosen], self.has_group[chosen])


def overlap(keys: SplitKeys, ranks: Ranks, pairs: list[Pair]) -> dict[str, int]:
    """How many val and test records have their like in train (or a test record in val), by kind."""
    held = {b if ranks[a] < ranks[b] else a for a, b, _ in pairs if ranks[a] != ranks[b]}
    return {
        "prompt": _later(keys.prompt, ranks),
        "group_id": _later(keys.group_id[keys.has_group], ranks[keys.has_group]),
        "near_duplicate": len(held),
    }


def _later(keys: Keys, ranks: Ranks) -> int:
    """How many have an equal key of a lesser rank."""
    first = firsts(keys)
    least = ranks.copy()
    np.minimum.at(least, first, ranks)
    return int((least[first] < ranks).sum())


def row_split(records: list[Record], seed: int) -> Ranks:
    """Ranks with the same sizes, drawn row by row: what is usually done, to show what it leaks."""
    sizes = np.bincount(ranks_of(records), minlength=len(RANK))
    drawn = np.empty(len(records), dtype=np.int8)
    drawn[lots(records, seed)] = np.repeat(np.arange(len(RANK), dtype=np.int8)[::-1], sizes[::-1])
    return drawn


def shared_passages(records: list[Record], comparison: Comparison) -> int:
    """How many test records share a passage with a training record."""
    test, train = ([r for r in records if r.split == split and r.method != "repeat"] for split in ("test", "train"))
    return len(_holding(test, _holding(train, test, comparison), comparison))


def _holding(asked: list[Record], others: list[Record], comparison: Comparison) -> list[Record]:
    """Those that hold a passage of the others, template text of these aside.

    Two equal passages have the same mark, the least hash of a part of theirs (minimizers: Roberts et al. 2004). Only
    one in a dozen passages begins another mark, and only passages with a mark of both sides are compared.
    """
    template = comparison.template
    known = Known(distinct(np.concatenate([_NONE, *(marks for _, marks, _ in _marks(others, comparison, template))])))
    near, shared = list[Record](), [_NONE]
    for part, marks, text in _marks(asked, comparison, None):
        places = known.places(marks)
        near += [part[i] for i in distinct(text[places]).tolist()]
        shared.append(distinct(marks[places]))
    known = Known(distinct(np.concatenate(shared)))
    passages = [_NONE]
    for part in parts(others) if near else ():
        for _, batch in batches(list(comparison.texts(part))):
            own = template.own(batch)
            marks = window_marks(own, PASSAGE_HAN, PASSAGE_OTHER)[0]
            passages.append(window_hashes(own, PASSAGE_HAN, PASSAGE_OTHER)[0][known.places(marks)])
    held = Passages(np.concatenate(passages))
    return [
        record
        for part in parts(near)
        for record, is_held in zip(part, held.shared(list(comparison.texts(part))).tolist(), strict=True)
        if is_held
    ]


def _marks(
    records: list[Record], comparison: Comparison, template: Template | None
) -> Iterator[tuple[Sequence[Record], Hashes, Ints]]:
    """Some records, the marks of their passages, and the record of each."""
    texts = (list(comparison.texts(part)) for part in parts(records))
    found = comparison.workers.map(marks_part, texts, template)
    return ((part, *marks) for part, marks in zip(parts(records), found, strict=True))


def marks_part(texts: Sequence[str], template: Template | None) -> tuple[Hashes, Ints]:
    """The marks of the passages in some texts, each once where it stands for several in a row; and the text of each."""
    found = [(_NONE, np.empty(0, np.int64))]
    for first, batch in batches(texts):
        marks, text = window_marks(template.own(batch) if template else batch, PASSAGE_HAN, PASSAGE_OTHER)
        is_new = np.ones(len(marks), dtype=np.bool_)
        is_new[1:] = (marks[1:] != marks[:-1]) | (text[1:] != text[:-1])
        found.append((marks[is_new], text[is_new] + first))
    marks, text = (np.concatenate(some) for some in zip(*found, strict=True))
    return marks, text


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
