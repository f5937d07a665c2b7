"""The recipe's `dedup`: what counts as a copy, and what becomes of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Fraction, Section


class DedupConfig(Section):
    """Copies among the records, and texts that must not be trained on."""

    exact: bool = Field(
        default=True,
        description="Merge records that are the same but for character width and white space; each merged row is "
        "listed in merged.parquet.",
    )
    near: Literal["group", "merge", "off"] = Field(
        default="group",
        description="Near-duplicates: `group` keeps them in the same split, `merge` also keeps only the longest of "
        "those with the same label, `off` does not look for them.",
    )
    threshold: Fraction = Field(
        default=0.5,
        description="Near-duplicates share at least this part of their shingles (5 characters, in Chinese 2; Jaccard).",
    )
    benchmarks: list[str] = Field(
        default=[],
        description="Files of texts that must not be trained on, such as the items of a public benchmark; records that "
        "share a passage with one are rejected. The same formats as `data.sources`.",
    )
