"""Domain packs: what a field of work adds to a run, as one YAML file each; a user's own pack is a file of that form.

A pack holds other wordings of the task, terms with their names in both languages, conversions of units, the name of a
privacy policy, what must not be answered and what is said instead, notices, and the metrics to look at first.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from metier.errors import RecipeError, did_you_mean
from metier.recipe import Section

FOLDER = Path(__file__).parent
Language = Literal["en", "zh"]


class Term(Section):
    """One notion: its names in each language, the usual one first."""

    en: list[str] = Field(default=[], description="English names and abbreviations that may stand for each other.")
    zh: list[str] = Field(default=[], description="Chinese names that may stand for each other.")


class Unit(Section):
    """A quantity that is written in two units: to = factor * from + offset."""

    after: list[str] = Field(min_length=1, description="Names of the quantity; the number stands within 12 characters.")
    source: str = Field(description="The unit as written.")
    target: str = Field(description="The unit to write.")
    factor: float = Field(description="of the conversion")
    offset: float = Field(default=0.0, description="of the conversion")
    digits: int = Field(default=1, description="Decimal places of the result.")


class Domain(Section):
    """A pack as loaded. Keys of the dictionaries are languages, `en` and `zh`."""

    name: str = Field(min_length=1, description="What the pack is called.")
    privacy_policy: str = Field(description="The de-identification policy that fits this domain.")
    metrics: list[str] = Field(default=[], description="Metrics to look at first.")
    instructions: dict[Language, list[str]] = Field(
        default={}, description="Wordings around a prompt; each holds {prompt} once."
    )
    notices: dict[Language, str] = Field(default={}, description="What stands under every answer.")
    red_lines: dict[Language, list[str]] = Field(default={}, description="Regular expressions of refused requests.")
    refusals: dict[Language, str] = Field(default={}, description="What is said instead of a refused answer.")
    terms: list[Term] = Field(default=[], description="The glossary.")
    units: list[Unit] = Field(default=[], description="Conversions that keep the meaning.")

    @field_validator("instructions")
    @classmethod
    def _one_prompt(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        if wrong := [text for texts in value.values() for text in texts if text.count("{prompt}") != 1]:
            raise ValueError(f"`{wrong[0]}` does not hold {{prompt}} once")
        return value

    @field_validator("red_lines")
    @classmethod
    def _patterns(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for pattern in (pattern for patterns in value.values() for pattern in patterns):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{pattern}` is no regular expression: {error}") from None
        return value

    def names(self) -> list[str]:
        """Every name of every term, the longest first, so that a longer one is found before its part."""
        found = {name for term in self.terms for name in (*term.en, *term.zh)}
        return sorted(found, key=lambda name: (-len(name), name))


def known_domains() -> list[str]:
    """The packs that come with metier."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_domain(name: str) -> Domain:
    """The pack `name`, or the one in the YAML file `name`. Raises `RecipeError` for none, or for one that is wrong."""
    is_file = name.endswith((".yaml", ".yml"))
    if not is_file and name not in known_domains():
        raise RecipeError(
            f"there is no domain `{name}`{did_you_mean(name, known_domains())}",
            hint=f"there is {', '.join(known_domains())}; a pack of your own is a YAML file",
        )
    path = Path(name) if is_file else FOLDER / f"{name}.yaml"
    try:
        values: Any = yaml.safe_load(io.StringIO(path.read_text(encoding="utf-8-sig")))
        return Domain.model_validate(values)
    except OSError as error:
        raise RecipeError(f"`domain`: `{path}` cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise RecipeError(f"`domain`: `{path}` is no YAML in UTF-8", hint="metier/domains/ holds examples") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise RecipeError(
            f"`{path}`: `{place}`: {first['msg'].removeprefix('Value error, ')}", hint="metier/domains/ holds examples"
        ) from None
