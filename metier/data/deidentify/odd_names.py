"""Names in Latin script that are written as no sentence writes them -> spans.

CamelCase (JohnSmith) as user names and exports have it; initials with a last name (J. K. Rowe, Rowe J.); who speaks in
a chat (`Anna: where are you`); what a form's label calls a name; and the initials beside a name that was found. A
joined name needs a first and a last name that lists know, or a cue before it; JavaScript, PayPal and MedlinePlus have
neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from metier.data.deidentify.english import cued, head_after, said_after
from metier.data.deidentify.english_words import CAPITAL, LETTER, kind_of, kinds_of_words
from metier.data.deidentify.lexicon import cues, word_set
from metier.data.deidentify.spans import Span

_SMALL = "a-z\u00df-\u00f6\u00f8-\u00ff"
_JOINED = re.compile(rf"(?<![\w.@/-])(?:[A-Z][{_SMALL}]+){{2,4}}(?![\w@]|\.\w|-\w)")
_PART = re.compile(rf"[A-Z][{_SMALL}]+")
_INITIALS = r"[A-Z]\.[ -]?(?:[A-Z]\.[ -]?){0,2}"
_LAST = rf"(?:(?:[Dd]e|[Vv]an|[Vv]on|[Dd]i|[Ll]a|Mc|O') ?)?[{CAPITAL}][{LETTER}'-]+"
_BEFORE = re.compile(rf"(?<![{LETTER}\d.])({_INITIALS})({_LAST})")
_AFTER = re.compile(rf"(?<![{LETTER}\d.-])([A-Z][{LETTER}'-]+),? [A-Z]\.(?:[ -]?[A-Z]\.)?(?= and\b|[,;:)]|\s*$| et al)")
_SPEAKER = re.compile(
    rf"(?:^|\n)(?:[\[(]?\d{{1,2}}:\d{{2}}(?::\d{{2}})?[\])]? ?-? ?)?([{CAPITAL}][{LETTER}'-]+)(?:: (?=\S)| ?[;|/\t])"
)
_INITIAL_BEFORE = re.compile(r"(?<![\w.'-])(?:[A-Z]\. ?){1,3}$")
_INITIAL_AFTER = re.compile(r" (?:[A-Z]\. ){1,2}(?=[A-Z])| [A-Z]\.(?=[,;:)|]|\s*$)")
_ET_AL = re.compile(rf"([{CAPITAL}][{LETTER}'-]+),? et al\b")
_BY = re.compile(r"\b(?i:by|from|with|for|to|and|is) $")
_MONTH = rf"(April|May|June|August)(?: [A-Z]\.)? ([{CAPITAL}][{LETTER}'-]+)(?! [{CAPITAL}\d]|[{LETTER}])"
_NAMED_BY_MONTH = re.compile(rf"(?<![{LETTER}])(?<!\d )(?<!\d[a-z]{{2}} ){_MONTH}")
_DATED = re.compile(r"\b(?i:in|since|until|till|during|last|next|this|early|late|mid|of|every|each|through|the) $")
# A form's own label says that a person's name follows, whatever the words are: Patient Name: april wood
_LABELLED = re.compile(
    rf"(?i:(?:^|[\n;|,{{\"] ?\"?)(?:full )?name|\b(?:patient|client|customer|student|employee|member|applicant|contact|"
    rf"guest|tenant|holder|first|last|full|maiden|given)(?:'?s)?[ _]name)\"?(?: ?[:=|] ?\"?)"
    rf"(?P<name>[{LETTER}][{LETTER}'.-]*(?:,? [{LETTER}][{LETTER}'.-]*){{0,3}})(?=\",|\"?(?: ?[;|\n}}]|\s*$))"
)
_NOBODY = re.compile(r"(?i)(?:unknown|none|n/?a|anonymous|test|required|withheld|not .*|see .*|null|tbd)$")
# What a letter stands behind that is no initial: vitamin C.
_LETTERED = re.compile(
    r"(?i:vitamin|hepatitis|type|plan|group|grade|class|section|part|appendix|option|protein|factor) $"
)


def find_odd_names(text: str) -> Iterator[Span]:
    """Spans of folded `text`."""
    yield from _joined(text)
    yield from _initialed(text)
    for match in _LABELLED.finditer(text):
        if not _NOBODY.match(match["name"]):
            yield Span(*match.span("name"), "PERSON", 0.9)
    for match in _NAMED_BY_MONTH.finditer(text):
        yield from _by_month(text, match)
    for match in _SPEAKER.finditer(text):
        if kind_of(match.group(1)) == "f":
            yield Span(*match.span(1), "PERSON", 0.66)


def _joined(text: str) -> Iterator[Span]:
    for match in _JOINED.finditer(text):
        parts = _PART.findall(match.group())
        kinds = "".join(kind_of(part) for part in parts)
        if len(parts) < 2 or set(kinds) & set("wmt") or head_after(text, match.end()):
            continue
        first = kinds[0] == "f" or parts[0].lower() in word_set("en_first")
        known = first and all(kinds_of_words().get(part.lower()) for part in parts)
        led = cued(text, match.start())
        by = first and kinds[-1] in "lfb" and _BY.search(text, max(0, match.start() - 6), match.start())
        if led and (first or kinds[-1] in "lf"):
            known = True
        if by or (known and kinds[0] in "flb?" and (led or kinds[0] + kinds[-1] in ("fl", "ff"))):
            yield Span(*match.span(), "PERSON", 0.75)


def _by_month(text: str, match: re.Match[str]) -> Iterator[Span]:
    """April Wood, where no date is spoken of and a person may be."""
    last = match.group(2).removesuffix("'s")
    kind = kind_of(last)
    if kind not in "lfb?w" or _DATED.search(text, max(0, match.start() - 8), match.start()):
        return
    end = match.end(2) - 2 * match.group(2).endswith("'s")
    person = cued(text, match.start()) or said_after(text, end) or re.match(r"\s*(?:$|[,\n<(])", text[end : end + 3])
    if kind in "lf" or (last.lower() in word_set("en_last") and person):
        yield Span(match.start(), end, "PERSON", 0.8)


def _initialed(text: str) -> Iterator[Span]:
    if "." not in text:
        return
    for match in _BEFORE.finditer(text):
        if kind_of(match.group(2)) in "lf?b" and not _no_person(text, match):
            yield Span(match.start(), match.end() - 2 * match.group().endswith("'s"), "PERSON", 0.82)
    for match in _ET_AL.finditer(text) if " et al" in text else ():
        if kind_of(match.group(1)) in "lf?b":
            yield Span(*match.span(1), "PERSON", 0.75)
    for match in _AFTER.finditer(text):
        if kind_of(match.group(1)) in "lf" and not _no_person(text, match):
            yield Span(*match.span(), "PERSON", 0.72)


def _no_person(text: str, match: re.Match[str]) -> bool:
    lettered = _LETTERED.search(text, max(0, match.start() - 12), match.start()) is not None
    return lettered or head_after(text, match.end())


def with_initials(text: str, spans: Iterable[Span]) -> Iterator[Span]:
    """The persons among the spans with the initials beside them; small words that stand alone are left out."""
    spans = sorted(spans)
    small = cues("en_function") | cues("en_scraps")
    taken = {span.start for span in spans} | {span.end for span in spans}
    for span in spans:
        start, end = span.start, span.end
        value = text[start:end]
        apart = not {start - 1, start - 2} & taken or not {end + 1, end + 2} & taken
        if not any(char.isalnum() for char in value) or (span.entity_type == "PERSON" and value in small and apart):
            continue
        if span.entity_type == "PERSON" and text[start].isascii():
            before = _INITIAL_BEFORE.search(text, max(0, start - 9), start)
            if before and not _LETTERED.search(text, max(0, before.start() - 12), before.start()):
                start = before.start()
            after = _INITIAL_AFTER.match(text, end)
            end = after.end() - (after.group().endswith(" ")) if after else end
        yield Span(start, end, span.entity_type, span.score)
