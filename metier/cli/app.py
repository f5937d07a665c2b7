"""The Typer application that the verbs' modules hang their commands on."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

# As a user meets them: what makes a run, what judges it, what uses it, what a person may ask of it.
ORDER = (
    "demo", "run", "sweep", "prepare", "inspect", "plan", "train", "evaluate", "compare", "verify",
    "chat", "generate", "serve", "export", "trace", "forget",
)  # fmt: skip


class _InOrder(TyperGroup):
    """Lists the verbs in ORDER instead of in the order of imports."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="metier",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="metier turns an organisation's own records into a LoRA adapter, and proves what it is worth.\n\n"
    "Start with `metier demo`; then write a recipe.yaml and call `metier run recipe.yaml`.",
)
