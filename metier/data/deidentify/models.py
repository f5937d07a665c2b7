"""The models beside the rules, and what they take for names and addresses -> spans without everyday words.

A model marks words, each with a probability of being personal; it knows names that no list has, and takes rare words
(dyspnea, thesis) for names. How sure it must be depends on the word: what a dictionary knows, what stands in lower case
beside words with capitals, and what begins a sentence needs more. A number that stands alone is no part of an address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from metier.data.deidentify.english import HAS_CAPITAL, WORD, head_after, said_after, starts_sentence
from metier.data.deidentify.english_words import CAPITAL, LETTER, kind_of, terms
from metier.data.deidentify.gliner import check_gliner, find_gliner
from metier.data.deidentify.lexicon import cues, word_set
from metier.data.deidentify.presidio import check_presidio, find_presidio
from metier.data.deidentify.rampart import check_rampart, find_rampart
from metier.data.deidentify.spans import Span
from metier.errors import RecipeError, did_you_mean

MODELS = ("rampart", "presidio", "gliner")
EVERYDAY = 0.3  # how sure of a name that is a word: Nils, April
FIRST_WORD = 0.55  # and that begins a sentence
SURE_FIRST = 0.97  # and has a small word behind it that is none of what people do: Abnormal findings
NAMES = {"PERSON", "LOCATION", "ORGANIZATION"}
_BEFORE_ADDRESS = re.compile(r"(?:(?i:no)\.? ?)?\d[\d/-]{0,8}[A-Za-z]?,? $")
_AFTER_ADDRESS = re.compile(
    rf",? \d{{1,5}}[A-Za-z]?(?![\w.%])(?:,? [{CAPITAL}][{LETTER}-]+)?|"
    r",? (?i:s/n)\b| / [A-Z]{2}\b| \([A-Z]{2}\)"
)
_BEFORE_TOWN = re.compile(
    r"\b(?:north|south|east|west|new|port|lake|saint|st\.?|mount|fort|san|santa|el|los|las) $", re.IGNORECASE
)
_LOWER_NEXT = re.compile(r" [a-z]+\b")
_LEVEL = re.compile(
    r"(?:[a-z -]*\b(?:level|type|grade|stage|class|phase|chapter|page|step|lesson|part|version|day|week|month)s? ?)?"
    r"(?:\d{1,3}[A-Za-z]?|[IVX]+)|\d+(?:st|nd|rd|th)",
)
_DIGITS = {"LICENSE": 4, "PASSPORT": 4, "BANK_ACCOUNT": 4, "UNIQUE_ID": 3, "ZIP_CODE": 2, "PHONE_NUMBER": 5}
_YEAR = re.compile(r"(?:\S* )?\b(?i:in|since|of|until|before|after) (?:19|20)\d\d")
_NUMBER_CUE = re.compile(
    r"(?:\b(?:no|nos|number|numbers|house|home|apartment|apt|flat|building|unit|suite|room|box|at|door)\b[.:#]? ?|#)$",
    re.IGNORECASE,
)


@cache
def _gap() -> re.Pattern[str]:
    """What may stand between two words of one name or address: John M. de Smith."""
    particles = "|".join(sorted(cues("en_particles")))
    return re.compile(rf"[\s,.'-]{{0,2}}| [A-Z]\.? | (?:[A-Z]\.? )?(?:{particles}) ", re.IGNORECASE)


def check_recognizers(more: Sequence[str]) -> None:
    """Raises `RecipeError` for a name that is none of MODELS, or one whose package or weights are not there."""
    for name in more:
        kind, _, which = name.partition(":")
        if kind == "rampart" and not which:
            check_rampart()
        elif kind == "presidio":
            check_presidio(which)
        elif kind == "gliner":
            check_gliner(which)
        else:
            near = did_you_mean(kind, list(MODELS))
            hint = "there is rampart, presidio, presidio:SPACY_MODEL and gliner:FOLDER"
            raise RecipeError(f"privacy.recognizers: there is no `{name}`{near}", hint=hint)


def find_with_models(text: str, more: Sequence[str], *, latin: bool) -> list[Span]:
    """What the models named by `more` mark in folded `text`; where it has no Latin letters only GLiNER reads it."""
    found = []
    for name in more:
        kind, _, which = name.partition(":")
        if kind == "gliner":
            found += find_gliner(text, which)
        elif latin:
            found += find_rampart(text) if kind == "rampart" else find_presidio(text, which)
    return found


def plausible(text: str, words: Iterable[Span]) -> list[Span]:
    """Spans of what a model found in folded `text`, joined over small gaps; their scores are at least 0.5."""
    mixed = HAS_CAPITAL.search(text) is not None
    kept = [word for word in words if word.score >= _needed(text, word, mixed)]
    spans = [_grown(text, span) for span in _joined(text, kept)]
    if mixed:
        spans = [s for s in spans if s.entity_type != "ADDRESS" or not _everyday(text[s.start : s.end])]
    spans = [s for s in spans if not _no_address(text, s)]
    spans = [s for s in spans if _has_form(text[s.start : s.end], s.entity_type)]
    return [s for s in spans if _may_be(text, s) and (not _is_number(text, s) or _beside_street(text, s, spans))]


def _needed(text: str, word: Span, mixed: bool) -> float:
    """How probable a word must be to count."""
    value = text[word.start : word.end]
    if not value[:1].isalpha() or word.entity_type not in NAMES | {"ADDRESS"}:
        return 0.0
    low = value.lower()
    if low in cues("en_greetings") or low in cues("en_labels"):
        return 2.0
    kind = kind_of(value.title() if value.islower() else value)
    known = kind in "wmt" or low in cues("en_function")
    if value == low:
        if low in cues("en_particles"):
            return 0.0
        if word.entity_type == "ADDRESS":
            return 2.0 if low in cues("en_function") else 0.0
        if mixed:
            return 2.0 if known else 0.9 if kind == "b" else 0.7
        return 0.8 if known else 0.3 if kind == "b" else 0.2
    if starts_sentence(text, word.start):
        if known and _LOWER_NEXT.match(text, word.end) and not said_after(text, word.end):
            return SURE_FIRST
        return FIRST_WORD if known else 0.35 if kind == "b" else 0.0
    return EVERYDAY if known and kind != "b" else 0.0


def _joined(text: str, words: list[Span]) -> Iterator[Span]:
    last: Span | None = None
    for word in sorted(words):
        if last and last.entity_type == word.entity_type and _gap().fullmatch(text[last.end : word.start]):
            last = Span(last.start, max(word.end, last.end), last.entity_type, max(word.score, last.score))
            continue
        if last:
            yield last
        last = Span(word.start, word.end, word.entity_type, max(word.score, 0.5))
    if last:
        yield last


def _grown(text: str, span: Span) -> Span:
    """A town with its `West` or `San`; an address with the number before it, and number, town and province behind."""
    if span.entity_type not in ("ADDRESS", "LOCATION"):
        return span
    start, end = span.start, span.end
    if before := _BEFORE_TOWN.search(text, max(0, start - 8), start):
        start = before.start()
    if before := _BEFORE_ADDRESS.search(text, max(0, start - 14), start):
        start = before.start()
    for _ in range(3):
        if after := _AFTER_ADDRESS.match(text, end):
            end = after.end()
    return Span(start, end, span.entity_type, span.score)


def _may_be(text: str, span: Span) -> bool:
    """Whether a span may be a name: not a term, an eponym of a disease, or everyday words alone."""
    value = text[span.start : span.end]
    if span.entity_type not in NAMES:
        return True
    if head_after(text, span.end) or any(
        m.start() <= span.start and span.end <= m.end() for m in terms().finditer(text)
    ):
        return False
    lower_country = value.title() in word_set("en_countries") and value not in word_set("en_first")
    if value in word_set("en_countries") or lower_country:
        return False
    found = WORD.findall(value)
    if any(char.isdigit() for char in value) or any(kind_of(w) not in "wmt" or w[0].islower() for w in found):
        return True
    return span.score >= EVERYDAY and any(kind_of(w) == "w" and not w.isupper() for w in found)


def _everyday(value: str) -> bool:
    """Whether all of an address are everyday words in lower case, which is none in a text with capitals."""
    return all(word in ("NOS", "NEC") or (word.islower() and kind_of(word.title()) in "wm") for word in value.split())


def _has_form(value: str, entity_type: str) -> bool:
    """Whether a number has the digits, and an address of the net the dot, that its type must have."""
    if entity_type == "URL":
        return "." in value or "://" in value
    if entity_type == "ZIP_CODE" and len(value) < 4:
        return False
    return sum(char.isdigit() for char in value) >= _DIGITS.get(entity_type, 0)


def _no_address(text: str, span: Span) -> bool:
    """Whether a supposed part of an address is a year behind `in`, or labels and small words alone: NAME, where."""
    if span.entity_type not in ("ADDRESS", "ZIP_CODE", "LOCATION"):
        return False
    value = text[span.start : span.end]
    if _YEAR.fullmatch(text, max(0, span.start - 7), span.end) or _YEAR.fullmatch(value):
        return True
    if span.entity_type == "ADDRESS" and _LEVEL.fullmatch(value) and not value.isdigit():
        return True
    words = [word.lower() for word in WORD.findall(value)]
    small = cues("en_labels") | cues("en_function") | cues("en_titles") | cues("en_scraps")
    return bool(words) and not any(char.isdigit() for char in value) and all(word in small for word in words)


def _is_number(text: str, span: Span) -> bool:
    return span.entity_type == "ADDRESS" and text[span.start : span.end].isdigit()


def _beside_street(text: str, span: Span, spans: list[Span]) -> bool:
    """Whether a number has a part of an address, a capital or a word such as `house` beside it."""
    for other in spans:
        gap = 2 if other.entity_type == "PERSON" else 4
        if other is not span and other.start - gap <= span.end and span.start <= other.end + gap:
            return True
    return _NUMBER_CUE.search(text[max(0, span.start - 12) : span.start]) is not None or (
        re.match(rf"[ ,]{{1,2}}[{CAPITAL}][{LETTER}]", text[span.end :]) is not None
    )
