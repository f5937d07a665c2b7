"""The recipe's `privacy`: what personal data is taken out of the records, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Section

Operator = Literal["mask", "label", "surrogate", "date_shift", "generalise", "drop", "keep"]


class PrivacyConfig(Section):
    """De-identification before anything is trained; the data card says what was found and what may be left."""

    policy: str = Field(
        default="auto",
        description="`hipaa-safe-harbor`, `gdpr-pseudonymised`, `pipl`, `none`, or a YAML file of your own. `auto`: "
        "the domain's policy where `domain` is set, else none; then the suspected identifiers are counted and told.",
    )
    operators: dict[str, Operator] = Field(
        default={}, description="Another operator for single types of the policy: `{DATE: date_shift}`."
    )
    columns: dict[str, str] = Field(
        default={},
        description="Columns that are one identifier as a whole: `{patient_name: PERSON}`. Their values are also taken "
        "out of the row's other columns.",
    )
    recognizers: list[str] = Field(
        default=[],
        description="Beside the rules: `rampart` (a small model for names and addresses in Latin script, 20 times "
        "slower), `presidio` or `presidio:SPACY_MODEL` (Microsoft's analyzer, English), `gliner:FOLDER` (a GLiNER "
        "model's weights). Each needs packages of its own; nothing is downloaded.",
    )
    quasi_identifiers: list[str] = Field(
        default=[],
        description="Columns that together may point at a person, such as age and town; the card says how many rows "
        "share their values (k-anonymity).",
    )
    review: int = Field(
        default=50, ge=0, description="Rewritten records in privacy_review.jsonl, for a person to read."
    )
