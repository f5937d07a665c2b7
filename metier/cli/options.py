"""What several verbs share: their arguments and options, and the terminal that they talk to."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Annotated, Any

import typer

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file (docs/recipe.md explains every key).")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one value, e.g. --set train.epochs=1.")]
Out = Annotated[str | None, typer.Option(help="The run's folder, instead of the recipe's `out`.")]
Run = Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a base model.")]
UseBase = Annotated[bool, typer.Option("--base", help="Ask the base model, without the adapter.")]
System = Annotated[str | None, typer.Option(help="A system message before the prompt.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens in an answer at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above, tokens are drawn.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability.")
]
Seed = Annotated[int, typer.Option(help="Of the drawing.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def terminal() -> Any:
    """A terminal whose live line ends, and gives the cursor back, also when the command fails."""
    from metier.terminal import Terminal

    told = Terminal()
    atexit.register(told.close)
    return told
