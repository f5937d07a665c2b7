"""The command line: one thin command per verb. Exit code 0, 2 (the user's to mend) or 1 (ours)."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from metier.errors import Interrupted, MetierError, RecipeError

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

    bundled = Path(__file__).parent / "bundled"
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
    report = pipeline.run(loaded, _terminal())
    evidence = json.loads((Path(loaded.out) / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    _print_verdict(evidence)
    typer.echo(f"report: {report}")


@app.command()
def prepare(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Make the data set alone: read, reject with reasons, split.

    Example: metier prepare recipe.yaml
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    folder = pipeline.prepare(load_recipe(recipe, set_, out), _terminal())
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

    Trained tokens are coloured, masked ones are dim. Nothing is written.

    Example: metier inspect recipe.yaml --records 5
    """
    from rich.console import Console
    from rich.text import Text

    from metier.data.prepare import prepare as prepare_stage
    from metier.model.chat import IGNORE_INDEX, Renderer, eos_token_ids
    from metier.model.load import load_tokenizer
    from metier.model.resolve import resolve_base
    from metier.recipe import load_recipe
    from metier.terminal import tokens_as_text
    from metier.training.labels import render_records
    from metier.training.train import read_split

    loaded, terminal = load_recipe(recipe, set_, None), _terminal()
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "dataset"
        _print_counts(prepare_stage(loaded.data, seed=loaded.seed, out=dataset, progress=terminal.say))
        path = resolve_base(loaded.base, loaded.revision, progress=terminal.say)
        renderer = Renderer(load_tokenizer(path), eos_token_ids(path))
        console = Console(highlight=False, soft_wrap=True)
        for split in ("train", "val", "test"):
            ids, conversations = read_split(dataset, split)
            rendered, report = render_records(ids, conversations, renderer, loaded.train)
            typer.echo(
                f"{split}: {report.num_records} records, {report.num_tokens} tokens, {report.num_loss_tokens} of them "
                f"trained, longest {report.longest}; {len(report.cut_prompts)} prompts cut, "
                f"{len(report.left_out)} left out"
            )
            shown = rendered[:records] if split == "train" else []
            for record_id, one in zip([i for i in ids if i not in report.left_out], shown, strict=False):
                console.print(
                    Text(f"\nrecord {record_id}: {one.num_loss_tokens} of {one.num_tokens} tokens are trained")
                )
                console.print(
                    tokens_as_text(renderer.tokenizer, one.input_ids, [n != IGNORE_INDEX for n in one.labels])
                )
    typer.echo("labels: every prompt is masked, every answer and its stop token is trained")


@app.command()
def train(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Train the adapter on a data set that is there; a stopped run goes on where it was.

    Example: metier train recipe.yaml --set train.learning_rate=2e-4
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    typer.echo(f"adapter: {pipeline.train(load_recipe(recipe, set_, out), _terminal())}")


@app.command()
def evaluate(recipe: RecipePath, set_: Set = None, out: Out = None) -> None:
    """Compare base and adapter on the test split, and write the report.

    Example: metier evaluate recipe.yaml --set evaluate.max_items=200
    """
    from metier import pipeline
    from metier.recipe import load_recipe

    folder = pipeline.evaluate(load_recipe(recipe, set_, out), _terminal())
    _print_verdict(json.loads((folder / "evidence.json").read_text(encoding="utf-8")))


@app.command()
def generate(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times. Else: stdin, one a line.")
    ] = None,
    system: System = None,
    base: UseBase = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Answer prompts: the text of one prompt's answer, or a JSON object a line for several.

    The prompt is what the user says; a recipe's template is not applied to it.

    Example: metier generate runs/icd10cm --system "ICD-10 chapter" --prompt "Acute bronchitis"
    """
    from metier.model.specialist import load

    try:
        prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError:
        raise _not_utf8("a line of stdin") from None
    if not prompts:
        raise RecipeError("there is no prompt", hint='give --prompt "..." or lines on stdin')
    model = load(run, say=_terminal().say)
    answers = model.generate(
        [_conversation(text, system) for text in prompts], use_adapter=not base, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    for text, answer in zip(prompts, answers, strict=True):
        line = answer if len(prompts) == 1 else json.dumps({"prompt": text, "completion": answer}, ensure_ascii=False)
        typer.echo(line)


@app.command()
def chat(
    run: Run,
    system: System = None,
    base: UseBase = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to the adapter, or with --base to the base model. An empty line or Ctrl-D ends it; /new starts afresh.

    Example: metier chat runs/icd10cm
    """
    from metier.model.specialist import load
    from metier.terminal import AnswerPrinter

    model = load(run, say=_terminal().say)
    start = _conversation(None, system)
    messages = list(start)
    while line := _ask():
        if line == "/new":
            messages = list(start)
            continue
        messages += _conversation(line, None)
        [answer] = model.complete(
            [messages], use_adapter=not base, streamer=AnswerPrinter(model.renderer.decode),
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        messages.append({"role": "assistant", "content": answer.text})


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise _not_utf8("the line") from None


def _conversation(prompt: str | None, system: str | None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}] if prompt is not None else []
    for message in messages:
        # Python hands bytes that are no text on as halves of surrogate pairs.
        if message["content"].encode(errors="replace").decode() != message["content"]:
            raise _not_utf8("the prompt" if message["role"] == "user" else "the system message")
    return messages


def _not_utf8(what: str) -> RecipeError:
    return RecipeError(f"{what} is not UTF-8", hint="set the terminal to UTF-8, or convert the text with iconv")


def _print_counts(manifest: dict[str, Any]) -> None:
    counts, splits = manifest["counts"], manifest["splits"]
    typer.echo(f"{counts['rows']} rows = {counts['kept']} kept + {counts['rejected']} rejected")
    for reason, number in manifest["rejected_by_reason"].items():
        typer.echo(f"  rejected {number}: {reason}")
    for role, found in manifest["roles"].items():
        typer.echo(f"  {role}: {found}")
    typer.echo(f"task: {manifest['task']}; " + ", ".join(f"{name} {number}" for name, number in splits.items()))


def _print_verdict(evidence: dict[str, Any]) -> None:
    for name, metric in evidence["metrics"].items():
        low, high = metric["ci95"]
        typer.echo(
            f"{name}: base {metric['base']:.4g}, adapter {metric['adapter']:.4g}, "
            f"difference {metric['delta']:+.4g} (95 % interval {low:+.4g} to {high:+.4g}, n = {metric['n']})"
        )
    typer.echo(f"verdict: {evidence['verdict']['statement']}")


def _terminal() -> Any:
    from metier.terminal import Terminal

    return Terminal()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number, "stopped; what was complete is intact")


def main() -> None:
    """The console script: runs a command and turns errors into sentences and exit codes."""
    # Two threads that spin while they wait for each other collapse on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except MetierError as error:
        _fail(f"error: {error}", error.exit_code)
    except Interrupted as error:
        _fail(error.message, error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        # Of a file that no stage expected to fail on: a name too long, no permission to read, ...
        _fail(f"error: `{error.filename}`: {error.strerror}", MetierError.exit_code)


def _fail(text: str, exit_code: int) -> None:
    # The name of a file may hold bytes that are no text.
    print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.exit(exit_code)
