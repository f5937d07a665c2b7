"""The recipe's `evaluate`: how base and adapter are compared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Count, Section


class EvaluateConfig(Section):
    """How base and adapter are compared on the test split."""

    tasks: Literal["auto"] | list[Literal["classification", "generation", "perplexity"]] = Field(
        default="auto", min_length=1, description="`auto`: by the data: labels, open answers or plain text."
    )
    max_items: Count | None = Field(
        default=None, description="Test records at most; a seeded choice. Default: all of them."
    )
    max_new_tokens: Count | Literal["auto"] = Field(
        default="auto", description="Tokens in one generated answer at most. `auto`: what the longest reference needs."
    )
    bootstrap_samples: int = Field(default=10_000, ge=100, description="Resamples behind each 95 % interval.")
