"""Names and firms without capitals in Latin script -> spans, as people write in chats.

After `my name is` and the like in any text; in a text without a capital also a first and a last name that are no
everyday words, a word with accents that is no English word even without them, and what stands before `llc` or
`street`. Limits: a lone name in plain letters is found behind a cue only.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator

from metier.data.deidentify.english import WORD, cued, head_after, names_a_thing, without_s
from metier.data.deidentify.english_words import LETTER, kind_of, kinds_of_words
from metier.data.deidentify.lexicon import cues
from metier.data.deidentify.spans import Span

_SELF = re.compile(
    rf"\b(?i:my name is|my name's|i am called|name:|named|call me|signed,?|mr\.?|mrs\.?|ms\.?|dr\.?|"
    rf"dear) ((?:[{LETTER}]+(?:['-][{LETTER}]+)*\.?)(?: [{LETTER}]\b\.?)?(?: [{LETTER}]+(?:['-][{LETTER}]+)*)?)"
)
# What ends a firm's name and is no everyday word.
_FIRM_END = re.compile(
    r"\b(?:and sons|llc|llp|inc|ltd|plc|corp|corporation|gmbh|pty|memorial hospital|medical cent(?:er|re)|hospital|"
    r"clinic|group)\b"
)
_STREETS = ("street", "avenue", "road", "boulevard", "lane", "drive", "terrace", "crescent")
_STREET = re.compile(rf"\b([{LETTER}'-]+) (?:{'|'.join(_STREETS)})\b")
_HERE = re.compile(rf"\b(?:[Hh]i|[Hh]ello|[Hh]ey|[Dd]ear)[,!]? ([{LETTER}'-]{{3,}})(?= here\b|,)")
_VERSUS = re.compile(rf"\b([{LETTER}'-]+) vs?\. ([{LETTER}'-]+)")
_PARTNERS = re.compile(rf"\b([{LETTER}'-]+), ([{LETTER}'-]+),? and ([{LETTER}'-]+)\b")
FEW = 0.25  # of an English text's words have accents


def find_lower_case(text: str) -> Iterator[Span]:
    """Names without capitals: after `my name is` and the like, or a first and a last name that are no words."""
    for match in _SELF.finditer(text):
        if names_a_thing(text, match.start(1)):
            continue
        parts = match.group(1).split(" ")
        length, taken = 0, 0
        for part in parts:
            bare = part.rstrip(".")
            plain = "wmt" if taken else "wmtb"
            if (
                bare in ("a", "i")
                or (taken and bare.islower() and not parts[0].islower())  # Mr. Smith denies
                or bare.lower() in cues("en_particles")
                or (len(bare) > 1 and kind_of(bare) in (plain if bare.islower() else "wmt"))
            ):
                break
            length += len(part) + 1
            taken += len(bare) > 1
        if taken:
            end = match.start(1) + length - 1
            yield Span(match.start(1), end - text[end - 1 : end].count("."), "PERSON", 0.85)
    for match in _HERE.finditer(text):
        name = match.group(1)
        if name.islower() and name not in cues("en_function") and kind_of(name.title()) in "flb?":
            yield Span(*match.span(1), "PERSON", 0.6)
    if text.islower():
        found = list(WORD.finditer(text))
        kinds = [kinds_of_words().get(word.group(), "?") for word in found]
        yield from _pairs(text, found, kinds)
        yield from _with_accents(found)
        yield from _after_cues(text, found, kinds)
        yield from _firms(text)


def _pairs(text: str, found: list[re.Match[str]], kinds: list[str]) -> Iterator[Span]:
    for number, (one, two) in enumerate(itertools.pairwise(found)):
        if kinds[number] != "f" or kinds[number + 1] not in "l?f" or text[one.end() : two.start()] != " ":
            continue
        last = two.group()
        verb = last.endswith("s") and kinds_of_words().get(last[:-1]) == "w"  # carrie speaks
        if last not in cues("en_function") and not verb:
            yield Span(one.start(), without_s(two), "PERSON", 0.7)


def _after_cues(text: str, found: list[re.Match[str]], kinds: list[str]) -> Iterator[Span]:
    """A word that is none of the dictionary's, or a name, behind a cue: `tell unni`; both sides of `x v. y`."""
    function = cues("en_function")
    # Most are everyday words of the dictionary: these go at once.
    for word in itertools.compress(found, (kind in "fl?" for kind in kinds)):
        token, start = word.group(), word.start()
        if len(token) < 3 or token in function:
            continue
        if kind_of(token.title()) not in "fl?" or text.endswith("contact ", 0, start):
            continue
        if cued(text, start) and not head_after(text, word.end()):
            yield Span(start, without_s(word), "PERSON", 0.6)
    for match in _VERSUS.finditer(text) if " v" in text else ():
        if kind_of(match.group(1).title()) in "flb?" and kind_of(match.group(2).title()) in "flb?":
            yield Span(*match.span(1), "PERSON", 0.6)
            yield Span(*match.span(2), "PERSON", 0.6)


def _with_accents(found: list[re.Match[str]]) -> Iterator[Span]:
    """Words with accents, where few have them and the plain form is no word: gunārs, but not café."""
    kinds = kinds_of_words()
    accented = [word for word in found if not word.group().isascii()]
    if len(accented) > max(2, FEW * len(found)):
        return
    for word in accented:
        plain = "".join(c for c in unicodedata.normalize("NFD", word.group()) if not unicodedata.combining(c))
        if len(plain) > 2 and kinds.get(word.group(), kinds.get(plain, "?")) not in "wm":
            yield Span(word.start(), without_s(word), "PERSON", 0.6)


def _firms(text: str) -> Iterator[Span]:
    """`odetola llc`, `reed and sons`; `berger, campos and perez`; and a street: `goodwin street`."""
    for match in _FIRM_END.finditer(text):
        before = re.search(rf"(?:([{LETTER}'-]+),? )?([{LETTER}'-]+),? $", text[: match.start()])
        if before and kind_of(before.group(2).title()) in "lf?" and before.group(2) not in cues("en_function"):
            first = before.group(1) or "to"
            own = first not in cues("en_function") and kind_of(first.title()) in "lf?"
            yield Span(before.start(1) if own else before.start(2), match.end(), "ORGANIZATION", 0.7)
    for match in _PARTNERS.finditer(text) if "," in text else ():
        kinds = "".join(kind_of(word.title()) for word in match.groups())
        people = kinds.count("f") > 1 and "l" not in kinds
        if all(kind in "lf?" for kind in kinds) and kinds.count("?") < 2 and not people:
            yield Span(*match.span(), "ORGANIZATION", 0.6)
    for match in _STREET.finditer(text) if any(word in text for word in _STREETS) else ():
        if kind_of(match.group(1).title()) in "lf?" and match.group(1) not in cues("en_function"):
            yield Span(*match.span(), "ADDRESS", 0.6)
