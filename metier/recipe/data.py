"""The recipe's `data`: where the records come from and what is made of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from metier.recipe.section import Count, Section, Size


class DataConfig(Section):
    """Where the records come from, and what is the prompt and what the answer."""

    sources: list[str] = Field(
        min_length=1,
        description="Files, globs, folders or zip archives, relative to the recipe: CSV, TSV, JSON, JSONL, Parquet, "
        "Excel, plain text and Markdown, also with .gz.",
    )
    test_sources: list[str] = Field(
        default=[], description="Files that are the test split as they are; then nothing else becomes test."
    )
    encoding: str = Field(
        default="auto",
        description="`auto` finds UTF-8, UTF-16, GB18030, Big5 and cp1252 by themselves and asks where it is not "
        "sure; otherwise a name such as gb18030, big5, shift_jis.",
    )
    header_line: Count | None = Field(
        default=None, description="The line of the column names in CSV and Excel files. Found by itself when absent."
    )
    sheets: list[str] = Field(
        default=[], description="The sheets of Excel files to read, by name. Empty: all that are not hidden or empty."
    )
    passage_chars: Count = Field(
        default=2000, description="Plain text and Markdown are cut into passages of at most this many characters."
    )
    prompt: str | None = Field(
        default=None,
        description="A column's name, or a template with columns in braces: `Classify: {text}`. "
        "Found by itself when absent.",
    )
    answer: str | None = Field(default=None, description="A column's name, or a template. Found by itself when absent.")
    system: str | None = Field(
        default=None,
        description="A system message for every record, or a column's name. A column `system` is found by itself; "
        "`none` switches that off.",
    )
    history: str | None = Field(
        default=None,
        description="The column of earlier turns, a list of [question, answer] pairs. A column `history` is found by "
        "itself; `none` switches that off, such as for a patient's history in words.",
    )
    messages: str | None = Field(default=None, description="The column that holds whole conversations.")
    text: str | None = Field(default=None, description="The column of plain text, for training on text alone.")
    group_id: str | None = Field(
        default=None,
        description="The column that names the patient, client or category; no group crosses a split. Found by itself "
        "when it has a name such as patient_id, 病历号, customer_id, document; `none` switches that off. Without "
        "it, records with the same prompt stay together.",
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
