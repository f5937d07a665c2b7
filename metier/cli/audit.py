"""The verbs for a person's rights: trace, forget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metier.cli.app import app

Subject = Annotated[str, typer.Option(help="A value (patient number, name), its keyed hash, a record_id, or file:row.")]


@app.command()
def trace(
    runs: Annotated[list[Path], typer.Argument(help="The folders of runs.")],
    subject: Subject,
) -> None:
    """List a person's records, their splits, and the adapters that learned from them.

    The key for hashes is read from METIER_KEY_FILE, or from metier/key in your configuration folder.

    Example: metier trace --subject P-00417 runs/icd10 runs/icd10-v2
    """
    from metier.data.lineage import trace as find
    from metier.keys import load_key

    key = load_key()
    for run in runs:
        _print_trace(find(subject, run, key))


@app.command()
def forget(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    subject: Subject,
) -> None:
    """Take a person's rows out of a run's data set, mark the adapter that learned from them, and say how to retrain.

    The rows stay out when the data set is made again. What an adapter was merged into or copied to is not known.

    Example: metier forget --subject P-00417 runs/icd10
    """
    from metier.artifacts import append_audit, audit_artifacts, lock_run
    from metier.data.lineage import forget as take_out
    from metier.data.lineage import subject_hash
    from metier.data.lineage import trace as find
    from metier.keys import load_key

    key = load_key()
    found = find(subject, run, key)  # refuses what is no run, before a lock makes a folder of it
    with lock_run(run):
        audit_artifacts(run, recovered=True)
        if len(found.records):
            # First the line: what cannot be logged is not done.
            append_audit(
                run, "forget", subject_hash=subject_hash(subject, key), records=len(found.records),
                adapter_marked=found.adapter if found.models else None,
            )  # fmt: skip
            take_out(subject, run, key)
            audit_artifacts(run)
    _print_trace(found)
    if not len(found.records):
        return
    typer.echo(f"taken out of {run / 'dataset'}; forgotten.json keeps the rows out from now on")
    if found.in_evidence:
        typer.echo(f"{run / 'evidence'} showed {found.in_evidence} of the records and was removed")
    for model in found.models:
        how = "learned" if found.learned else "may have learned"
        typer.echo(f"{model} {how} from them and is marked in revoked.json; metier no longer serves it")
    if found.models and (run / "export").exists():
        typer.echo(f"{run / 'export'} holds copies: delete them, and those that were given away")
    typer.echo(f"retrain with: metier run {run / 'recipe.yaml'} --out {run}")


def _print_trace(found: Any) -> None:
    from metier.artifacts import REVOKED

    typer.echo(f"{found.run}: {len(found.records)} records, {len(found.merged)} rows merged into them")
    for row in found.records.iter_rows(named=True):
        made = f", made of {row['parent_id']}" if row["parent_id"] else ""
        typer.echo(
            f"  {row['record_id']} {row['split']}: {row['source_file']}, row {row['source_row']}{made} ({row['why']})"
        )
    for row in found.merged.iter_rows(named=True):
        typer.echo(f"  {row['source_file']}, row {row['source_row']}: merged into {row['record_id']}")
    if found.forgotten:
        typer.echo(f"  {found.forgotten} rows were forgotten on request; forgotten.json keeps them out")
    if found.adapter:
        unknown = "was trained on an earlier data set, which may have held them"
        how = unknown if found.learned is None else f"learned from {found.learned or 'none'} of them"
        marked = "; it is marked in revoked.json" if (found.run / "adapter" / REVOKED).exists() else ""
        typer.echo(f"  adapter {found.adapter[:16]} {how}{marked}")
