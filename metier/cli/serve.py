"""The verb that answers others: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metier.cli.app import app
from metier.cli.options import Device, terminal
from metier.errors import MetierError


@app.command()
def serve(
    runs: Annotated[
        list[str], typer.Argument(help="Runs' folders, adapters' folders or one base; NAME=RUN gives a name.")
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen at; any but loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line; else those in METIER_API_KEY.")
    ] = None,
    guard: Annotated[
        bool, typer.Option("--guard/--no-guard", help="Redact, refuse and attach notices as the recipe says, or not.")
    ] = True,
    max_batch: Annotated[int, typer.Option(min=1, help="Sequences computed side by side.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens in an answer at most.")] = 1024,
    request_seconds: Annotated[float, typer.Option(min=1, help="Seconds for one request at most.")] = 300.0,
    precision: Annotated[str, typer.Option(help="auto (as measured), fp32, bf16 or fp16.")] = "auto",
    device: Device = "auto",
) -> None:
    """Serve a base model and any number of adapters: an OpenAI-compatible API, and a page to chat at.

    Example: metier serve runs/icd10cm
    """
    try:
        from metier.serving.server import ServerSettings, read_api_keys
        from metier.serving.server import serve as serve_runs
    except ModuleNotFoundError as error:
        raise MetierError(f"serving needs the package `{error.name}`", hint="pip install 'metier[serve]'") from None
    settings = ServerSettings(
        host=host, port=port, api_keys=read_api_keys(api_key_file), max_batch=max_batch,
        max_new_tokens=max_new_tokens, request_seconds=request_seconds,
    )  # fmt: skip
    serve_runs(
        runs, settings, device=_device(device), precision=_precision(precision),
        redact_by=_redaction() if guard else None, guarded=guard, say=terminal().say,
    )  # fmt: skip


def _redaction() -> Any:
    """Policy -> what takes personal data out of an answer, as it was taken out of the training data."""
    from metier.data.deidentify.rewrite import deidentify

    def redact_by(policy: str) -> Any:
        def redact(text: str) -> tuple[str, list[str]]:
            [(clean, spans)] = deidentify([text], policy=policy)
            return clean, [span.entity_type for span in spans]

        return redact

    return redact_by


def _device(name: str) -> Any:
    return _one_of("--device", name, ("auto", "cpu", "cuda"))


def _precision(name: str) -> Any:
    return _one_of("--precision", name, ("auto", "fp32", "bf16", "fp16"))


def _one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise MetierError(f"{option} is `{value}`; there is {', '.join(known)}")
    return value
