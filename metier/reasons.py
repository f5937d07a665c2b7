"""Why a row was rejected, in Chinese: the reasons are stored in English, and shown in the reader's language.

In: a reason of a data set's manifest. Out: the same in Chinese, from reasons.yaml; what is not in the table (an
earlier version's reason) stays as it is. tests/test_reasons.py holds that no reason of the code is missing.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml

_FIELD = re.compile(r"\{(\w+)\}")


def in_chinese(reason: str) -> str:
    """The reason in Chinese; itself where the table does not have it."""
    for pattern, chinese in _table():
        if match := pattern.fullmatch(reason):
            found = match.groupdict()
            for name in found.keys() & {"why", "role"}:
                found[name] = in_chinese(found[name])
            return chinese.format(**found)
    return reason


@functools.cache
def _table() -> list[tuple[re.Pattern[str], str]]:
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [(_pattern(row["en"]), row["zh"]) for row in rows]


def _pattern(english: str) -> re.Pattern[str]:
    """`byte {number} is odd` -> a pattern with a group of that name."""
    parts = _FIELD.split(english)
    return re.compile("".join(f"(?P<{p}>.+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)), re.DOTALL)
