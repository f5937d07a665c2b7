"""English titles, towns, countries, nationalities and firms -> spans, by their forms and by lists.

New Tinamouth and Port Karen are towns, Smith, Jones and Brown a firm, and so is what ends in A/S or GmbH.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from metier.data.deidentify.english import HAS_CAPITAL
from metier.data.deidentify.english_words import CAPITAL, LETTER, kind_of, kinds_of_words
from metier.data.deidentify.lexicon import alternatives, cues, words
from metier.data.deidentify.spans import Span

# Smith, Jones and Brown; Smith-Jones is read as a name.
_FIRM = re.compile(
    rf"[A-Z][{LETTER}'-]+(?:, [A-Z][{LETTER}'-]+)+,? (?:and|&) [A-Z][{LETTER}'-]+(?![{LETTER}'-]| [A-Z])"
)
_TOWN = re.compile(
    rf"(?<![{LETTER}.])(?:New|North|South|East|West|Port|Lake|Saint|St\.|Mount|Fort|San|Santa|El|Los|"
    rf"Las) ([A-Z][{LETTER}'-]+)"
)
_CAPITALS = re.compile(rf"(?<![{LETTER}-])([{CAPITAL}'-]{{3,}})(,? )([{CAPITAL}'-]{{3,}})(?: [A-Z]\b)?(?![{LETTER}])")
_VERSUS = re.compile(rf"((?:[A-Z][{LETTER}'-]+ )*[A-Z][{LETTER}'-]+) vs?\. ((?:d[aeu] )?[A-Z][{LETTER}'-]+)")
_FORM = re.compile(
    rf"(?:[A-Z\u00c0-\u00de][{LETTER}'-]+,? (?:& |and |és )?){{1,5}}(?:társa )?"
    rf"(?:A/S|ApS|s\.r\.o|a\.s|j?\.?d\.o\.o|d\.d|HB|KB|z o\.o|Oyj?|AB|ASA?|"
    rf"S\.p\.A|S\.r\.l|SARL|SAS|SA|SL|Kft|Zrt|Nyrt|Kht|Kkt|Bt|B\.V|N\.V|S\.A|S\.L|Ltda|Lda)(?![{LETTER}])\.?"
)
_WORD = re.compile(rf"[{LETTER}]+")
_HONORIFIC = re.compile(
    r"(?<![A-Za-z])(?:(?:Mr|Mrs|Ms|Dr|Prof|Mx)\.|Mrs?|Ms|Miss|Sir|Madame?|Professor|Doctor)(?![A-Za-z])"
    r"|(?:(?<=[a-z] )|(?<=[a-z], ))(?:(?:Jr|Sr|Esq)\b\.?|(?:M\.?D|Ph\.?D|DDS|DVM|RN|II|III|IV)\b\.?)"
)


def find_english_places(text: str) -> list[Span]:
    """Spans of folded `text`."""
    spans: list[Span] = []
    if HAS_CAPITAL.search(text):
        spans += [*_firms(text), *_places_and_cases(text), *_in_capitals(text)]
        spans += [Span(_own_start(match), match.end(), "ORGANIZATION", 0.76) for match in _FORM.finditer(text)]
        spans += [Span(*match.span(), "TITLE", 0.7) for match in _HONORIFIC.finditer(text)]
    if not _country_words().isdisjoint(_WORD.findall(text.lower())):
        spans += [Span(*match.span(), "COUNTRY", 0.7) for match in _countries().finditer(text)]
        spans += [Span(*match.span(), "NRP", 0.7) for match in _nationalities().finditer(text)]
    return spans


@cache
def _country_words() -> frozenset[str]:
    """The first words of countries and nationalities, and their plurals: without one there is none of them."""
    names = (*words("en_countries"), *words("en_nationalities"))
    first = {match.group() for name in names if (match := _WORD.search(name.lower()))}
    return frozenset(word + end for word in first for end in ("", "s", "es"))


def _own_start(match: re.Match[str]) -> int:
    """Where a firm's name begins: behind `From` and the like."""
    first = match.group().split(" ")[0]
    return match.start() + (len(first) + 1 if first.lower() in cues("en_function") else 0)


@cache
def _countries() -> re.Pattern[str]:
    names = alternatives(words("en_countries"))
    return re.compile(rf"(?<![{LETTER}]){names}(?![{LETTER}])", re.IGNORECASE)


@cache
def _nationalities() -> re.Pattern[str]:
    names = alternatives(words("en_nationalities"))
    return re.compile(rf"(?<![{LETTER}]){names}(?:s|es)?(?![{LETTER}])")


def _places_and_cases(text: str) -> Iterator[Span]:
    """New Tinamouth, Port Karen, San Felipe; Romero v. Carpenter."""
    for match in _TOWN.finditer(text):
        if kind_of(match.group(1)) in "flb?c":
            yield Span(*match.span(), "LOCATION", 0.72)
    for match in _VERSUS.finditer(text):
        yield Span(*match.span(1), "PERSON", 0.8)
        yield Span(*match.span(2), "PERSON", 0.8)


def _in_capitals(text: str) -> Iterator[Span]:
    """SANTANA, DEBORAH and DEBORAH SANTANA, as forms write them, where one is a first name and none a word."""
    if text.isupper():
        return
    for match in _CAPITALS.finditer(text):
        pair = [match.group(1).lower(), match.group(3).lower()]
        kinds = [kinds_of_words().get(low, "?") for low in pair]
        first = kinds[1] if "," in match.group(2) else kinds[0]
        if first == "f" and not set(kinds) & {"w", "m"}:
            yield Span(*match.span(), "PERSON", 0.72)


def _firms(text: str) -> Iterator[Span]:
    """Last names that make a firm; where they are first names, a list of people: Anna, Hugo and Melissa."""
    for match in _FIRM.finditer(text) if " and " in text or "&" in text else ():
        names = list(re.finditer(rf"[{CAPITAL}][{LETTER}'-]+", match.group()))
        kinds = [kind_of(name.group()) for name in names]
        if not all(kind in "lfb?c" for kind in kinds):
            continue
        if kinds.count("f") > 1 and "l" not in kinds:
            yield from (Span(match.start() + n.start(), match.start() + n.end(), "PERSON", 0.7) for n in names)
        else:
            yield Span(*match.span(), "ORGANIZATION", 0.72)
