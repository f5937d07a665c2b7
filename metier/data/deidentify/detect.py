"""Text -> spans of suspected identifiers: all recognizers over folded text, then one rule for what overlaps.

A name that was found surely is then looked for in the rest of the text (Zhang Wei ... Zhang). Domain terms win over
names, organisations and places found in them. Labels of an earlier pass ([PERSON]) are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from metier.data.deidentify.addresses import find_addresses
from metier.data.deidentify.chinese import find_chinese_names
from metier.data.deidentify.chinese_places import find_organisations, find_places
from metier.data.deidentify.english import companions, find_english, head_after
from metier.data.deidentify.english_places import find_english_places
from metier.data.deidentify.english_words import LETTER
from metier.data.deidentify.lower_case import find_lower_case
from metier.data.deidentify.models import find_with_models, plausible
from metier.data.deidentify.odd_names import find_odd_names, with_initials
from metier.data.deidentify.other_scripts import find_other_scripts
from metier.data.deidentify.patterns import LABEL, find_patterns
from metier.data.deidentify.spans import Span, fold, resolve, unfold

MIN_SCORE = 0.5
SURE = 0.7
NAMED = {"PERSON", "ORGANIZATION", "LOCATION", "TITLE"}
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]{2}")
# A longer text is read in parts, cut between words, so that the work grows with its length and not faster.
PART = 4_000
SHORT = 32
# A run of letters as long as this is no word, and names are not looked for in it.
_NO_WORD = re.compile(f"[{LETTER}'-]{{64,}}")
_ADDRESS_GAP = re.compile(r"[, \n]{1,3}")
_WORD = re.compile(r"[^\W\d_]+")
_EDGE = " \t\n\r,.;:、,。;:\"'"


def detect(text: str, language: str = "auto", more: Sequence[str] = ()) -> list[Span]:
    """Spans in `text`, in order, without overlap, each with a score of at least 0.5.

    `language` is zh, en or auto (by the letters in it; a text with both is read as both). `more` names recognizers
    beside the rules: `rampart`, `presidio`, `presidio:SPACY_MODEL`, `gliner:FOLDER`.
    """
    return detect_together([text], language, more)[0]


def detect_together(texts: Sequence[str], language: str = "auto", more: Sequence[str] = ()) -> list[list[Span]]:
    """The same for the texts of one record: a name that one of them gives away is found in all of them."""
    folded = [fold(text) for text in texts]
    more = tuple(more)
    found = [(_of_short if len(text) <= SHORT else _candidates)(text, language, more) for text, _ in folded]
    names = {name for (text, _), (spans, _) in zip(folded, found, strict=True) for name in _sure_names(text, spans)}
    result = []
    for (text, offsets), (spans, protected) in zip(folded, found, strict=True):
        spans = [s for s in spans + _again(text, names) if not any(a <= s.start and s.end <= b for a, b in protected)]
        apart = [s for s in _trimmed(text, resolve(_trimmed(text, spans))) if s.end - s.start > 1 or s.score >= SURE]
        named = resolve(with_initials(text, [*apart, *companions(text, apart)]))
        result.append(unfold(_whole_addresses(text, named), offsets))
    return result


@lru_cache(maxsize=4096)
def _of_short(text: str, language: str, more: tuple[str, ...]) -> tuple[list[Span], list[tuple[int, int]]]:
    """The same, remembered: labels and short answers come again and again."""
    return _candidates(text, language, more)


def _candidates(text: str, language: str, more: Sequence[str]) -> tuple[list[Span], list[tuple[int, int]]]:
    """Everything that the recognizers see in folded `text`, and the ranges that are protected."""
    has_han = _HAN.search(text) is not None
    has_latin = _LATIN.search(text) is not None
    zh = language == "zh" or (language == "auto" and has_han)
    en = language == "en" or (language == "auto" and has_latin)
    spans: list[Span] = []
    protected: list[tuple[int, int]] = []
    for at, part in _parts(text):
        found, kept = _read(part, zh, en, more)
        spans += [Span(s.start + at, s.end + at, s.entity_type, s.score) for s in found if s.score >= MIN_SCORE]
        protected += [(start + at, end + at) for start, end in kept]
    return spans, protected


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """(offset, part) of at most PART characters, cut after a line, a sentence or a word where there is one."""
    start = 0
    while len(text) - start > PART:
        end = start + PART
        cuts = (text.rfind(mark, start + PART // 2, end) for mark in ("\n", "。", ". ", "，", " "))
        cut = next((c + 1 for c in cuts if c >= 0), end)
        yield start, text[start:cut]
        start = cut
    yield start, text[start:]


def _read(text: str, zh: bool, en: bool, more: Sequence[str]) -> tuple[list[Span], list[tuple[int, int]]]:
    spans, protected = find_patterns(text, "both" if zh and en else "zh" if zh else "en")
    latin = en and _LATIN.search(text) is not None
    marked = find_with_models(text, more, latin=latin) if more else []
    if zh and _HAN.search(text):
        names, terms, cut = find_chinese_names(text)
        found = [*names, *(s for s in marked if _HAN.search(text, s.start, s.end))]
        spans += [s for s in found if s.score >= 0.9 or not _touches(s, terms)]
        spans += [s for s in (*find_places(text), *find_organisations(text, cut)) if not _inside(s, terms)]
    if latin:
        words = _NO_WORD.sub(lambda match: "x" * len(match.group()), text)
        found, terms = find_english(words)
        found += [*find_lower_case(words), *find_english_places(words), *find_odd_names(words)]
        found += plausible(text, (s for s in marked if not _HAN.search(text, s.start, s.end)))
        spans += [s for s in found if s.score >= 0.9 or s.entity_type not in NAMED or not _inside(s, terms)]
        spans += find_addresses(words)
    spans += find_other_scripts(text)
    if "[" in text:
        protected += [match.span() for match in LABEL.finditer(text)]
    return spans, protected


def _inside(span: Span, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= span.start and span.end <= end for start, end in ranges)


def _touches(span: Span, ranges: list[tuple[int, int]]) -> bool:
    return any(start < span.end and span.start < end for start, end in ranges)


def _sure_names(text: str, spans: list[Span]) -> set[str]:
    """The names that were found surely, and in Latin script their parts."""
    names: set[str] = set()
    for span in spans:
        if span.entity_type == "PERSON" and span.score >= SURE:
            value = text[span.start : span.end]
            if _HAN.match(value):
                names |= {value} if len(value) > 1 else set()
            else:
                names |= {
                    part
                    for part in re.split(r"[\s.]+", value)
                    if len(part) > 2 and part[0].isupper() and not part.isupper()
                }
    return names


def _again(text: str, names: set[str]) -> list[Span]:
    """Where `names` stand in the text; Latin ones as whole words."""
    plain = {name for name in names if name.isalpha() and not _HAN.match(name)}
    found = (
        [
            Span(*m.span(), "PERSON", 0.66)
            for m in _WORD.finditer(text)
            if m.group() in plain and not head_after(text, m.end())
        ]
        if plain
        else []
    )
    for name in sorted(names - plain):
        start = text.find(name)
        while start >= 0:
            end = start + len(name)
            around = text[max(0, start - 1) : start] + text[end : end + 1]
            if _HAN.match(name) or not (any(char.isalpha() for char in around) or head_after(text, end)):
                found.append(Span(start, end, "PERSON", 0.66))
            start = text.find(name, end)
    return found


def _whole_addresses(text: str, spans: Iterable[Span]) -> list[Span]:
    """The spans with an address and its towns as one (742 Evergreen Terrace, Springfield), and a name's pieces."""
    whole: list[Span] = []
    for span in spans:
        last = whole[-1] if whole else None
        joins = last and last.entity_type == "ADDRESS" and span.entity_type in ("ADDRESS", "LOCATION")
        pieces = last and last.entity_type == span.entity_type == "PERSON" and last.end == span.start
        if last and pieces and not _HAN.match(text[last.start]):
            whole[-1] = Span(last.start, span.end, "PERSON", max(last.score, span.score))
        elif last and joins and _ADDRESS_GAP.fullmatch(text, last.end, span.start):
            whole[-1] = Span(last.start, span.end, "ADDRESS", max(last.score, span.score))
        else:
            whole.append(span)
    return whole


def _trimmed(text: str, spans: Iterable[Span]) -> Iterator[Span]:
    """The spans without punctuation at their ends; what was nothing else is left out."""
    for span in spans:
        start, end = span.start, span.end
        while start < end and text[start] in _EDGE:
            start += 1
        while end > start and text[end - 1] in _EDGE:
            end -= 1
        if end - start == span.end - span.start:
            yield span
        elif end > start:
            yield Span(start, end, span.entity_type, span.score)
