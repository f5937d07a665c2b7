"""Spans, the rule for overlapping ones, and text folded so that every offset leads back to the input.

Folding makes full-width characters, other scripts' digits, odd spaces and dashes plain, one code point to one, and
leaves out zero-width characters; a map of offsets exists only where something was left out.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple


class Span(NamedTuple):
    """A suspected identifier: text[start:end] of the input (code points), its type, and how sure (0 to 1)."""

    start: int
    end: int
    entity_type: str
    score: float


# Zero-width and bidirectional marks, soft hyphens, variation selectors.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufe00-\ufe0f\ufeff]"
)


@cache
def _table() -> dict[int, str]:
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    table |= dict.fromkeys((0x00A0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000), " ")
    table |= dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xFE58, 0xFE63), "-")
    table |= {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x30FB: "·", 0x2022: "·", 0x2027: "·"}
    for code in range(0x660, 0x1E950):  # Arabic-Indic to Adlam digits
        if unicodedata.category(chr(code)) == "Nd" and chr(code) > "\xff":
            table[code] = str(unicodedata.digit(chr(code)))
    return table


def fold(text: str) -> tuple[str, list[int] | None]:
    """The folded text, and each of its characters' offset in `text` (None: the same)."""
    if text.isascii():
        return text, None
    folded = text.translate(_table())
    if not _INVISIBLE.search(folded):
        return folded, None
    offsets = [i for i, char in enumerate(folded) if not _INVISIBLE.match(char)]
    return "".join(folded[i] for i in offsets), offsets


def whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """The range grown to whole words; Flores-Kidd is one."""
    while start > 0 and text[start].isalnum() and (text[start - 1].isalnum() or _hyphen(text, start - 1)):
        start -= 1 if text[start - 1].isalnum() else 2
    while end < len(text) and text[end - 1].isalnum() and (text[end].isalnum() or _hyphen(text, end)):
        end += 1 if text[end].isalnum() else 2
    return start, end


def _hyphen(text: str, i: int) -> bool:
    return text[i] == "-" and text[i - 1 : i].isalpha() and text[i + 1 : i + 2].isalpha()


def unfold(spans: Iterable[Span], offsets: list[int] | None) -> list[Span]:
    """Spans of the folded text as spans of the input."""
    if offsets is None:
        return list(spans)
    return [Span(offsets[s.start], offsets[s.end - 1] + 1, s.entity_type, s.score) for s in spans]


def resolve(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlap, in order. The higher score wins, then the longer span, then the earlier one.

    What sticks out of a beaten span by two characters or more keeps its own type: no part of an identifier is left in
    the open.
    """
    kept: list[Span] = []  # in order of their starts, and apart from each other
    for span in sorted(set(spans), key=lambda s: (-s.score, s.start - s.end, s.start, s.entity_type)):
        pieces = [(span.start, span.end)]
        at = max(0, bisect.bisect_right(kept, span.start, key=_start) - 1)
        while at < len(kept) and kept[at].start < span.end:
            pieces = [p for piece in pieces for p in _minus(piece, kept[at])]
            at += 1
        for start, end in pieces:
            bisect.insort(kept, Span(start, end, span.entity_type, span.score), key=_start)
    return kept


def _start(span: Span) -> int:
    return span.start


def _minus(piece: tuple[int, int], other: Span) -> list[tuple[int, int]]:
    start, end = piece
    if other.end <= start or end <= other.start:
        return [piece]
    return [(a, b) for a, b in ((start, min(end, other.start)), (max(start, other.end), end)) if b - a > 1]
