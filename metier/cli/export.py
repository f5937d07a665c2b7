"""The verb that takes an adapter to where it is served: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metier.cli.app import app
from metier.cli.options import terminal


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder: its held-out records are what an export is checked on.")],
    to: Annotated[str, typer.Option(help="adapter, merged, gguf or bundle.")] = "bundle",
    storage: Annotated[
        list[str] | None,
        typer.Option(
            help="How weights are stored; may be given several times. merged: f16, bf16, f32 (f16 where it fits). "
            "GGUF: f16, bf16, q8_0, q4_0, q4_1 (q8_0)."
        ),
    ] = None,
    for_: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help="A bundle's engines: vllm, ray, kserve, llama.cpp, ollama, mlx. Else: all that can.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The export's folder, instead of RUN/export/<to>.")] = None,
) -> None:
    """Write the adapter in a form that others serve, and prove that it is still the model that was measured.

    Each form is read back and asked the run's held-out records; PARITY.json says how near it is. A form that fails
    is not given out, and nothing half-written stays.

    Example: metier export runs/icd10cm --to gguf --storage q8_0
    """
    from metier import pipeline

    folder = pipeline.export(run, to, out=out, storage=storage or [], targets=for_ or [], say=terminal().say)
    typer.echo(f"export: {folder}")
