"""The word lists of the recognizers, each read once. `lists/README.md` says where they come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources

import yaml


@cache
def words(name: str) -> tuple[str, ...]:
    """The words of lists/NAME.txt: zh_ files and terms are split at spaces, en_ files at line ends."""
    text = resources.files(__package__).joinpath("lists", f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(lines) if name.startswith("en_") else tuple(word for line in lines for word in line.split())


@cache
def word_set(name: str) -> frozenset[str]:
    """The same as a set."""
    return frozenset(words(name))


@cache
def glossary(language: str) -> frozenset[str]:
    """The terms of the domains' packs."""
    found: set[str] = set()
    for entry in resources.files("metier.domains").iterdir():
        if entry.name.endswith(".yaml"):
            pack = yaml.safe_load(entry.read_text(encoding="utf-8"))
            found.update(term for names in pack["terms"] for term in names.get(language, ()))
    return frozenset(found)


@cache
def cues(name: str) -> frozenset[str]:
    """A list of cues.yaml."""
    lists: dict[str, str] = yaml.safe_load(
        resources.files(__package__).joinpath("cues.yaml").read_text(encoding="utf-8")
    )
    return frozenset(lists[name].split())


def alternatives(names: Iterable[str]) -> str:
    """A regular expression for any of `names`, the longest that fits, with common beginnings written once.

    Python's engine tries the alternatives one by one at every character: of hundreds, all but those of a letter are
    passed over at once.
    """
    return _branches(sorted(set(names), key=lambda name: (-len(name), name)))


def _branches(names: list[str]) -> str:
    by_first: dict[str, list[str]] = {}
    for name in names:
        by_first.setdefault(name[:1], []).append(name[1:])
    branches = [re.escape(first) + (_branches(rest) if any(rest) else "") for first, rest in by_first.items() if first]
    branches += [""] if "" in by_first else []  # the shortest, behind those that go on
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


@cache
def characters(name: str) -> frozenset[str]:
    """The characters of lists/NAME.txt."""
    return frozenset("".join(words(name)))
