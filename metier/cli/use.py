"""The verbs that use a run: generate, chat."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from metier.cli.app import app
from metier.cli.options import MaxNewTokens, Run, Seed, System, Temperature, TopP, UseBase, terminal
from metier.errors import RecipeError


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
    model = load(run, say=terminal().say)
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
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask base and adapter, and show both side by side.")
    ] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to the adapter, or with --base to the base model. An empty line or Ctrl-D ends it; /new starts afresh.

    Example: metier chat runs/icd10cm --compare
    """
    if compare:
        _compare(run, system, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        return
    from metier.model.specialist import load
    from metier.terminal import AnswerPrinter

    model = load(run, say=terminal().say)
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


def _compare(run: str, system: str | None, max_new_tokens: int, **sampling: float) -> None:
    from metier.cli.compare import comparing
    from metier.serving.models import open_models
    from metier.serving.sampling import Sampling

    start, drawn = _conversation(None, system), Sampling(**sampling)  # type: ignore[arg-type]
    with comparing(open_models([run], guarded=False, say=terminal().say)) as sides:
        for name in sides.histories:
            sides.histories[name] = list(start)
        while line := _ask():
            if line == "/new":
                sides.histories = {name: list(start) for name in sides.histories}
                continue
            sides.ask(_conversation(line, None), max_new_tokens, drawn)


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
