"""What stands in the text instead of an identifier: one rule for each operator, and the edit by spans, right to left.

In go the text, its spans, the policy, and for keyed operators the key and the subject (a patient, a customer); out
comes the new text. A value that an earlier pass made is left as it is; only `date_shift` would shift again.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from metier.data.deidentify import surrogates
from metier.data.deidentify.policy import Policy
from metier.data.deidentify.spans import Span, fold

# The three-digit ZIP areas of 20,000 people or fewer, by the counts of 2000 and of 2010.
SMALL_ZIP3 = frozenset(
    (36, 59, 63, 102, 203, 205, 369, 556, 692, 753, 772, 790, 821, 823, 830, 831, 878, 879, 884, 890, 893)
)
MAX_SHIFT_DAYS = 365
_MONTH_NAMES = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_MONTHS = [name[:3].lower() for name in _MONTH_NAMES]
_YEAR = re.compile(r"(?<!\d)(?:1[89]|20)\d{2}(?!\d)|[一二][〇○零一二三四五六七八九]{3}(?=年)")
_YMD = re.compile(r"(\d{4})(\D+)(\d{1,2})(\D+)(\d{1,2})(\D*)")
_MDY = re.compile(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})")
_WORDS = re.compile(r"(?:(\d{1,2})(?:st|nd|rd|th)?[ -])?([A-Za-z]{3,9})\.?[ -](?:(\d{1,2})(?:st|nd|rd|th)?,? )?(\d{4})")


@dataclass(frozen=True, slots=True)
class Context:
    """What keyed operators need: the key, whom the record is about, and the full names in the record."""

    key: bytes = b""
    subject: str = ""
    names: frozenset[str] = field(default_factory=frozenset)


def replace(text: str, spans: Iterable[Span], policy: Policy, context: Context) -> tuple[str, list[tuple[int, int]]]:
    """`text` with every span replaced as the policy says, from right to left, so that offsets hold.

    Also returns where in the new text the stand-ins are, in the order of the spans.
    """
    ordered = sorted(spans)
    new = [stand_in(text[s.start : s.end], s.entity_type, policy, context) for s in ordered]
    for span, value in zip(reversed(ordered), reversed(new), strict=True):
        text = text[: span.start] + value + text[span.end :]
    places, moved = [], 0
    for span, value in zip(ordered, new, strict=True):
        places.append((span.start + moved, span.start + moved + len(value)))
        moved += len(value) - (span.end - span.start)
    return text, places


def stand_in(value: str, entity_type: str, policy: Policy, context: Context) -> str:
    """What stands for one value."""
    operator = policy.operators[entity_type]
    if operator == "drop":
        return ""
    if operator == "mask":
        return "".join("*" if char.isalnum() else char for char in value)
    if operator == "generalise":
        return _generalise(fold(value)[0], entity_type)
    if operator == "date_shift":
        return _shift(fold(value)[0], context) or _label(entity_type)
    if operator == "surrogate":
        return _surrogate(value, entity_type, context)
    return _label(entity_type)


def full_names(values: Iterable[str]) -> frozenset[str]:
    """The names of two words or more, and Chinese ones of two characters or more."""
    return frozenset(value for value in values if " " in value.strip() or re.match("[\u4e00-\u9fff]{2}", value))


def _label(entity_type: str) -> str:
    return f"[{entity_type}]"


def _surrogate(value: str, entity_type: str, context: Context) -> str:
    if entity_type == "PERSON":
        whole = [name for name in context.names if name != value and value in re.split(r"[\s.]+", name)]
        return surrogates.person(value, context.key, whole[0] if len(whole) == 1 else None)
    if entity_type in (
        "ORGANIZATION",
        "ADDRESS",
        "LOCATION",
        "NRP",
        "TITLE",
        "COUNTRY",
        "URL",
        "EMAIL_ADDRESS",
        "DATE",
        "AGE",
    ):
        return _label(entity_type)
    return value if surrogates.is_number(value, context.key) else surrogates.number(value, entity_type, context.key)


def _generalise(value: str, entity_type: str) -> str:
    if entity_type == "DATE":
        year = _YEAR.search(value)
        if year is None and re.fullmatch(r"\d{8}", value):
            return value[:4]
        return _label(entity_type) if year is None else year.group() + ("年" if "年" in value else "")
    if entity_type == "AGE" and value.isdigit():
        age = int(value)
        return "90+" if age >= 90 else f"{age // 10 * 10}-{age // 10 * 10 + 9}"
    if entity_type == "ZIP_CODE" and re.fullmatch(r"\d{5}(?:-\d{4})?", value):
        return "000" if int(value[:3]) in SMALL_ZIP3 else value[:3]
    if entity_type == "ZIP_CODE" and re.fullmatch(r"\d{3}", value):
        return value  # what an earlier pass left
    return _label(entity_type)


def _shift(value: str, context: Context) -> str | None:
    """The date moved by the subject's number of days, written as it was; None for one that is not whole."""
    number = int.from_bytes(surrogates.keyed(context.key, "shift", context.subject)[:4], "big")
    days = datetime.timedelta(days=(number % MAX_SHIFT_DAYS + 1) * (1 if number & 1 << 31 else -1))
    try:
        return shifted(value, days)
    except (ValueError, OverflowError):
        return None


def shifted(value: str, days: datetime.timedelta) -> str | None:
    if match := _YMD.fullmatch(value):
        year, a, month, b, day, c = match.groups()
        new = datetime.date(int(year), int(month), int(day)) + days
        return f"{new.year}{a}{new.month:0{len(month)}d}{b}{new.day:0{len(day)}d}{c}"
    if match := _MDY.fullmatch(value):
        first, mark, second, year = match.groups()
        day_first = int(first) > 12 or mark == "."
        month, day = (second, first) if day_first else (first, second)
        new = datetime.date(int(year), int(month), int(day)) + days
        parts = (new.day, new.month) if day_first else (new.month, new.day)
        return f"{parts[0]:0{len(first)}d}{mark}{parts[1]:0{len(second)}d}{mark}{new.year}"
    if match := _WORDS.fullmatch(value):
        before, name, after, year = match.groups()
        if name[:3].lower() in _MONTHS and (before or after):
            new = datetime.date(int(year), _MONTHS.index(name[:3].lower()) + 1, int(before or after)) + days
            month_name = _MONTH_NAMES[new.month - 1] if len(name) > 4 else _MONTH_NAMES[new.month - 1][:3]
            return f"{new.day} {month_name} {new.year}" if before else f"{month_name} {new.day}, {new.year}"
    return None
