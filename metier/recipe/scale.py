"""The recipe's `scale`: who does the work of `prepare`. The data set is the same, byte for byte, whoever does."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Count, Section


class ScaleConfig(Section):
    """Processes of this machine, or a Ray cluster. What comes out does not depend on it."""

    workers: Count | Literal["auto"] = Field(
        default="auto",
        description="Processes that work on parts of the records: `auto` is one for each core, at most 16, and for "
        "fewer than 20,000 rows none beside metier's own; 1 keeps everything in one process.",
    )
    ray: str | None = Field(
        default=None,
        description="A Ray cluster instead: `auto` for the one that this machine belongs to, or an address such as "
        "`ray://head:10001`. metier must be installed on its machines; the files are read here. "
        "Needs `pip install metier[ray]`.",
    )
