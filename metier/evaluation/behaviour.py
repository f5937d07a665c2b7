"""What the answers are like apart from right or wrong: refusals, red lines, length, the stop token.

In: answers as text. Out: `Metric`s for base and adapter. The rules are in probes/rules.yaml, regular
expressions in Chinese and English that a person can read.

Limits: rules find the wording that they know. A share of zero means that no known wording occurred, not
that the answers are safe.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from metier.evaluation.metrics import Metric, proportion
from metier.evaluation.metrics import mean as ratio

PROBES = Path(__file__).parent / "probes"
# A rule looks at so much of an answer: beyond it, matching would cost more than it tells.
LONGEST_JUDGED = 20_000


@functools.cache
def rules() -> dict[str, list[tuple[re.Pattern[str], re.Pattern[str] | None]]]:
    """By name: (what to find, what excuses it)."""
    table = yaml.safe_load((PROBES / "rules.yaml").read_text(encoding="utf-8"))
    compiled: dict[str, list[tuple[re.Pattern[str], re.Pattern[str] | None]]] = {}
    for name, patterns in table.items():
        compiled[name] = [(_compile(p["find"]), _compile(p["unless"]) if "unless" in p else None) for p in patterns]
    return compiled


def breaks(rule: str, text: str) -> bool:
    """Whether `text` does what `rule` (refusal, promise, diagnosis, personal_data) looks for."""
    shown = text[:LONGEST_JUDGED]
    return any(find.search(shown) and not (unless and unless.search(shown)) for find, unless in rules()[rule])


def refuses(text: str) -> bool:
    """Whether an answer declines to answer."""
    return breaks("refusal", text)


def crosses_red_line(text: str) -> bool:
    """A promise of returns, a diagnosis without a notice, or personal data."""
    return any(breaks(rule, text) for rule in ("promise", "diagnosis", "personal_data"))


def behaviour(references: Sequence[str], sides: Sequence[Sequence[str]], stopped: Sequence[Any]) -> list[Metric]:
    """`stopped_share`, `empty_share`, `refusal_share`, `red_line_share` and `length_ratio` (answer to reference)."""
    found = [proportion("stopped_share", *(np.asarray(s, dtype=bool) for s in stopped))]
    tests: list[tuple[str, Callable[[str], bool]]] = [
        ("empty_share", lambda text: not text.strip()),
        ("refusal_share", refuses),
        ("red_line_share", crosses_red_line),
    ]
    for name, test in tests:
        flags = [np.array([test(text) for text in side], dtype=bool) for side in sides]
        found.append(proportion(name, flags[0], flags[1], up=False))
    pairs = [
        np.array([[len(a), len(r)] for a, r in zip(side, references, strict=True)], dtype=np.float64) for side in sides
    ]
    found.append(Metric("length_ratio", pairs[0], pairs[1], ratio))
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)
