"""The word lists of the recognizers, each read once. `lists/README.md` says where they come from."""

from __future__ import annotations

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
def cues(name: str) -> frozenset[str]:
    """A list of cues.yaml."""
    lists: dict[str, str] = yaml.safe_load(
        resources.files(__package__).joinpath("cues.yaml").read_text(encoding="utf-8")
    )
    return frozenset(lists[name].split())


@cache
def characters(name: str) -> frozenset[str]:
    """The characters of lists/NAME.txt."""
    return frozenset("".join(words(name)))
