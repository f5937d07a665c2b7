"""The Typer application that the verbs' modules hang their commands on."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="metier",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="metier turns an organisation's own records into a LoRA adapter, and proves what it is worth.\n\n"
    "Start with `metier demo`; then write a recipe.yaml and call `metier run recipe.yaml`.",
)
