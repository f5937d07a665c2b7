"""Words of another script inside a text in Latin script or Chinese -> spans: Ελένη, Мария, 9 Λήδρας.

In an English or Chinese text a capitalised word in Greek, Cyrillic, Armenian or Georgian letters is a name or a part of
an address nearly always; formulas use single letters. Limits: a text that is mostly in such a script is left alone, and
scripts without capitals (Arabic, Hebrew, Thai, kana, Hangul) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from metier.data.deidentify.spans import Span

_LETTERS = "\u0370-\u03ff\u0400-\u052f\u0531-\u0587\u10a0-\u10ff\u1f00-\u1fff"
_ANY = re.compile(f"[{_LETTERS}]")
_WORD = rf"[{_LETTERS}][{_LETTERS}\u0300-\u036f'.-]*"
_RUN = re.compile(rf"(?:\d{{1,5}}[A-Za-z]?,? )?{_WORD}(?: {_WORD})*(?:,? \d{{1,5}}(?![\w.%]))?")
_SHORT = 3
MOSTLY = 0.85  # of the letters: the text is in that script


def find_other_scripts(text: str) -> Iterator[Span]:
    """Spans of folded `text`: an address where a number stands beside the words, else a person."""
    if text.isascii() or not _ANY.search(text):
        return
    letters = sum(char.isalpha() for char in text)
    if len(_ANY.findall(text)) > MOSTLY * letters:
        return
    for match in _RUN.finditer(text):
        words = re.findall(f"[{_LETTERS}]+", match.group())
        if any(word[0].isupper() and len(word) >= _SHORT for word in words):
            yield Span(*match.span(), "ADDRESS" if re.search(r"\d", match.group()) else "PERSON", 0.6)
