"""The recipe's `serve`: what the output guard of the server does."""

from __future__ import annotations

from pydantic import Field

from metier.recipe.section import Section


class ServeConfig(Section):
    """What the server does to answers; notice and refuse come from the recipe's domain."""

    redact: bool = Field(default=True, description="Take personal data out of answers before they leave.")
    notice: bool = Field(default=True, description="Put the domain's required notice under every chat answer.")
    refuse: bool = Field(
        default=True, description="Answer requests that cross a red line of the domain with its refusal."
    )
