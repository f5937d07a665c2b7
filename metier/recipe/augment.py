"""The recipe's `augment`: variants of training records that leave the answer right."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Count, Section

Method = Literal["instruction", "options", "terms", "units", "typo", "width", "entities", "paraphrase"]
NEED_DOMAIN = ("instruction", "terms", "units")


class AugmentConfig(Section):
    """Variants of training records, marked with the record they were made of; off unless methods are named."""

    methods: list[Method] = Field(
        default=[],
        description="instruction (the domain's other wordings of the task), options (choices in another order, answer "
        "remapped), terms (another name from the domain's glossary), units (8.4 % as 68 mmol/mol), typo (2 % of the "
        "letters; never terms or numbers), width (full and half width), entities (other people, organisations, dates "
        "and amounts), paraphrase (by the base itself, where it is faithful).",
    )
    copies: Count = Field(default=1, description="Variants of each training record at most.")
    paraphrases: Count = Field(
        default=100, description="Records at most that the base is asked to rewrite, with the method `paraphrase`."
    )
