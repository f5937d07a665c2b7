"""English names, organisations and places -> spans; other languages in Latin script as far as the same marks carry.

A run of capitalised words is read word by word: first name, last name, everyday word, medicine's word, place, or
unknown. Titles, cue words, name lists and what follows (`disease`, `Inc`, `said`) decide. Word lists: lists/README.md.
Limits: names in lower case are lower_case.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from metier.data.deidentify.english_words import CAPITAL, LETTER, kind_of, kinds_of_words, terms
from metier.data.deidentify.lexicon import cues, word_set
from metier.data.deidentify.spans import Span

HAS_CAPITAL = re.compile(f"[{CAPITAL}]")
WORD = re.compile(rf"(?<![0-9{LETTER}])[{LETTER}]+(?:['-][{LETTER}]+)*(?![0-9{LETTER}])")
_ORG_MORE = re.compile(r"(?:\.?,? ?(?:& )?(?:Co|KGaA|KG|OHG|OG|GesbR|mbH|Inc|Ltd|LLC|LLP|S\.?A|AG)\b\.?)+")
_ORG_CUES = re.compile(
    r"\b(?:work(?:s|ed|ing)? (?:at|for|with)|employ(?:ed|er|ee)s? (?:by|at|of|is|:)|job at|position at|"
    r"hired by|office(?:s)? of|CEO of|founder of|director of|manager at|president of|chairman of|"
    r"shares? (?:of|in)|stock (?:of|in)|invest(?:ed|ing)? in|acquired by|merger with|company called|"
    r"company named|account (?:at|with)|customer of|client of|products? (?:of|from)|joined|"
    r"contract with) $",
    re.IGNORECASE,
)
_BEFORE = re.compile(
    r"(?:\b(?:pt|name is|named|name's|I'm|I am|this is|it's|called|call me|signed|sincerely|regards|cheers|"
    r"thanks|thank you|thx|best|dear|hi|hello|hey|attn|attention|contact|contact person|patient|client|"
    r"customer|student|teacher|employee|"
    r"nurse|tutor|pupil|coach|trainer|lecturer|trustee|reviewer|signature|present|absent|witnesses|doctor|physician|surgeon|attorney|lawyer|tenant|landlord|guarantor|borrower|beneficiary|"
    r"applicant|witness|plaintiff|defendant|author|authors|spoke (?:with|to)|talk(?:ed|ing)? (?:with|to)|"
    r"met(?: with)?|ask(?:ed)?|tell|told|call(?:ed)?|saw|seen|visited|married|thanked|treated|helped|examined|"
    r"email(?:ed)?|text(?:ed)?|invite[ds]?|wife|husband|spouse|mother|father|mom|dad|son|daughter|brother|"
    r"sister|friend|partner|boss|colleague|neighbor|cousin|fianc[eé]e?|girlfriend|boyfriend|by|from|to|"
    r"with|between|and|for|seen by|referred by|written by|discussed with|cc|owner|holder|cardholder|"
    r"passenger|driver|recipient|sender|name|full name|first name|last name|surname|payee|ms|mr|mrs|"
    r"dr)[:,]?[ \n\"'(-]{1,3})$",
    re.IGNORECASE,
)
_IN = re.compile(r"\b(?:in|near|from|to|at|visit|visiting|around|outside|for|of) $")
_WEAK = re.compile(
    r"\b(?:by|from|to|with|between|and|for|thanks|best|it's|call(?:ed)?|attention)[:,]?[ \n\"'(-]{1,3}$", re.IGNORECASE
)
# What ends a company's name and nothing else's.
COMPANY_FORMS = {
    "inc", "llc", "llp", "ltd", "limited", "corp", "corporation", "plc", "gmbh", "ag",
    "sons", "pty", "bv", "nv", "ohg", "mbh", "kg", "co",
}  # fmt: skip
_THING = re.compile(
    r"\b(?i:product|drug|file|brand|company|course|generic|medicine|item|field|host|table|trade)[ _](?i:names?)[:=]? ?$"
)
SURE_BESIDE = 0.6
_FAR_HEAD = re.compile(
    r"(?:[ -][a-z-]+(?:al|ar|ic|ive|ous|ary|oid|age|ray|type|plus|optic)){0,3} (?:[a-z-]*(?:osis|oses|itis|opathy|oma|"
    r"emia|trophy|plasia|asia|palsy|algia|penia)|syndrome|disease|disorder|deficiency|ataxia|tumou?r|gangrene|complex|"
    r"atresia)s?\b"
)
_ARTICLE = re.compile(r"\b(?:an?|the) $", re.IGNORECASE)
_DETERMINED = re.compile(
    rf"(?:\b(?i:an?|the|my|your|our|his|her|their|its|this|that|these|no|any|every|each)|[{CAPITAL}][{LETTER}'-]*) $"
)
_BESIDE_BEFORE = re.compile(rf"(?<![{LETTER}.-])([A-Z][a-z\u00df-\u02af\u1e00-\u1eff'-]+)(?:,? and| or| &) $")
_BESIDE_AFTER = re.compile(rf"(?:,? and| or| &) ([A-Z][a-z\u00df-\u02af\u1e00-\u1eff'-]+)(?![{LETTER}-]| [A-Z])")
_AFTER = re.compile(
    r"(?: et al\b|'s (?:mother|father|wife|husband|son|daughter|account|email|address|phone|number|report|birthday|"
    r"house|card|office|file|record|records|name|case|order|request|new|old|car)\b|,? (?:said|says|wrote|"
    r"writes|told|asked|asks|called|called|emailed|replied|added|lives|lived|works|worked|was born|is a|"
    r"was a|has been|is my|is the|and I|will be|would like|wants|needs|went|came|reported|complain|"
    r"complained|denies|presented|signed|agreed|paid|owes|joined|speaks|spoke|left|forgot|missed|scored|"
    r"teaches|taught|studied|bought|sold|ordered|requested|claims|claimed|confirmed|refused|suffers|suffered|"
    r"thinks|believes|knows|knew|hopes|likes|loves|sent|drove|resigned|retired|died|moved|married|won|"
    r"MD|M\.D|PhD|RN|Jr|Sr|Esq|III|II)\b|"
    r",? (?:born|aged|age|\d{1,3} years?|DOB|SSN|MRN)\b)"
)


Run = list[re.Match[str]]


def find_english(text: str) -> tuple[list[Span], list[tuple[int, int]]]:
    """Spans of folded `text`, and the ranges of domain terms."""
    protected = [match.span() for match in terms().finditer(text)]
    spans: list[Span] = []
    if not text.islower():
        shouting = text.isupper()
        runs = list(_runs(text))
        calm = not shouting and not any(_capital_for_show(text, word) for run in runs for word in run)
        for run in runs:
            spans.extend(_read_run(text, run, shouting, calm))
    return spans, protected


def companions(text: str, found: list[Span]) -> list[Span]:
    """Names beside sure ones: Frost in `Both Frost and Carter`."""
    taken = [(span.start, span.end) for span in found]
    more = []
    for span in found:
        if span.entity_type != "PERSON" or span.score < SURE_BESIDE:
            continue
        before, after = (
            _BESIDE_BEFORE.search(text, max(0, span.start - 30), span.start),
            _BESIDE_AFTER.match(text, span.end),
        )
        for match in (before, after):
            if match is None or any(a < match.end(1) and match.start(1) < b for a, b in taken):
                continue
            if kind_of(match.group(1)) in "flb?" and not starts_sentence(text, match.start(1)):
                more.append(Span(*match.span(1), "PERSON", 0.6))
                taken.append(match.span(1))
    return more


def _runs(text: str) -> Iterator[Run]:
    """Maximal runs of capitalised words, with lower-case particles (de, van) and `&`, `and` before a capital inside."""
    run: Run = []
    for word in WORD.finditer(text):
        token = word.group()
        gap = text[run[-1].end() : word.start()] if run else ""
        joined = gap in (" ", "-", " & ", "\t", "  ") or (gap == ". " and _may_be_short(run[-1].group())) or gap == "."
        if token[0].isupper():
            if run and not joined:
                yield from _closed(run)
                run = []
            run.append(word)
        elif run and gap in (" ", ". ") and token in cues("en_particles") | {"and", "of"}:
            run.append(word)
        elif run:
            yield from _closed(run)
            run = []
    if run:
        yield from _closed(run)


def _may_be_short(token: str) -> bool:
    return len(token) == 1 or token.lower() in cues("en_titles") or token in ("St", "Jr", "Sr", "Mt")


def _closed(run: Run) -> Iterator[Run]:
    while run and run[-1].group()[0].islower():
        run = run[:-1]
    if run:
        yield run


def _kind_in(text: str, word: re.Match[str], shouting: bool) -> str:
    token = word.group()
    if len(token) == 1 and text[word.end() : word.end() + 1] == ".":
        return "i"
    if token.lower() in cues("en_function") and starts_sentence(text, word.start()):
        return "w"
    return kind_of(token.title() if shouting else token)


def _read_run(text: str, run: Run, shouting: bool, calm: bool) -> Iterator[Span]:
    kinds = [_kind_in(text, word, shouting) for word in run]
    lows = [word.group().lower() for word in run]
    for i in range(1, len(run)):  # Diana Kalvaitis: behind a first name an ending makes no word
        if kinds[i] == "w" and kinds[i - 1] == "f" and lows[i] not in kinds_of_words() and run[i].group()[1:].islower():
            kinds[i] = "?"
    end = _org_end(lows)
    if end is not None:
        first = _org_start(text, run, lows, end)
        if first is not None:
            more = _ORG_MORE.match(text, run[end].end())
            yield Span(run[first].start(), more.end() if more else run[end].end(), "ORGANIZATION", 0.75)
            return
    for i, kind in enumerate(kinds):
        if kind == "t":
            yield from _titled(text, run, kinds, i)
    yield from _names_in(text, run, kinds, shouting, calm)


def _org_end(lows: list[str]) -> int | None:
    return next((i for i in range(len(lows) - 1, -1, -1) if lows[i] in cues("en_organisation_ends") and i > 0), None)


def _org_start(text: str, run: Run, lows: list[str], end: int) -> int | None:
    """Where the organisation's own name begins, or None for one that has none: the National Bank."""
    first = 0
    while first < end and (
        lows[first] in cues("en_organisation_generic")
        or lows[first] in cues("en_no_names")
        or starts_sentence(text, run[first].start())
    ):
        own_line = text[run[first].start() - 1 : run[first].start()] == "\n"
        is_own = kind_of(run[first].group()) in ("l?fb" if own_line else "l?f")
        if is_own and lows[first] not in cues("en_organisation_generic"):
            break
        first += 1
    own = [
        low
        for low in lows[first:end]
        if low not in cues("en_organisation_generic") and low not in cues("en_organisation_ends")
    ]
    strong = lows[end] in COMPANY_FORMS
    names = [low for low in own if kind_of(low) not in "wm"]
    return first if own and (strong or names) else None


def starts_sentence(text: str, start: int) -> bool:
    """Whether what starts at `start` is a sentence's or a line's first word."""
    before = text[max(0, start - 40) : start].rstrip(" \"'(")
    return not before or before[-1] in ".!?\n:"


def _titled(text: str, run: Run, kinds: list[str], i: int) -> Iterator[Span]:
    """What stands after a title is a name, even if it is a word too: Mr. Baker."""
    last = i
    if run[i + 1 : i + 2] and run[i + 1].group()[0].islower() and not _is_particle(run, i + 1):
        return  # Mr and Mrs
    while last + 1 < len(run) and last - i < 3 and (kinds[last + 1] not in "wm" or last == i):
        if kinds[last + 1] == "m" and run[last + 1].group().lower() in kinds_of_words():
            break
        last += 1
    if kinds[min(last, len(run) - 1)] in ("t",) or last == i:
        return
    if head_after(text, run[last].end()):
        return
    yield Span(run[i + 1].start(), without_s(run[last]), "PERSON", 0.93)


def _capital_for_show(text: str, word: re.Match[str]) -> bool:
    """Whether an everyday word has a capital inside a sentence, as titles and products have: Savings Account."""
    token = word.group()
    plain = len(token) > 1 and not token.isupper() and token.lower() not in cues("en_no_names")
    return token[0].isupper() and plain and not starts_sentence(text, word.start()) and kind_of(token) in "wm"


def _names_in(text: str, run: Run, kinds: list[str], shouting: bool, calm: bool) -> Iterator[Span]:
    """Names in a run: stretches of name-like words, judged by their kinds and by what stands around them."""
    i = 0
    if len(run) > 1 and "f" not in kinds and head_after(text, run[-1].end()) and not cued(text, run[0].start()):
        return  # Lopes Gorlin syndrome
    while i < len(run):
        if kinds[i] not in "flb?ci":
            i += 1
            continue
        if (
            kinds[i] == "b"
            and starts_sentence(text, run[i].start())
            and "f" in kinds[i + 1 : i + 2]
            and len(run) > i + 2
        ):
            i += 1  # Student Brenda Martinez
        j = i
        while j + 1 < len(run) and (kinds[j + 1] in "flb?ci" or _is_particle(run, j + 1)):
            j += 1
        stretch = "".join(kinds[i : j + 1])
        score = _score(text, run[i : j + 1], stretch, shouting, calm)
        if score >= 0.5:
            kind = "LOCATION" if set(stretch) == {"c"} else "PERSON"
            yield Span(run[i].start(), without_s(run[j]), kind, score)
        i = j + 1


def _is_particle(run: Run, i: int) -> bool:
    return run[i].group().lower() in cues("en_particles") and i + 1 < len(run)


def _score(text: str, stretch: Run, kinds: str, shouting: bool, calm: bool) -> float:
    if head_after(text, stretch[-1].end()) or (len(stretch) == 1 and _is_code(stretch[0].group(), shouting)):
        return 0.0
    start, end = stretch[0].start(), without_s(stretch[-1])
    before = _BEFORE.search(text[max(0, start - 30) : start])
    strong = cued(text, start)
    after = _AFTER.match(text, end) is not None
    names = sum(kind in "fl?" for kind in kinds)
    evidence = 0.3 * strong + 0.15 * (before is not None) + 0.2 * after
    evidence += 0.15 * (kinds == "b" and after and text.startswith("'s", end))
    only = stretch[0].group() if len(stretch) == 1 else ""
    if only.lower() in cues("en_function") or (only in word_set("en_countries") and not strong):
        return 0.0
    if kinds == "b" and not strong and text.startswith(":", end):
        return 0.0  # a label: Price: 5
    if len(kinds.replace("i", "")) >= 2:
        if shouting and "f" not in kinds:
            return 0.2
        has_first = kinds[0] == "f" or (kinds[0] == "b" and stretch[0].group().lower() in word_set("en_first"))
        base = 0.85 if has_first and names else 0.6 if names >= 2 else 0.45 if has_first else 0.3
        if starts_sentence(text, stretch[0].start()) and kinds[0] == "b" and kinds.count("b") == len(kinds):
            base -= 0.2
        return min(base + evidence, 0.95)
    if kinds.endswith("i") or kinds.startswith("i"):
        return 0.55 if names else 0.3
    if shouting:
        return 0.6 if kinds == "f" and strong else 0.2
    place = _IN.search(text[max(0, start - 14) : start]) is not None
    evidence += 0.14 * (place and kinds in "l?c")
    evidence += 0.1 * (kinds == "?" and stretch[0].group().endswith(tuple(cues("en_town_ends"))))
    evidence += 0.3 * (_ORG_CUES.search(text[max(0, start - 24) : start]) is not None)
    evidence += 0.12 * ("-" in stretch[0].group() and kinds == "l")
    base = {"f": 0.55, "l": 0.45, "?": 0.46, "b": 0.15, "c": 0.5}.get(kinds, 0.0)
    first = starts_sentence(text, start) and not text[:start].endswith(": ")
    if first and not strong:
        base -= 0.12
    plain = kinds == "b" and calm and only.lower() not in word_set("en_eponyms") and not starts_sentence(text, start)
    if plain and not _DETERMINED.search(text[max(0, start - 20) : start]):
        base = 0.52  # mixed up with Snow: where no word has a capital for show, one that may be a name is one
    if kinds == "l" and not evidence and _is_plural(only):
        base -= 0.3
    if not evidence and _ARTICLE.search(text[max(0, start - 8) : start]):
        base -= 0.1
    return min(base + evidence + (0.05 if kinds in "l?" and not first else 0), 0.9)


def _is_plural(word: str) -> bool:
    """Whether a last name is an everyday word's plural too: Bonds, Staples."""
    return word.endswith("s") and kinds_of_words().get(word[:-1].lower()) == "w"


def _is_code(word: str, shouting: bool) -> bool:
    """BRCA, eGFR, McDonald is none: several capitals and no vowel-like rest make a code."""
    return not shouting and len(word) > 1 and word.isupper()


def cued(text: str, start: int) -> bool:
    """Whether what stands before `start` announces a name, and nothing but a name: `tell`, `patient`."""
    before = text[max(0, start - 30) : start]
    return _BEFORE.search(before) is not None and not _WEAK.search(before) and not names_a_thing(text, start)


def names_a_thing(text: str, start: int) -> bool:
    """Whether a label before `start` announces the name of something that is no person: Drug name:"""
    return _THING.search(text, max(0, start - 20), start) is not None


def said_after(text: str, end: int) -> bool:
    """Whether what people say and have stands at `end`: called, 's account."""
    return _AFTER.match(text, end) is not None


def head_after(text: str, end: int) -> bool:
    """Whether what an eponym is followed by stands at `end`: disease, score."""
    if text[end - 2 : end] in ("'s", "'S") and _AFTER.match(text, end - 2):
        return False  # Lopez's number
    follow = re.match(rf"('s|s')?[ -]([{LETTER}]+)", text[end : end + 40])
    if _FAR_HEAD.match(text, end):  # Fukuyama congenital muscular dystrophy
        return True
    if follow is None or follow.group(2).lower() not in cues("en_heads"):
        return False
    owned = follow.group(1) or text[end - 2 : end] in ("'s", "'S")
    return not (owned and follow.group(2).lower() in cues("en_owned"))  # Scott's fever is Scott's


def without_s(word: re.Match[str]) -> int:
    """Where a word ends without its possessive."""
    return word.end() - 2 if word.group().endswith(("'s", "'S")) else word.end()
