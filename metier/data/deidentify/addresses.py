"""Street addresses in Latin script -> spans: house number and street by their usual words in a dozen languages.

An address that is found takes what follows it along: unit, town, state, postal code and country, over commas and line
ends. After a cue (`I live at`) the rest of the line is read more freely. Limits: a street name without number, suffix
or cue is missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from metier.data.deidentify.english import HAS_CAPITAL
from metier.data.deidentify.english_words import CAPITAL, LETTER
from metier.data.deidentify.lexicon import cues, words
from metier.data.deidentify.spans import Span

_L = LETTER
_CAP = rf"(?!(?:SSN|MRN|DOB|NPI|MBI|VIN|DEA|DL|ID|PIN|IP|TEL|FAX|IBAN|ISIN|ICD|CPT)\b)[{CAPITAL}][{_L}'.-]*"
_DIGIT = re.compile(r"\d")
_NUMBER = r"(?:No\.? ?|#)?\d{1,6}(?:[A-Za-z]\b|[-/]\d{1,4}[A-Za-z]?)?"
_UNIT = (
    r"(?:[, ]+\n?(?i:Apt|Apartment|Suite|Ste|Unit|Flat|Floor|Fl|Room|Rm|Bldg|Building|Dept|Box|"
    r"#)\.? ?#?[A-Za-z]?\d*[A-Za-z]?\b)"
)
_DIRECTION = r"(?:[NSEW]{1,2}\.?|North|South|East|West)"
_TAIL = re.compile(
    rf"{_UNIT}|(?:,[ \n]*|[ \n]*\n[ \n]*)(?:(?:[A-Z]{{1,3}}[- ])?\d{{3,6}}(?:[- ]?\d{{2,4}}|"
    rf"[ ]?[A-Z]{{2}}\b)?(?: {_CAP}(?: {_CAP}){{0,3}})?|{_CAP}(?:[ -](?:{_CAP}|de|la|le|sur|am|an der|upon|"
    rf"en|do|da|dos)){{0,4}})"
    r"(?:,? ?[A-Z]{2,3}\b)?(?:,? \d{3,6}(?:[- ]?\d{2,4}|"
    r" ?[A-Z]{2})?\b)?(?:,? [A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}\b)?(?: / [A-Z]{2}\b| \([A-Z]{2}\))?"
    r"|,? (?i:s/n)\b|,? [A-Z]{2},? \d{5}(?:-\d{4})?\b|,? [A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}\b| \d{4,6}(?:-\d{3,4})?\b"
)
# Where an address ends after a cue: at a word that goes on with the sentence.
_CUE_END = re.compile(
    r"(?:,| and| but| for| on| in| with| by| at| so|\.)? (?:and|but|my|the|please|is|was|since|because|"
    r"for|by|with|which|that|I|he|she|they|we|can|phone|tel|call|email|starting|before|after|until)\b|"
    r" (?:in|since|until) (?:19|20)\d{2}\b|\. |"
    r"\.$|\.\n"
)


def _either(name: str) -> str:
    """The words of a list as alternatives; the first words of streets may have a full stop."""
    dot = r"\.?" if name == "en_street_heads" else ""
    return "|".join(re.escape(word) + dot for word in sorted(cues(name)))


@cache
def _streets() -> re.Pattern[str]:
    ends, glued, heads = (_either(name) for name in ("en_street_ends", "en_street_glued", "en_street_heads"))
    return re.compile(
        rf"(?<![0-9{_L}])(?:{_NUMBER},? (?:{_DIRECTION} )?(?:(?:{_CAP}|\d+(?:st|nd|rd|"
        rf"th)) ){{1,4}}(?:{ends})s?\b\.?(?: {_DIRECTION}\b)?"
        rf"|{_NUMBER},? (?:{heads}) (?:[{_L}'.-]+ ?){{1,5}}(?<! )"
        rf"|(?:{heads}) (?:[{_L}'.-]+ ){{1,5}}?(?:,? ?n?\.? ?)?\d{{1,5}}(?:[/-][A-Za-z0-9]{{1,3}}|[A-Za-z])?\b"
        rf"|(?:{_CAP} ){{0,3}}(?:{_CAP}[ -]?)?[{_L}]*(?:{glued})\b\.? \d{{1,5}}(?: ?[a-zA-Z]\b|[/-]\d+)?"
        rf"|(?:{_CAP} ){{0,3}}{_CAP} \d{{1,4}}(?:[a-zA-Z]|[/-]\d+)?\.?"
        rf"(?=,? ?\n? ?(?:[A-Z]{{1,3}}-)?\d{{2,5}}[- ]?\d{{0,3}} ?[A-Z])"
        rf"|(?:{_NUMBER}),? (?:{_CAP}[ ,]+){{1,3}}(?=\d{{3,6}}\b)"
        rf"|(?:USS|USNS|USNV|USCGC|USNV|CMR) {_CAP}"
        rf"|(?i:P\.? ?O\.? ?Box|Postfach|Apartado|PSC) ?#?\d{{1,6}}(?:,? Box \d+)?|(?i:Unit \d{{1,6}},? Box \d+)"
        rf"|(?:{_CAP} ){{1,3}}(?:Street|Avenue|Road|Boulevard|Lane|Drive|Terrace|Crescent|Parkway)\b(?!\.\w)"
        rf"|(?:{_CAP} )?{_CAP}(?:straße|strasse|gasse|straat|laan|gatan|vägen|gade|vej|katu|utca)\b(?!-)"
        rf"|(?i:Suite|Apt\.?|Apartment|Flat|Studio) \d{{1,5}}[A-Za-z]?\b(?! ?%| percent|[.,]\d)){_UNIT}?"
    )


@cache
def _after_cue() -> re.Pattern[str]:
    heads = _either("en_street_heads")
    return re.compile(
        r"\b(?i:(?:home |mailing |billing |shipping |new |my |our |the )?address(?: is| was| to|:| at)?:?|"
        r"liv(?:e|es|ed|ing) (?:at|on)|resid(?:es|ed|ing|ence) (?:at|on)|located (?:at|on)|"
        r"ship(?:ped)? (?:it )?to|deliver(?:ed|y)? to|send (?:it |this |that )?to|mov(?:ed|ing) to|"
        r"at the corner of)[ \n:]{1,2}"
        rf"(?P<v>(?=[^\n]{{0,70}}\d)(?:\d|{_CAP}|"
        rf"(?:{heads})\b)[^\n?!;\"]{{5,90}}(?:\n[ ]?[^\n?!;\"]{{3,60}}){{0,2}})"
    )


@cache
def _town_zip() -> re.Pattern[str]:
    """Springfield, IL 62704: a town with its state and postal code."""
    states = "|".join(words("en_states"))
    return re.compile(
        rf"(?<![{_L}])(?:{_CAP} ){{0,3}}{_CAP},? (?:{states})(?:,? (?P<z>\d{{5}}(?:-\d{{4}})?))?(?![0-9{_L}:-])"
    )


def find_addresses(text: str) -> Iterator[Span]:
    """Spans of folded `text`: there is none without a digit or a capital."""
    has_digit, has_capital = _DIGIT.search(text) is not None, HAS_CAPITAL.search(text) is not None
    for match in _streets().finditer(text) if has_digit or has_capital else ():
        end, has_number = match.end(), any(char.isdigit() for char in match.group()) or match.group().startswith("US")
        for _ in range(6):
            tail = _TAIL.match(text, end)
            if tail is None or not has_number or text[tail.end() : tail.end() + 1] == ":":
                break
            end = tail.end()
        yield Span(match.start(), end, "ADDRESS", 0.88 if has_number else 0.6)
    for match in _after_cue().finditer(text) if has_digit else ():
        value = match["v"]
        stop = _CUE_END.search(value)
        length = len((value[: stop.start()] if stop else value).rstrip(" ,.\n"))
        if length >= 5 and re.search(r"\d", value[:length]):
            yield Span(match.start("v"), match.start("v") + length, "ADDRESS", 0.7)
    for match in _town_zip().finditer(text) if has_capital else ():
        if match["z"]:
            yield Span(match.start(), match.start("z") - 1, "LOCATION", 0.8)
            yield Span(match.start("z"), match.end("z"), "ZIP_CODE", 0.85)
        else:
            yield Span(match.start(), match.end(), "LOCATION", 0.6)
