"""The verb that says what a training will need, before anything is loaded: plan."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from metier.cli.app import app
from metier.cli.options import RecipePath, Set, terminal
from metier.errors import MetierError, RecipeError

SAMPLE = 2000


@app.command()
def plan(
    recipe: RecipePath,
    set_: Set = None,
    card: Annotated[str | None, typer.Option(help="Plan for this card, e.g. h100, l4, t4.")] = None,
    memory: Annotated[float | None, typer.Option(help="Plan for a card of this many GiB.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Plan for this many processes of torchrun, a card each.")] = 1,
    shape: Annotated[
        str | None, typer.Option(help="The model's shape, e.g. model_type=llama,hidden_size=8192 (else the base's).")
    ] = None,
) -> None:
    """Say what a training will need: memory by part, speed, duration, and the way it would be trained.

    No weights are loaded and nothing is written. Without --card or --memory it plans for the device at hand.

    Example: metier plan recipe.yaml --memory 16
    """
    import torch

    from metier.model.device import resolve_device
    from metier.model.load import empty_model, read_config
    from metier.recipe import load_recipe
    from metier.training.cards import GIB, card_here, card_named, measured
    from metier.training.fit import cannot_fit, fit
    from metier.training.memory import shape_of

    loaded = load_recipe(recipe, set_, None)
    config = read_config(loaded.base, loaded.revision, _shape(shape))
    model = shape_of(empty_model(config, torch.bfloat16), loaded.adapter)
    device = resolve_device(loaded.train.device) if not (card or memory) else None
    target = card_here(device) if device else card_named(card or _like(memory))
    if memory:
        name = f"{card or 'a card'} of {memory:g} GiB"
        target = dataclasses.replace(target, memory_bytes=int(memory * GIB), name=name)
    job, records = _job(loaded)
    shared_by = processes if loaded.adapter.bias == "none" else 1
    found = fit(model, job, target, loaded.train, processes=shared_by)
    _print_job(model, loaded, target, job, records)
    if found.chosen is None:
        raise cannot_fit(found.leanest, target, loaded.train)
    speed = fit(model, job, measured(target, device), loaded.train, processes=shared_by) if device else found
    _print_choice(found, target)
    rates = {_key(way): way.tok_per_sec for way in speed.ways}
    rate = processes * rates[_key(found.chosen)]
    typer.echo(f"speed: about {rate:,.0f} tok/s (an estimate){_duration(loaded, job, records, rate)}")
    _print_ways(found.ways, rates, target)


def _shape(text: str | None) -> dict[str, Any]:
    import json

    values: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        key, separator, value = part.partition("=")
        if not separator:
            raise RecipeError(f"`--shape {part}`: expected key=value, such as hidden_size=4096")
        try:
            values[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            values[key.strip()] = value.strip()
    return values


def _like(memory: float | None) -> str:
    """Which card of the table stands for the speed of an unnamed one with this much memory."""
    assert memory
    return "t4" if memory < 12 else "rtx4080" if memory <= 16 else "rtx4090" if memory <= 24 else "h100"


def _job(recipe: Any) -> tuple[Any, int | None]:
    """What the records are like, from a sample, and their number; a guess where data or tokenizer are not here."""
    from metier.data.prepare import prepare as prepare_stage
    from metier.model.chat import Renderer, eos_token_ids
    from metier.model.load import load_tokenizer
    from metier.model.resolve import resolve_base
    from metier.training.fit import job_of
    from metier.training.labels import render_records
    from metier.training.plan import Job
    from metier.training.train import read_split

    ui = terminal()
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = Path(folder) / "dataset"
            prepare_stage(recipe, out=dataset, progress=ui.say)
            path = resolve_base(recipe.base, recipe.revision, progress=ui.say)
            renderer = Renderer(load_tokenizer(path), eos_token_ids(path))
            ids, conversations = read_split(dataset, "train")
        rendered, _ = render_records(ids[:SAMPLE], conversations[:SAMPLE], renderer, recipe.train)
        return job_of(rendered, recipe.adapter, recipe.train), len(ids)
    except MetierError as error:
        longest = recipe.train.max_seq_len
        typer.echo(f"data: not counted ({error.message}); every record is taken to be of {longest} tokens")
        dropout = recipe.adapter.dropout > 0
        return Job(longest, longest, 0.5, recipe.train.micro_batch_size, dropout=dropout), None


def _print_job(model: Any, recipe: Any, card: Any, job: Any, records: int | None) -> None:
    from metier.training.cards import GIB

    paths = {
        "generic": "generic path (transformers' own layers, plain LoRA linears)",
        "fused": "fused path (metier's kernels)",
    }
    weights = (model.layer_weights + model.other_weights) / 1e9
    typer.echo(f"model: {model.architecture}, {weights:.2f} B weights, {model.num_layers} layers; {paths[model.path]}")
    targets = recipe.adapter.target_modules
    named = targets if isinstance(targets, str) else ", ".join(targets)
    typer.echo(f"adapter: {named}, rank {recipe.adapter.rank}: {model.adapter_weights / 1e6:.2f} M weights")
    typer.echo(f"device: {card.name}, {card.memory_bytes / GIB:.1f} GiB{' free' if card.is_cpu else ''}")
    if records is not None:
        typer.echo(
            f"data: {records:,} training records, {job.mean_tokens:.0f} tokens on average, {job.longest} at most, "
            f"{100 * job.loss_share:.0f} % of them trained"
        )


def _print_choice(found: Any, card: Any) -> None:
    from metier.training.cards import GIB

    chosen = found.chosen
    shared = "" if chosen.shared_by == 1 else f", its layers shared by {chosen.shared_by} processes"
    how = f"recomputation: {chosen.recompute}, passes of {chosen.micro_batch_tokens} tokens"
    typer.echo(f"plan: base in {chosen.precision}{shared}, {how}")
    for part, size in chosen.memory.items():
        typer.echo(f"  {part:<26}{size / GIB:8.2f} GiB")
    each = "in all" if chosen.shared_by == 1 else "in all, each process"
    typer.echo(f"  {each:<26}{chosen.total_bytes / GIB:8.2f} of {card.memory_bytes / GIB:.1f} GiB")


def _key(way: Any) -> tuple[Any, ...]:
    return way.precision, way.shared_by, way.recompute, way.micro_batch_tokens


def _print_ways(all_ways: Any, rates: dict[tuple[Any, ...], float], card: Any) -> None:
    """The fastest way of each kind that fits, or the leanest where none does; memory and speed of one process."""
    from metier.training.cards import GIB
    from metier.training.plan import USED_AT_MOST

    typer.echo("ways: precision      recompute  tokens in a pass     GiB     tok/s")
    for group in dict.fromkeys(_key(way)[:3] for way in all_ways):
        ways = [way for way in all_ways if _key(way)[:3] == group]
        fitting = [way for way in ways if way.total_bytes <= USED_AT_MOST * card.memory_bytes]
        way = max(fitting, key=lambda w: rates[_key(w)]) if fitting else min(ways, key=lambda w: w.total_bytes)
        kept = way.precision + (f" / {way.shared_by}" if way.shared_by > 1 else "")
        typer.echo(
            f"      {kept:<15}{way.recompute:<11}{way.micro_batch_tokens:>16}"
            f"{way.total_bytes / GIB:>8.1f}{rates[_key(way)]:>10,.0f}{'' if fitting else '  does not fit'}"
        )


def _duration(recipe: Any, job: Any, records: int | None, rate: float) -> str:
    if records is None:
        return ""
    import torch

    from metier.training.schedule import make_plan

    steps = make_plan(recipe.train, records, 1024, torch.device("cpu"))
    tokens = steps.total_records * job.mean_tokens
    seconds = int(tokens / rate)
    return (
        f"; {steps.total_steps} steps, {tokens / 1e6:.2f} M tokens: {seconds // 3600} h {seconds % 3600 // 60:02d} min"
    )
