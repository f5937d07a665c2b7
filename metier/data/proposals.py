"""The first rows of a source -> what each column seems to be, with a confidence, for a person to look at.

Proposed are prompt, answer, label, messages, history, system, group_id, date, language and id. By the column's name
alone: 0.9. By its values alone: 0.6 to 0.7, from how many differ, how long they are and what they look like. A column
that the recipe names or that was taken has 1.0. Nothing is decided here: `roles` decides, by names alone.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from metier.data.lines import Source
from metier.data.roles import CONVERSATIONS, GROUPS, HISTORIES, PAIRS, SYSTEMS, TEXTS, Roles
from metier.data.sources import read_rows

SAMPLE_ROWS = 500
BY_NAME, BY_VALUES = 0.9, 0.6
LABELS = ("label", "category", "class", "intent", "sentiment", "标签", "类别", "分类", "情感")
DATES = ("date", "time", "timestamp", "created_at", "日期", "时间", "就诊日期", "交易日期")
LANGUAGES = ("language", "lang", "语言")
IDS = ("id", "index", "idx", "uid", "uuid", "编号", "序号")
_DATE = re.compile(r"(19|20)\d\d([-/.年]\d{1,2}([-/.月]\d{1,2}日?)?|\d{4})([ T]\d{1,2}:\d\d.*)?$")
_ID = re.compile(r"[^\s\u3400-\u9fff]*\d[^\s\u3400-\u9fff]*$")
_HAN = re.compile(r"[\u3400-\u9fff]")
_LANGUAGE = re.compile(r"(zh|en|ja|ko|fr|de|es)([-_]\w+)?$|chinese$|english$|中文$|英文$|汉语$|英语$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Proposal:
    """`role` is None where a column looks like nothing in particular."""

    column: str
    role: str | None
    confidence: float
    by: str  # recipe or rule, name, values


def propose(source: Source, roles: Roles) -> list[dict[str, Any]]:
    """A proposal for each column of a source, in the file's order, as plain values."""
    rows = [row.fields for row in islice(read_rows(source), SAMPLE_ROWS) if row.problem is None]
    columns = dict.fromkeys(name for fields in rows for name in fields)
    taken = roles.columns
    found = []
    for name in columns:
        values = [fields[name] for fields in rows if fields.get(name) not in (None, "")]
        proposal = (
            Proposal(name, taken[name], 1.0, "taken")
            if name in taken
            else _by_name(name) or _by_values(name, values) or Proposal(name, None, 0.0, "values")
        )
        found.append(asdict(proposal))
    return found


def suggest(source: Source) -> str | None:
    """What may be the prompt and what the answer, by a look at the values; None where nothing looks like it."""
    found = propose(source, Roles())
    best: dict[str, dict[str, Any]] = {}
    for role, kinds in (("prompt", ("prompt", "text")), ("answer", ("answer", "label"))):
        fitting = [proposal for proposal in found if proposal["role"] in kinds]
        if not fitting:
            return None
        best[role] = max(fitting, key=lambda proposal: proposal["confidence"])
    prompt, answer = best["prompt"], best["answer"]
    return (
        f"it may be `data: {{prompt: {prompt['column']}, answer: {answer['column']}}}` (confidence "
        f"{prompt['confidence']} by {prompt['by']}, {answer['confidence']} by {answer['by']}): write in the recipe "
        "what it is; `messages:` is for conversations, `text:` for plain text"
    )


def _by_name(name: str) -> Proposal | None:
    folded = name.casefold()
    known = {
        "messages": CONVERSATIONS, "history": HISTORIES, "system": SYSTEMS, "group_id": GROUPS, "label": LABELS,
        "date": DATES, "language": LANGUAGES, "id": IDS, "prompt": tuple(p for p, _ in PAIRS),
        "answer": tuple(a for _, a in PAIRS), "text": TEXTS,
    }  # fmt: skip
    role = next((role for role, names in known.items() if folded in names), None)
    return Proposal(name, role, BY_NAME, "name") if role else None


def _by_values(name: str, values: list[Any]) -> Proposal | None:
    if not values:
        return None
    if all(isinstance(value, list) and value and isinstance(value[0], dict) for value in values):
        return Proposal(name, "messages", 0.7, "values")
    texts = [str(value).strip() for value in values if not isinstance(value, list | dict)]
    if len(texts) < len(values):
        return None
    distinct, length = len(set(texts)), sum(map(len, texts)) / len(texts)
    if all(map(_DATE.match, texts)):
        return Proposal(name, "date", 0.7, "values")
    if all(map(_LANGUAGE.match, texts)):
        return Proposal(name, "language", 0.7, "values")
    if len(texts) >= 10 and distinct == len(texts) and length <= 40 and all(map(_ID.match, texts)):
        return Proposal(name, "id", BY_VALUES, "values")
    if len(texts) >= 10 and distinct <= max(2, len(texts) // 5) and length <= 40:
        return Proposal(name, "label", BY_VALUES, "values")
    # A Chinese character says as much as a short word.
    if (
        max(length, 2.5 * sum(len(_HAN.findall(text)) for text in texts) / len(texts)) >= 20
        and distinct > len(texts) // 2
    ):
        return Proposal(name, "prompt", 0.5, "values")
    return None
