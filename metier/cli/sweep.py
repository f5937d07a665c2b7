"""The verb that looks for better settings: sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from metier.cli.app import app
from metier.cli.options import Out, RecipePath, Set, terminal


@app.command()
def sweep(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Try several configurations side by side on one base, and make the run of the best.

    The recipe's `sweep` says what is tried, such as {ranges: {adapter.rank: [8, 32], train.learning_rate: {min: 3e-4,
    max: 3e-3}}, trials: 12}; without it, two ranks with three learning rates each. All train at once, and the bad
    ones are stopped early. The best is chosen on the validation split and judged once on the test split. What was
    stopped or killed goes on when the same command is called again; under torchrun the configurations are spread over
    the processes.

    Example: metier sweep recipe.yaml --set sweep.trials=12 --out runs/tuned
    """
    from metier.cli.stages import print_verdict
    from metier.pipeline import is_follower
    from metier.recipe import load_recipe
    from metier.sweep import sweep as sweep_run

    loaded = load_recipe(recipe, set_, out)
    report = sweep_run(loaded, terminal())
    if is_follower():
        return
    folder = Path(loaded.out)
    _print_table(json.loads((folder / "sweep" / "trials.json").read_text(encoding="utf-8")))
    print_verdict(json.loads((folder / "evidence" / "evidence.json").read_text(encoding="utf-8")))
    typer.echo(f"report: {report}")


def _print_table(found: dict[str, Any]) -> None:
    from metier.training.trials import label

    typer.echo("val loss   steps      outcome    configuration")
    for row in found["trials"]:
        loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        steps = f"{row['steps']}/{row['total_steps']}"
        typer.echo(f"{loss:<11}{steps:<11}{row['state']:<11}{label(row['number'], row['values'])}")
