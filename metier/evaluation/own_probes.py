"""A house's own general questions beside the built-in ones: a YAML file in the same form, checked before it is used.

In: `evaluate.own_probes`. Out: probes with `probe_id` (own-...), `kind`, `language`, and what the kind needs. The file
is copied into the evidence, so that `metier verify` judges the answers by the same questions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from metier.errors import RecipeError

COPY = "own_probes.yaml"
CHECKS: dict[str, Callable[[Any], bool]] = {
    "matches": lambda v: isinstance(v, str) and _compiles(v),
    "lines": lambda v: isinstance(v, int) and v > 0,
    "json_keys": lambda v: isinstance(v, list) and bool(v),
    "max_words": lambda v: isinstance(v, int) and v > 0,
    "contains": lambda v: isinstance(v, list) and bool(v) and all(isinstance(word, str) for word in v),
}
NEEDS = {
    "text": "a passage of text",
    "choice": "a list: the question, the right answer, wrong answers",
    "instruction": f"`prompt` and one check of: {', '.join(CHECKS)}",
    "refusal": "`prompt` and `refuse` (true or false)",
    "red_line": "`prompt`",
}
LANGUAGES = ("en", "zh")


def read_own(path: Path) -> list[dict[str, Any]]:
    """The probes of a file. Raises `RecipeError` with kind and number for what is none."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"evaluate.own_probes: `{path}` cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"evaluate.own_probes: `{path}` is not YAML in UTF-8") from error
    if not isinstance(table, dict) or not table:
        raise RecipeError(
            f"evaluate.own_probes: `{path}` holds no questions", hint="kinds with languages below: text: {en: [...]}"
        )
    found: list[dict[str, Any]] = []
    for kind, by_language in table.items():
        if kind not in NEEDS or not isinstance(by_language, dict):
            raise RecipeError(f"evaluate.own_probes: `{path}` has `{kind}`", hint=f"kinds are {', '.join(NEEDS)}")
        for language, probes in by_language.items():
            if language not in LANGUAGES or not isinstance(probes, list):
                raise RecipeError(f"evaluate.own_probes: `{kind}` has `{language}`", hint="en or zh, each with a list")
            found += [_probe(kind, language, i, probe) for i, probe in enumerate(probes)]
    return found


def _probe(kind: str, language: str, number: int, probe: Any) -> dict[str, Any]:
    if not _is_one(kind, probe):
        raise RecipeError(
            f"evaluate.own_probes: number {number + 1} of `{kind}`, `{language}` is none", hint=f"it is {NEEDS[kind]}"
        )
    content = {"text": probe} if kind == "text" else {"options": probe} if kind == "choice" else probe
    return {"probe_id": f"own-{kind}-{language}-{number:03d}", "kind": kind, "language": language, **content}


def _is_one(kind: str, probe: Any) -> bool:
    if kind == "text":
        return isinstance(probe, str) and bool(probe.strip())
    if kind == "choice":
        return isinstance(probe, list) and len(probe) > 2 and all(isinstance(p, str) and p.strip() for p in probe)
    if not isinstance(probe, dict) or not isinstance(probe.get("prompt"), str) or not probe["prompt"].strip():
        return False
    if kind == "refusal":
        return isinstance(probe.get("refuse"), bool)
    return kind != "instruction" or any(name in probe and check(probe[name]) for name, check in CHECKS.items())


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError):
        return False
    return True
