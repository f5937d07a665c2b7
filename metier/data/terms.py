"""The domain's terms in the data, and what they cost in tokens of a base model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import polars

from metier.data.partitions import Workers, parts
from metier.data.records import Record
from metier.domains import Domain

# More tokens than that for a character of Chinese, or for a word of English, and the base hardly knows the language.
MANY_PER_HAN, MANY_PER_WORD = 1.5, 4.0
POOR_IN_CHINESE = (
    "this base writes Chinese in pieces of characters, so that a Chinese record costs more than twice the tokens: a "
    "base trained on Chinese, such as Qwen, needs about 0.7 a character"
)
_HAN = re.compile(r"[\u3400-\u9fff]")


class Span(NamedTuple):
    """Where a term stands in a text, and which of its names."""

    start: int
    end: int
    name: str


def find_terms(domain: Domain, texts: Sequence[str]) -> list[list[Span]]:
    """Every term in every text: whole words, those with capitals inside only as written; they may overlap."""
    names = domain.names()
    if not names:
        return [[] for _ in texts]
    by_lower: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name in names:
        by_lower.setdefault(name.lower(), []).append((name, whole_word(name)))
    likely = polars.Series(texts, dtype=polars.String).str.extract_many(
        names, ascii_case_insensitive=True, overlapping=True
    )
    return [
        [
            Span(*match.span(), name)
            for lower in sorted({candidate.lower() for candidate in candidates})
            for name, pattern in by_lower[lower]
            for match in _matches(pattern, lower, text)
        ]
        for text, candidates in zip(texts, likely.to_list(), strict=True)
    ]


def _matches(pattern: re.Pattern[str], lower: str, text: str) -> Iterator[re.Match[str]]:
    """What `pattern.finditer(text)` finds, faster: the pattern is tried only where its name in small letters stands."""
    lowered = text.lower()
    if len(lowered) != len(text):
        yield from pattern.finditer(text)
        return
    at = lowered.find(lower)
    while at >= 0:
        match = pattern.match(text, at)
        if match:
            yield match
        at = lowered.find(lower, match.end() if match else at + 1)


def coverage(domain: Domain, records: list[Record], workers: Workers | None = None) -> dict[str, Any]:
    """How many of the glossary's terms stand in the records, and how many records hold one.

    Latin names count as whole words; those with capitals inside (CAR, eGFR) only as written.
    """
    texts = (
        ["\n".join(t["content"] for t in record.messages if t["role"] != "system") for record in part]
        for part in parts(records)
    )
    found, count = set[str](), 0
    for names, holding in (workers or Workers()).map(coverage_part, texts, domain):
        found |= names
        count += holding
    known = [not found.isdisjoint((*term.en, *term.zh)) for term in domain.terms]
    missing = [(term.en or term.zh)[0] for term, is_known in zip(domain.terms, known, strict=True) if not is_known]
    return {
        "terms": len(domain.terms),
        "terms_found": sum(known),
        "records_with_a_term": count,
        "terms_missing": missing,
    }


def coverage_part(texts: Sequence[str], domain: Domain) -> tuple[set[str], int]:
    """The terms' names in the texts, and how many texts hold one."""
    spans = find_terms(domain, texts)
    return {span.name for some in spans for span in some}, sum(map(bool, spans))


def token_cost(domain: Domain, encode: Callable[[str], list[int]]) -> list[str]:
    """Sentences on the terms that the base's tokenizer breaks into many tokens, and on the cost of Chinese."""
    costs: dict[str, list[tuple[float, str, int]]] = {"en": [], "zh": []}
    for term in domain.terms:
        for language, names in (("en", term.en), ("zh", term.zh)):
            for name in names:
                size = len(_HAN.findall(name)) if language == "zh" else len(name.split())
                tokens = len(encode(name))
                costs[language].append((tokens / max(1, size), name, tokens))
    said = []
    for language, unit, many in (("en", "word", MANY_PER_WORD), ("zh", "character", MANY_PER_HAN)):
        if not costs[language]:
            continue
        broken = sorted(((share, name, n) for share, name, n in costs[language] if share > many), reverse=True)
        mean = sum(share for share, _, _ in costs[language]) / len(costs[language])
        worst = ", ".join(f"{name} ({n})" for _, name, n in broken[:5])
        said.append(
            f"terms ({language}): {mean:.1f} tokens a {unit}; {len(broken)} of {len(costs[language])} take more than "
            f"{many:g}" + (f": {worst}" if worst else "")
        )
        if language == "zh" and mean > MANY_PER_HAN:
            said.append(POOR_IN_CHINESE)
    return said


def chinese_cost(texts: list[str], encode: Callable[[str], list[int]]) -> list[str]:
    """Sentences on what the Chinese in the texts costs in tokens; none where there is none."""
    chinese = ["".join(_HAN.findall(text)) for text in texts]
    size = sum(map(len, chinese))
    if not size:
        return []
    cost = sum(len(encode(text)) for text in chinese if text) / size
    said = [f"Chinese costs {cost:.1f} tokens a character under this base"]
    return [*said, POOR_IN_CHINESE] if cost > MANY_PER_HAN else said


def whole_word(name: str) -> re.Pattern[str]:
    """Finds a name as a whole word; one with capitals inside (CAR, eGFR) only as written."""
    if not name.isascii():
        return re.compile(re.escape(name))
    flags = 0 if any(c.isupper() for c in name[1:]) else re.IGNORECASE
    return re.compile(f"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", flags)
