"""policies/NAME.yaml, or a file of one's own, -> Policy: which operator each type of identifier gets.

operators   type: operator. What is not named stays; `mask` stars, `label` [TYPE], `surrogate` a keyed stand-in,
            `date_shift` by a keyed number of days per subject, `generalise` (year, 90+, ZIP3), `drop` nothing
age_from    ages below it are no identifiers
classes     what the law lists, each with what is done about it; `by` names the types. `what_zh`, `by_en` and the like,
            as `law_zh`, say it in the other language
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from metier.errors import RecipeError, did_you_mean

OPERATORS = ("mask", "label", "surrogate", "date_shift", "generalise", "drop")
NONE = "none"
TYPES = [
    "PERSON",
    "TITLE",
    "ORGANIZATION",
    "NRP",
    "COUNTRY",
    "ADDRESS",
    "LOCATION",
    "ZIP_CODE",
    "DATE",
    "TIME",
    "AGE",
    "PHONE_NUMBER",
    "FAX_NUMBER",
    "EMAIL_ADDRESS",
    "URL",
    "IP_ADDRESS",
    "SOCIAL_ACCOUNT",
    "CN_ID_CARD",
    "CN_PERMIT",
    "CN_USCC",
    "US_SSN",
    "PASSPORT",
    "SOCIAL_SECURITY",
    "MEDICAL_RECORD",
    "HEALTH_PLAN",
    "LICENSE",
    "CREDIT_CARD",
    "BANK_ACCOUNT",
    "IBAN_CODE",
    "VEHICLE",
    "DEVICE",
    "STUDENT_ID",
    "EMPLOYEE_ID",
    "UNIQUE_ID",
]


@dataclass(frozen=True, slots=True)
class Policy:
    """What is removed, and how. `text` is the file, for the key of the data set."""

    name: str
    operators: dict[str, str]
    age_from: int
    law: str
    classes: tuple[dict[str, str], ...]
    text: str
    law_in: dict[str, str]

    def answered(self, counts: Mapping[str, int]) -> list[dict[str, Any]]:
        """The law's classes with how many identifiers of each were replaced; `not done` where an operator keeps one."""
        found: list[dict[str, Any]] = []
        for entry in self.classes:
            types = [name for name in TYPES if re.search(rf"(?<![A-Z_]){name}(?![A-Z_])", entry["by"])]
            kept = [name for name in types if self.operators.get(name, "keep") == "keep"]
            more: dict[str, Any] = {"replaced": sum(counts.get(name, 0) for name in types)} if types else {}
            if kept and entry["status"] == "done":
                more |= {"status": "not done", "kept": kept}
            found.append(entry | more)
        return found

    @property
    def needs_key(self) -> bool:
        return bool({"surrogate", "date_shift"} & set(self.operators.values()))


@cache
def policy_names() -> list[str]:
    """The policies that come with metier."""
    folder = resources.files(__package__).joinpath("policies")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_policy(name: str, operators: dict[str, str] | None = None) -> Policy:
    """The policy of that name or file, with single operators replaced. Raises `RecipeError`."""
    if name in policy_names():
        text = resources.files(__package__).joinpath("policies", f"{name}.yaml").read_text(encoding="utf-8")
    else:
        text = _own(name)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("operators"), dict):
        raise RecipeError(
            f"`{name}` is no privacy policy", hint="it needs `operators:` with lines such as `PERSON: label`"
        )
    chosen = values["operators"] | (operators or {})
    for entity_type, operator in chosen.items():
        _check(entity_type, operator)
    return Policy(
        name=name if name in policy_names() else Path(name).stem,
        operators=chosen,
        age_from=int(values.get("age_from", 0)),
        law=str(values.get("law", "")),
        classes=tuple(values.get("classes", ())),
        text=text,
        law_in={language: str(values[f"law_{language}"]) for language in ("en", "zh") if f"law_{language}" in values},
    )


def _check(entity_type: Any, operator: Any) -> None:
    if entity_type not in TYPES:
        hint = f"the types are {', '.join(TYPES)}"
        raise RecipeError(
            f"privacy: there is no type `{entity_type}`{did_you_mean(str(entity_type), TYPES)}", hint=hint
        )
    if operator not in (*OPERATORS, "keep"):
        near = did_you_mean(str(operator), list(OPERATORS))
        raise RecipeError(
            f"privacy: `{entity_type}` has the operator `{operator}`{near}; there is {', '.join(OPERATORS)}, keep"
        )


def _own(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        known = [NONE, *policy_names()]
        raise RecipeError(
            f"there is no privacy policy `{name}`{did_you_mean(name, known)}; there is {', '.join(known)}",
            hint="a policy of your own is a YAML file, named with its .yaml",
        )
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise RecipeError(f"the privacy policy `{name}` cannot be read") from None
