"""The recipe's `balance`: how often what is trained on; the other splits stay as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from metier.recipe.section import Count, Fraction, Section

Weight = Annotated[float, Field(ge=0, le=100)]


class BalanceConfig(Section):
    """How often each training record is seen in an epoch. Validation and test keep the natural shares."""

    classes: Literal["natural", "weight", "oversample", "undersample"] = Field(
        default="natural",
        description="`weight` counts the loss of rare labels more, so that every label weighs the same in all; "
        "`oversample` repeats the records of rare labels up to the most frequent one, `undersample` leaves "
        "out records of frequent labels down to the rarest; for classification.",
    )
    limit: Count = Field(
        default=5,
        description="A record is seen so often, or weighs so much, at most; after undersampling the most frequent "
        "label has at most so many times the records of the rarest.",
    )
    sources: dict[str, Weight] = Field(
        default={},
        description="File name: how often its records are seen: 2 is twice, with 0.5 every other one is left out.",
    )
    general: list[str] = Field(
        default=[],
        description="Files of general instructions that are mixed in against forgetting, with columns found by name.",
    )
    general_share: Fraction = Field(
        default=0.1, description="The general instructions' share of the training records, as far as they go."
    )
