"""patterns.yaml -> spans: numbers and codes by their form and check digit, or by the word that stands before them.

In goes folded text, out come spans, overlapping and unresolved. A pattern runs only where the character that it needs
is there. All cue words of both languages are found in one scan; the value must follow, with at most a few words
such as `number is` between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from metier.data.deidentify.checksums import is_valid
from metier.data.deidentify.lexicon import alternatives
from metier.data.deidentify.spans import Span

LABEL = re.compile(r"\[[A-Z][A-Z_]{2,}\]")  # what an earlier pass left
_DIGIT = re.compile("[0-9]")
_BETWEEN = re.compile(
    r"""[\s:=#,"'()\[\]/-]{0,6}(?:(?:号码|号|编号|为|是|尾号|no\b\.?|number\b|num\b\.?|nr\b\.?|id\b|code\b|is\b|was\b|of\b|with\b|at\b|on\b)[\s:=#"'(]{0,4}){0,3}""",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of patterns.yaml; `entity_type` None protects what it matches."""

    entity_type: str | None
    language: str
    needs: str
    check: str | None
    score: float
    value: re.Pattern[str]


def find_patterns(text: str, language: str) -> tuple[list[Span], list[tuple[int, int]]]:
    """Spans of folded `text`, and the protected ranges; `language` is zh, en or both."""
    spans: list[Span] = []
    protected: list[tuple[int, int]] = []
    has_digit = _DIGIT.search(text) is not None
    for needs, patterns in _shapes(language).items():
        if needs and (not has_digit if needs == "0" else needs not in text):
            continue
        for pattern in patterns:
            for match in pattern.value.finditer(text):
                if pattern.check and not is_valid(pattern.check, match.group()):
                    continue
                if pattern.entity_type is None:
                    protected.append(match.span())
                else:
                    spans.append(Span(*match.span(), pattern.entity_type, pattern.score))
    spans.extend(_after_cues(text, language, has_digit))
    return spans, protected


def _after_cues(text: str, language: str, has_digit: bool) -> Iterator[Span]:
    scan, by_cue = _cues(language)
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)
    if not has_digit and not _wordy_cues(language).search(lowered):
        return
    labels = [match.span() for match in LABEL.finditer(text)] if "[" in text else []
    for match in scan.finditer(lowered):
        start, end = match.span()
        if any(a < end and start < b for a, b in labels):
            continue
        if lowered[end - 1].isascii() and _inside_word(lowered, start, end):
            continue
        end += lowered[end : end + 1] == "s" and lowered[end - 1].isascii()
        between = _BETWEEN.match(text, end)
        after = between.end() if between else end
        for pattern in by_cue[match.group()]:
            if pattern.needs == "0" and not has_digit:
                continue
            value = pattern.value.match(text, after)
            if value and pattern.entity_type and (not pattern.check or is_valid(pattern.check, value.group())):
                yield Span(*value.span(), pattern.entity_type, pattern.score)


def _inside_word(text: str, start: int, end: int) -> bool:
    """Whether a Latin cue is a part of a longer word; a plural is not."""
    before, after = text[start - 1 : start], text[end : end + 2]
    tail = after[1:] if after[:1] == "s" else after[:1]
    return (before.isascii() and before.isalpha()) or (tail.isascii() and tail.isalpha())


@cache
def _entries() -> list[dict[str, Any]]:
    text = resources.files(__package__).joinpath("patterns.yaml").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = yaml.safe_load(text)
    return entries


def _compile(entry: dict[str, Any]) -> Pattern:
    value = entry["value"].replace("{B}", "(?<![0-9A-Za-z])").replace("{E}", "(?![0-9A-Za-z])")
    return Pattern(
        entry["type"], entry.get("language", "any"), entry.get("needs", ""), entry.get("check"), entry["score"],
        re.compile(value),
    )  # fmt: skip


def _speaks(entry: dict[str, Any], language: str) -> bool:
    return language == "both" or entry.get("language", "any") in ("any", language)


@cache
def _shapes(language: str) -> dict[str, list[Pattern]]:
    """The patterns without cues, by the character that they need."""
    shapes: dict[str, list[Pattern]] = {}
    for entry in _entries():
        if "cues" not in entry and _speaks(entry, language):
            shapes.setdefault(entry.get("needs", ""), []).append(_compile(entry))
    return shapes


@cache
def _cues(language: str) -> tuple[re.Pattern[str], dict[str, list[Pattern]]]:
    by_cue: dict[str, list[Pattern]] = {}
    for entry in _entries():
        if "cues" in entry and _speaks(entry, language):
            pattern = _compile(entry)
            for cue in entry["cues"]:
                by_cue.setdefault(cue.lower(), []).append(pattern)
    return re.compile(alternatives(by_cue)), by_cue


@cache
def _wordy_cues(language: str) -> re.Pattern[str]:
    """The cues after which a value without a digit may stand."""
    _, by_cue = _cues(language)
    return re.compile(alternatives(c for c, found in by_cue.items() if any(pattern.needs != "0" for pattern in found)))
