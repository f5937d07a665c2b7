"""Texts -> pairs of near-duplicates, by MinHash and banding, each pair verified by the exact Jaccard similarity.

Signature: 4 independent hashes, each with 32 bins; a bin holds the least value that falls into it (one permutation
hashing: Li, Owen and Zhang 2012), an empty bin borrows from the next (Shrivastava and Li 2014). Bands: 32 of four
values, one of each hash; texts that share a band are candidates, each with its two predecessors and the first of its
kind (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4). A candidate pair whose signatures agree in less
than two thirds of what the threshold asks is dropped, the others are compared shingle by shingle.

Texts of fewer than 8 shingles are never near-duplicates: too little of them is left to tell by. The pairs do not
depend on the order of the texts' files when the caller sorts the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metier.data.partitions import Workers, parts
from metier.data.shingles import MIN_SHINGLES, Batch, Hashes, Ints, Template, batches, distinct, mixed, shingle_hashes
from metier.data.spool import Rows

HASHES, BINS = 4, 32
BITS = 5  # of a bin's number
# What is verified at once: so many pairs, and so many characters of their texts, which become 8 bytes each.
PAIRS_AT_ONCE, CHARS_AT_ONCE = 4096, 2**21
_EMPTY = np.uint32(0xFFFFFFFF)
_ODD = np.array([0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Verified pairs: left < right, positions among the texts, and their Jaccard similarity in [0, 1]; each [p]."""

    left: Ints
    right: Ints
    similarity: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.left)


def near_duplicates(
    texts: Sequence[str],
    template: Template | None = None,
    *,
    threshold: float,
    seed: int = 0,
    sides: NDArray[np.int8] | None = None,
    workers: Workers | None = None,
    folder: Path | None = None,
) -> Pairs:
    """All pairs found whose shingles have a Jaccard similarity of at least `threshold`.

    `template` is what is left out of the comparison; absent, what many of the texts share. `sides`: [n], a number for
    each text; then only pairs whose numbers differ are looked for. `workers` make the signatures; absent, this process.
    Signatures and bands, 768 bytes a text, are in unnamed files in `folder`.
    """
    template = template or Template(texts)
    signatures, useful = Rows(np.uint32, HASHES * BINS, folder=folder), [np.empty(0, np.int64)]
    bands = [Rows(np.uint64, folder=folder) for _ in range(BINS)]
    first = 0
    for rows, keys, is_useful in (workers or Workers()).map(signature_part, parts(texts), template, seed):
        signatures.append(rows)
        for band, column in zip(bands, keys, strict=True):
            band.append(column)
        useful.append(np.flatnonzero(is_useful) + first)
        first += len(rows)
    left, right = _candidates(bands, np.concatenate(useful), len(texts))
    if sides is not None:
        apart = sides[left] != sides[right]
        left, right = left[apart], right[apart]
    left, right = _agreeing(signatures, left, right, 2 / 3 * threshold)
    return _verified(texts, template, left, right, threshold)


def signature_part(
    texts: Sequence[str], template: Template, seed: int
) -> tuple[NDArray[np.uint32], Hashes, NDArray[np.bool_]]:
    """Of some texts the signatures, [n, 128]; the keys of the bands, [32, m], of the m texts that have enough shingles
    to be compared; and which these are, [n].
    """
    found = [_signatures(template.own(batch), seed) for _, batch in batches(texts)]
    signatures = np.concatenate([one for one, _ in found])
    is_useful = np.concatenate([count for _, count in found]) >= MIN_SHINGLES
    useful = np.flatnonzero(is_useful)
    _fill_empty(signatures, useful)
    keys = np.zeros((BINS, len(useful)), dtype=np.uint64)
    for number in range(HASHES):
        keys = mixed(keys + signatures[useful, number * BINS : (number + 1) * BINS].T + _ODD[number])
    return signatures, keys, is_useful


def _signatures(batch: Batch, seed: int) -> tuple[NDArray[np.uint32], Ints]:
    """([n, 128] least values, [n] number of shingles)."""
    hashes, text = shingle_hashes(batch)
    hashes = hashes ^ mixed(np.full(1, seed, dtype=np.uint64))
    least = np.full(len(batch) * HASHES * BINS, _EMPTY, dtype=np.uint32)
    row = text * (HASHES * BINS)
    for number, odd in enumerate(_ODD):
        bins = (hashes >> np.uint64(number * BITS)) & np.uint64(BINS - 1)
        index = row + bins.astype(np.int64) + number * BINS
        np.minimum.at(least, index, ((hashes * odd) >> np.uint64(32)).astype(np.uint32))
    return least.reshape(len(batch), -1), np.bincount(text, minlength=len(batch))


def _fill_empty(signatures: NDArray[np.uint32], useful: Ints) -> None:
    """Gives every empty bin the value of the next full one, changed by how far it was."""
    for number in range(HASHES):
        columns = signatures[:, number * BINS : (number + 1) * BINS]
        sparse = useful[(columns[useful] == _EMPTY).any(axis=1)]
        block = columns[sparse]
        filled = block.copy()
        for distance in range(1, BINS):
            empty = filled == _EMPTY
            if not empty.any():
                break
            borrowed = np.roll(block, -distance, axis=1)
            fits = empty & (borrowed != _EMPTY)
            filled[fits] = borrowed[fits] + np.uint32(distance * 0x9E3779B1 & 0xFFFFFFFF)
        columns[sparse] = filled


def _candidates(bands: list[Rows], useful: Ints, number: int) -> tuple[Ints, Ints]:
    """Pairs of texts that share a band, each pair once."""
    codes = np.empty(0, np.int64)
    for band in bands:
        key = band.whole()
        order = np.argsort(key, kind="stable")
        ordered, member = key[order], useful[order]
        same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        begins = np.ones(len(ordered), dtype=np.bool_)
        begins[same] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))[same]
        others = (same - 1, np.maximum(same - 2, first), first)
        codes = distinct(np.concatenate([codes, *(_coded(member[other], member[same], number) for other in others)]))
    return codes // max(1, number), codes % max(1, number)


def _coded(one: Ints, other: Ints, number: int) -> Ints:
    """A pair as one number, the smaller position first; repeated ones go at once, to save memory."""
    return distinct(np.minimum(one, other) * number + np.maximum(one, other))


def _agreeing(signatures: Rows, left: Ints, right: Ints, least: float) -> tuple[Ints, Ints]:
    agree = np.zeros(len(left), dtype=np.bool_)
    for start in range(0, len(left), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        one, other = (signatures.take(side[some].tolist()) for side in (left, right))
        agree[some] = (one == other).mean(axis=1) >= least
    return left[agree], right[agree]


def _verified(texts: Sequence[str], template: Template, left: Ints, right: Ints, threshold: float) -> Pairs:
    similarity = np.zeros(len(left))
    start = 0
    while start < len(left):
        asked: dict[int, str] = {}
        chars, stop = 0, start
        while stop < len(left) and (chars < CHARS_AT_ONCE and stop - start < PAIRS_AT_ONCE):
            for member in (int(left[stop]), int(right[stop])):
                if member not in asked:
                    asked[member] = texts[member]
                    chars += len(asked[member])
            stop += 1
        sets = dict(zip(asked, _shingle_sets(list(asked.values()), template), strict=True))
        for pair in range(start, stop):
            one, other = sets[int(left[pair])], sets[int(right[pair])]
            both = np.sort(np.concatenate([one, other]))
            shared = int((both[1:] == both[:-1]).sum())
            similarity[pair] = shared / max(1, len(one) + len(other) - shared)
        start = stop
    kept = similarity >= threshold
    return Pairs(left[kept], right[kept], similarity[kept])


def _shingle_sets(texts: Sequence[str], template: Template) -> Iterator[Hashes]:
    """Each text's shingles, each once."""
    for _, whole in batches(texts):
        batch = template.own(whole)
        hashes, text = shingle_hashes(batch)
        ends = np.cumsum(np.bincount(text, minlength=len(batch)))
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            yield distinct(hashes[start:end])
