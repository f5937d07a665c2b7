"""The verbs that make a run: demo, run, prepare, inspect, train, evaluate."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from metier.cli.app import app
from metier.cli.options import Out, RecipePath, Set, terminal
from metier.errors import RecipeError


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="icd10cm (English, medical coding) or china-law (Chinese, legal).")
    ] = "icd10cm",
    out: Out = None,
    set_: Set = None,
) -> None:
    """Run the whole of metier on bundled data with the embedded base model: a few minutes on two cores.

    Example: metier demo --data china-law
    """
    from metier.errors import did_you_mean

    bundled = Path(__file__).parents[1] / "bundled"
    names = {"icd10cm": "icd10cm.yaml", "china-law": "china_law.yaml"}
    if data not in names:
        raise RecipeError(
            f"there is no demo data `{data}`{did_you_mean(data, list(names))}; there is {', '.join(names)}"
        )
    run(bundled / names[data], set_, out)


@app.command()
def run(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Do everything: data set, training, evaluation, report. What is up to date is left alone.

    Example: metier run recipe.yaml --set train.epochs=1 --out runs/short
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    loaded = load_recipe(recipe, set_, out)
    report = pipeline.run(loaded, terminal())
    if pipeline.is_follower():
        return
    evidence = json.loads((Path(loaded.out) / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    print_verdict(evidence)
    typer.echo(f"report: {report}")


@app.command()
def prepare(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Make the data set alone: read, reject with reasons, split.

    Example: metier prepare recipe.yaml
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    folder = pipeline.prepare(load_recipe(recipe, set_, out), terminal())
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    _print_counts(manifest)
    typer.echo(f"data set: {folder}")


@app.command()
def inspect(
    recipe: RecipePath,
    set_: Set = None,
    records: Annotated[int, typer.Option(min=1, help="Records to show token by token.")] = 3,
) -> None:
    """Show what would be trained: the columns found, the counts, and the first records token by token.

    Trained tokens are coloured and masked ones dim; without colours, [[ ]] stands around what is trained. Nothing is
    written.

    Example: metier inspect recipe.yaml --records 5
    """
    from rich.console import Console
    from rich.text import Text

    from metier.data.prepare import prepare as prepare_stage
    from metier.data.terms import chinese_cost, token_cost
    from metier.domains import load_domain
    from metier.model.chat import IGNORE_INDEX, Renderer, eos_token_ids
    from metier.model.load import load_tokenizer
    from metier.model.resolve import resolve_base
    from metier.recipe import load_recipe
    from metier.terminal import tokens_as_text
    from metier.training.labels import render_records
    from metier.training.train import read_split

    loaded, ui = load_recipe(recipe, set_, None), terminal()
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "dataset"
        _print_counts(prepare_stage(loaded, out=dataset, progress=ui.say))
        path = resolve_base(loaded.base, loaded.revision, progress=ui.say)
        renderer = Renderer(load_tokenizer(path), eos_token_ids(path))
        if loaded.domain:
            for line in token_cost(load_domain(loaded.domain), renderer.tokenizer.encode):
                typer.echo(line)
        console = Console(highlight=False, soft_wrap=True)
        for split in ("train", "val", "test"):
            ids, conversations = read_split(dataset, split)
            if split == "train" and not loaded.domain:
                texts = [turn["content"] for turns in conversations[:200] for turn in turns]
                for line in chinese_cost(texts, renderer.tokenizer.encode):
                    typer.echo(line)
            rendered, report = render_records(ids, conversations, renderer, loaded.train)
            typer.echo(
                f"{split}: {report.num_records} records, {report.num_tokens} tokens, {report.num_loss_tokens} of them "
                f"trained, longest {report.longest}; {len(report.cut_prompts)} prompts cut "
                f"({sum(report.cut_prompts.values())} tokens), "
                f"{len(report.left_out)} left out"
            )
            shown = rendered[:records] if split == "train" else []
            for record_id, one in zip([i for i in ids if i not in report.left_out], shown, strict=False):
                console.print(
                    Text(f"\nrecord {record_id}: {one.num_loss_tokens} of {one.num_tokens} tokens are trained")
                )
                is_trained = [n != IGNORE_INDEX for n in one.labels]
                colours = console.color_system is not None
                console.print(tokens_as_text(renderer.tokenizer, one.input_ids, is_trained, colours))
    typer.echo("labels: every prompt is masked, every answer and its stop token is trained")


@app.command()
def train(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Train the adapter on a data set that is there; a stopped run goes on where it was.

    Example: metier train recipe.yaml --set train.learning_rate=2e-4
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    folder = pipeline.train(load_recipe(recipe, set_, out), terminal())
    if not pipeline.is_follower():
        typer.echo(f"adapter: {folder}")


@app.command()
def evaluate(
    recipe: RecipePath,
    set_: Set = None,
    out: Out = None,
    reference: Annotated[
        str | None, typer.Option(help="full: train all weights by the same recipe too, and put LoRA beside it.")
    ] = None,
) -> None:
    """Compare base and adapter on the test split, and write the report.

    Example: metier evaluate recipe.yaml --reference full
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    also = [f"evaluate.reference={reference}"] if reference else []
    folder = pipeline.evaluate(load_recipe(recipe, [*(set_ or []), *also], out), terminal())
    print_verdict(json.loads((folder / "evidence.json").read_text(encoding="utf-8")))


def _print_counts(manifest: dict[str, Any]) -> None:
    counts, splits = manifest["counts"], manifest["splits"]
    typer.echo(
        f"{counts['rows']} rows = {counts['kept']} kept + {counts['merged']} merged + {counts['rejected']} rejected"
        + (f"; {counts['synthetic']} synthetic records for training" if counts["synthetic"] else "")
    )
    for method, number in manifest["synthetic_by_method"].items():
        typer.echo(f"  synthetic {number}: {method}")
    for reason, number in manifest["rejected_by_reason"].items():
        typer.echo(f"  rejected {number}: {reason}; such as {', '.join(manifest['rejected_examples'][reason])}")
    for role, found in manifest["roles"].items():
        typer.echo(f"  {role}: {found}")
    for column in manifest["columns"]:
        if column["by"] != "taken" and column["role"]:
            typer.echo(f"  `{column['column']}` may be {column['role']} ({column['confidence']}, by {column['by']})")
    for source in manifest["sources"]:
        how = "; ".join(source[key] for key in ("encoding", "dialect", "note") if key in source)
        typer.echo(f"  {source['file']}: {source['rows']} rows" + (f", {how}" if how else ""))
    for rule, found in manifest["cleaning"].items():
        if found["records"]:
            setting = {True: "on", False: "off"}.get(found["setting"], found["setting"])
            typer.echo(f"  clean.{rule} ({setting}): {found['records']} records, such as {found['examples'][0]}")
    _print_leakage(manifest)
    typer.echo(f"task: {manifest['task']}; " + ", ".join(f"{name} {number}" for name, number in splits.items()))


def _print_leakage(manifest: dict[str, Any]) -> None:
    found, by_row = manifest["leakage"]["shared_with_train"], manifest["leakage"]["if_split_by_row"]
    kinds = {"prompt": "the same prompt", "group_id": "the same group_id", "near_duplicate": "a near-duplicate"}
    if not manifest["leakage"]["near_duplicates_searched"]:
        del kinds["near_duplicate"]
    shown = ", ".join(f"{words} {found[kind]} (by row {by_row[kind]})" for kind, words in kinds.items())
    typer.echo(f"  held-out records with their like in train: {shown}")
    if manifest["label_conflicts"]:
        typer.echo(
            f"  the same or nearly the same text with different labels: {manifest['label_conflicts']} pairs, in "
            "conflicts.parquet"
        )
    if domain := manifest.get("domain"):
        typer.echo(
            f"  domain {domain['name']}: {domain['terms_found']} of {domain['terms']} terms stand in "
            f"{domain['records_with_a_term']} records"
        )


def print_verdict(evidence: dict[str, Any]) -> None:
    for name, metric in evidence["metrics"].items():
        low, high = metric["ci95"]
        typer.echo(
            f"{name}: base {metric['base']:.4g}, adapter {metric['adapter']:.4g}, "
            f"difference {metric['delta']:+.4g} (95 % interval {low:+.4g} to {high:+.4g}, n = {metric['n']})"
        )
    typer.echo(f"verdict: {evidence['verdict']['statement']}")
