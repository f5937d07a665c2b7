"""The recipe's `data`: where the records come from and what is made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Section, Size


class DataConfig(Section):
    """Where the records come from, and what is the prompt and what the answer."""

    sources: list[str] = Field(
        min_length=1, description="Files or globs: CSV, TSV, JSON, JSONL or Parquet, relative to the recipe."
    )
    test_sources: list[str] = Field(
        default=[], description="Files that are the test split as they are; then nothing else becomes test."
    )
    prompt: str | None = Field(
        default=None,
        description="A column's name, or a template with columns in braces: `Classify: {text}`. "
        "Found by itself when absent.",
    )
    answer: str | None = Field(default=None, description="A column's name, or a template. Found by itself when absent.")
    system: str | None = Field(default=None, description="A system message for every record, or a column's name.")
    messages: str | None = Field(default=None, description="The column that holds whole conversations.")
    text: str | None = Field(default=None, description="The column of plain text, for training on text alone.")
    group_id: str | None = Field(
        default=None,
        description="The column that names the patient, client or category; no group crosses a split. "
        "Without it, records with the same prompt stay together.",
    )
    task: Literal["auto", "classification", "generation"] = Field(
        default="auto",
        description="`classification` when the answers are labels; `auto` decides by how few distinct answers "
        "there are.",
    )
    val: Size = Field(
        default=0.1, description="Records for choosing the best adapter: a share (0.1) or a number (200)."
    )
    test: Size = Field(default=0.1, description="Records for the verdict, seen once: a share (0.1) or a number (200).")
    canaries: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Plant invented secrets among the training records, so many for each of 0, 1, 4 and 16 repeats, "
        "to measure what the model remembers. For a trial run: the adapter then knows them.",
    )
