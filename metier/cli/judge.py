"""The verbs that look at finished runs: compare and verify. Neither needs the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from metier.cli.app import app
from metier.errors import RunError

Runs = Annotated[list[Path], typer.Argument(help="Folders of finished runs; the others are compared with the first.")]


@app.command()
def compare(
    runs: Runs,
    csv: Annotated[Path | None, typer.Option(help="Also write every answer to this file, for a spreadsheet.")] = None,
    language: Annotated[str, typer.Option(help="en or zh: the language of what is printed.")] = "en",
) -> None:
    """Put runs side by side: each against its base, and against the first run on the records they share.

    Example: metier compare runs/icd10 runs/icd10-rank64 --csv answers.csv
    """
    from metier import artifacts
    from metier.evaluation.runs import answers_csv, compare_runs, told

    if language not in ("en", "zh"):
        raise RunError(f"`--language {language}`: there are en and zh")
    for line in told(compare_runs(runs), cast(Literal["en", "zh"], language)):
        typer.echo(line)
    if csv:
        artifacts.write_atomic(csv, answers_csv(runs).encode())
        typer.echo(f"answers: {csv}")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    head: Annotated[
        str | None, typer.Option(help="The audit's head as noted down earlier: it must still be in the chain.")
    ] = None,
) -> None:
    """Check a run: digests, the audit chain, and every number and page made again from the answers, without a GPU.

    Example: metier verify runs/icd10
    """
    from metier.evaluation.verify import verify as verify_run

    found = verify_run(run, head)
    for check in found.checks:
        typer.echo(f"checked {check}")
    for problem in found.problems:
        typer.echo(f"problem: {problem}")
    typer.echo(f"audit head: {found.audit_head}")
    if found.problems:
        count = len(found.problems)
        raise RunError(f"`{run}` is not what it says: {count} problem{'s' if count != 1 else ''}, listed above")
    typer.echo("verified: everything that was checked holds")
