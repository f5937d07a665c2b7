"""Texts -> normalised code points, hashed shingles, and the marks of template text; the same for Chinese and English.

Normalised: width and case folded, everything but letters, digits and marks is one space, and beside a Han character
not even that. A shingle is k code points in a row: 2 where a tenth of a text is Han, else 5.

Template text is what stands in many records: a form's boilerplate, a letter's closing. It is found by windows (20
code points, 8 in Chinese texts) that 20 records or 0.1 % of them share, in a sample of at most 5,000 records, and
left out of the comparison, unless a long text holds hardly anything else.

Everything is computed for a few hundred thousand characters at once, in numpy. Limits: characters beyond the basic
plane are compared as they are; folding is one code point to one, so that ligatures stay.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]
Number = TypeVar("Number", np.uint64, np.int64)

SPACE = 32
BATCH_CHARS = 2**18
K_HAN, K_OTHER = 2, 5
WINDOW_HAN, WINDOW_OTHER = 8, 20
HAN_SHARE = 0.1
MIN_SHINGLES = 8
SAMPLE = 5_000
HASHES_AT_ONCE = 2**23
TEMPLATE_RECORDS = 20
TEMPLATE_SHARE = 0.001
# A text of at least that many code points of which less than a tenth is its own is compared whole.
LONG_HAN, LONG_OTHER = 60, 200
OWN_SHARE = 0.1
_BASE = 0x9E3779B97F4A7C15
# A set of hashes is asked through a table of at least so many bits for each, of 128 KiB to 128 MiB.
BITS_EACH = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Some texts in a row: their code points, and where each text begins and ends among these.

    codes: [m]; starts: [n + 1], of which the last is m; is_han: [n], whether Han characters carry the text.
    """

    codes: Codes
    starts: Ints
    is_han: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.is_han)

    def text(self, position: int) -> Codes:
        """The code points of one text."""
        return self.codes[self.starts[position] : self.starts[position + 1]]


def batches(texts: Sequence[str]) -> Iterator[tuple[int, Batch]]:
    """The texts, normalised, a batch at a time; each with the position of its first text."""
    first = 0
    while first < len(texts):
        size, after = 0, first
        while after < len(texts) and (size == 0 or size + len(texts[after]) <= BATCH_CHARS):
            size += len(texts[after])
            after += 1
        yield first, normalise(texts[first:after])
        first = after


def normalise(texts: Sequence[str]) -> Batch:
    """One batch of all `texts`."""
    raw = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    starts = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=starts[1:])
    codes = _fold_table()[np.minimum(raw, 0xFFFF)]
    beyond = raw > 0xFFFF
    codes[beyond] = raw[beyond]
    space, han = codes == SPACE, _is_han(codes)
    # A space is kept between two words alone: not beside Han, not beside a space, not at a text's ends.
    gap = np.ones(len(codes) + 1, dtype=np.bool_)
    gap[1:] = space | han
    gap[starts[:-1]] = True
    codes, starts = _keep(codes, starts, ~(space & gap[:-1]))
    space = codes == SPACE
    after = np.ones(len(codes) + 1, dtype=np.bool_)
    after[:-1] = _is_han(codes)
    after[starts[1:]] = True
    codes, starts = _keep(codes, starts, ~(space & after[1:]))
    counts = np.diff(_summed(_is_han(codes))[starts])
    return Batch(codes, starts, counts > HAN_SHARE * np.diff(starts))


def without(batch: Batch, is_template: NDArray[np.bool_]) -> Batch:
    """The batch without its template text; a long text that is nearly all template stays whole."""
    lengths = np.diff(batch.starts)
    own = np.diff(_summed(~is_template)[batch.starts])
    whole = (lengths >= np.where(batch.is_han, LONG_HAN, LONG_OTHER)) & (own < OWN_SHARE * lengths)
    codes, starts = _keep(batch.codes, batch.starts, ~is_template | np.repeat(whole, lengths))
    return Batch(codes, starts, batch.is_han)


def shingle_hashes(batch: Batch) -> tuple[Hashes, Ints]:
    """(hashes, text): a 64-bit hash of every shingle, and the text it belongs to, in order."""
    hashes, text, _ = _windows(batch, K_HAN, K_OTHER)
    return hashes, text


def window_hashes(batch: Batch, han: int = WINDOW_HAN, other: int = WINDOW_OTHER) -> tuple[Hashes, Ints, Ints]:
    """(hashes, text, position): as `shingle_hashes`, of longer windows, with each one's place in `batch.codes`."""
    return _windows(batch, han, other)


def window_marks(batch: Batch, han: int, other: int) -> tuple[Hashes, Ints]:
    """(marks, text): for every window of that size the least hash of a run of half as many code points in it.

    Equal windows have equal marks, and windows beside each other mostly share one.
    """
    marks, text, _ = _windows(batch, han, other, _least)
    return marks, text


class Known:
    """A set of hashes, sorted, to look others up in: most of those that are not in it fail at a table of bits."""

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes
        bits = min(30, max(20, int(BITS_EACH * len(hashes)).bit_length()))
        self._bits = np.zeros(2 ** (bits - 3), dtype=np.uint8)
        byte, bit = self._slot(hashes)
        np.bitwise_or.at(self._bits, byte, np.left_shift(np.uint8(1), bit))

    def __len__(self) -> int:
        return len(self._hashes)

    def places(self, hashes: Hashes) -> Ints:
        """Where in `hashes` those stand that are in the set, in order."""
        byte, bit = self._slot(hashes)
        hits = np.flatnonzero((self._bits[byte] >> bit) & np.uint8(1))
        return hits[among(hashes[hits], self._hashes)]

    def _slot(self, hashes: Hashes) -> tuple[Ints, NDArray[np.uint8]]:
        byte = (hashes >> np.uint64(3)) & np.uint64(len(self._bits) - 1)
        return byte.astype(np.int64), (hashes & np.uint64(7)).astype(np.uint8)


class Template:
    """The windows that many of `texts` share."""

    def __init__(self, texts: Sequence[str]) -> None:
        step = max(1, -(-len(texts) // SAMPLE))
        sample = texts[::step]
        shared = max(TEMPLATE_RECORDS, int(TEMPLATE_SHARE * len(texts)))
        needed = max(5, -(-shared * len(sample) // max(1, len(texts))))
        often = _frequent_windows(sample, needed)
        # Of these few, each text counts once: the same window twice in one text is no template.
        found = [(np.empty(0, np.uint64), np.empty(0, np.int64))]
        for first, batch in batches(sample):
            hashes, text, _ = window_hashes(batch)
            is_often = among(hashes, often)
            found.append((hashes[is_often], text[is_often] + first))
        hashes, text = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((hashes, text))
        hashes, text = hashes[order], text[order]
        is_new = np.ones(len(hashes), dtype=np.bool_)
        is_new[1:] = (hashes[1:] != hashes[:-1]) | (text[1:] != text[:-1])
        self.known = Known(_frequent(hashes[is_new], needed))

    def mark(self, batch: Batch) -> NDArray[np.bool_]:
        """Which code points stand in a shared window."""
        edges = np.zeros(len(batch.codes) + 1, dtype=np.int32)
        if len(self.known):
            hashes, text, position = window_hashes(batch)
            hits = self.known.places(hashes)
            np.add.at(edges, position[hits], 1)
            np.add.at(edges, position[hits] + np.where(batch.is_han[text[hits]], WINDOW_HAN, WINDOW_OTHER), -1)
        return np.cumsum(edges[:-1]) > 0

    def own(self, batch: Batch) -> Batch:
        """What is each text's own."""
        return without(batch, self.mark(batch)) if len(self.known) else batch


def _is_han(codes: Codes) -> NDArray[np.bool_]:
    return (codes >= 0x3400) & (codes <= 0x9FFF) | (codes >= 0x20000) & (codes <= 0x3FFFF)


def _keep(codes: Codes, starts: Ints, kept: NDArray[np.bool_]) -> tuple[Codes, Ints]:
    return codes[kept], _summed(kept)[starts]


def _summed(flags: NDArray[np.bool_]) -> Ints:
    """[m + 1]: how many flags are set before each position."""
    sums = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=sums[1:])
    return sums


def distinct(values: NDArray[Number]) -> NDArray[Number]:
    """Each value once, sorted: by sorting `values` themselves, which is faster than numpy's table and needs no copy."""
    values.sort()
    is_new = np.ones(len(values), dtype=np.bool_)
    is_new[1:] = values[1:] != values[:-1]
    return values[is_new]


def among(hashes: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Which of `hashes` are among `known`, which are sorted."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: NDArray[np.bool_] = known[places] == hashes
    return found


def _frequent_windows(texts: Sequence[str], times: int) -> Hashes:
    """The windows that stand at least so many times in the texts, sorted; some at a time, by their last bits."""
    shares = 1 + sum(map(len, texts)) // HASHES_AT_ONCE
    found = [np.empty(0, np.uint64)]
    for share in range(shares):
        whole = (window_hashes(batch)[0] for _, batch in batches(texts))
        some = [hashes[hashes % np.uint64(shares) == share] for hashes in whole]
        found.append(_frequent(np.concatenate([found[0], *some]), times))
    return np.sort(np.concatenate(found))


def _frequent(ordered: Hashes, times: int) -> Hashes:
    """Those that stand at least so many times among the hashes, which are sorted in place."""
    ordered.sort()
    if len(ordered) < times:
        return ordered[:0]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    counts = np.diff(np.append(starts, len(ordered)))
    return ordered[starts[counts >= times]]


def _windows(
    batch: Batch, han: int, other: int, of: Callable[[Hashes, int], Hashes] | None = None
) -> tuple[Hashes, Ints, Ints]:
    """(hashes, text, position) of all windows, `han` or `other` code points long as the text is.

    `of` makes the hashes of all windows of one size; absent, `_rolling`.
    """
    of = of or _rolling
    is_han, codes = batch.is_han, batch.codes.astype(np.uint64)
    lengths = np.diff(batch.starts)
    counts = np.maximum(lengths - np.where(is_han, han, other) + 1, 0)
    if not counts.sum():
        return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
    begins = np.ones(len(codes), dtype=np.bool_)
    for size, some in ((han, is_han), (other, ~is_han)):
        # No window of this text begins at its last places.
        late = batch.starts[1:][some, None] - np.arange(1, size)
        begins[np.maximum(late, batch.starts[:-1][some, None])[lengths[some] > 0]] = False
    position = np.flatnonzero(begins)
    if is_han.all():
        hashes = of(codes, han)[position]
    elif not is_han.any():
        hashes = of(codes, other)[position]
    else:
        chosen = np.repeat(is_han, counts)
        hashes = np.empty(len(position), np.uint64)
        hashes[chosen] = of(codes, han)[position[chosen]]
        hashes[~chosen] = of(codes, other)[position[~chosen]]
    return mixed(hashes), np.repeat(np.arange(len(batch)), counts), position


def _rolling(codes: Hashes, size: int) -> Hashes:
    """Polynomial hashes of all windows of `size` code points, by doubling; [max(1, m - size + 1)]."""
    if len(codes) < size:
        return np.zeros(1, np.uint64)
    done, hashes, base = 1, codes + np.uint64(1), _BASE
    for bit in bin(size)[3:]:
        hashes = hashes[:-done] * np.uint64(base) + hashes[done:]
        done, base = 2 * done, base * base % 2**64
        if bit == "1":
            hashes = hashes[:-1] * np.uint64(_BASE) + (codes[done:] + np.uint64(1))
            done, base = done + 1, base * _BASE % 2**64
    return hashes


def _least(codes: Hashes, size: int) -> Hashes:
    """The least hash of the runs of half the size in each window; [max(1, m - size + 1)]."""
    if len(codes) < size:
        return np.zeros(1, np.uint64)
    half = (size + 1) // 2
    least, done, whole = mixed(_rolling(codes, half)), 1, size - half + 1
    while done < whole:
        step = min(done, whole - done)
        least = np.minimum(least[:-step], least[step:])
        done += step
    return least


def mixed(hashes: Hashes) -> Hashes:
    """Every bit of the result depends on every bit of the hash (the finaliser of splitmix64, Steele et al. 2014)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


@functools.cache
def _fold_table() -> Codes:
    """Each code point of the basic plane -> its folded form, or a space."""
    table = np.empty(0x10000, dtype=np.uint32)
    for code in range(0x10000):
        folded = unicodedata.normalize("NFKC", chr(code)).casefold()
        one = folded if len(folded) == 1 else chr(code)
        is_text = one.isalnum() or unicodedata.category(one)[0] == "M"
        table[code] = ord(one) if is_text else SPACE
    return table
