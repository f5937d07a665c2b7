"""Writes what the documentation says from what the code says: docs/cli.md, docs/recipe.md, and the READMEs' demo.

`make docs` writes; `--check` only compares and names what is stale. The demo's output is taken from the
newest benchmarks/results/demo_*.txt, which `metier demo` printed; no file, no output in the READMEs.
"""

from __future__ import annotations

import argparse
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from metier.cli import app
from metier.cli.app import ORDER
from metier.recipe import CLASSIC, Recipe

ROOT = Path(__file__).parents[1]
DEMO_BLOCK = re.compile(r"<!-- demo-output -->\n.*?<!-- /demo-output -->", re.DOTALL)


def main() -> int:
    """Writes or checks every generated file; exit code 1 when `--check` finds one that is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is stale")
    arguments = parser.parse_args()
    stale = [(path, text) for path, text in generated() if not path.exists() or path.read_text("utf-8") != text]
    for path, text in stale:
        name = path.relative_to(ROOT)
        if arguments.check:
            print(f"error: {name} is stale\nhint: make docs", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if arguments.check and stale else 0


def generated() -> Iterator[tuple[Path, str]]:
    """Every generated file with the text that it should have."""
    yield ROOT / "docs" / "cli.md", cli_page()
    yield ROOT / "docs" / "recipe.md", recipe_page()
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        block = f"<!-- demo-output -->\n{demo_output()}<!-- /demo-output -->"
        yield ROOT / name, DEMO_BLOCK.sub(block.replace("\\", r"\\"), text)


def demo_output() -> str:
    """The newest saved output of `metier demo` as a code block, or nothing."""
    saved = sorted((ROOT / "benchmarks" / "results").glob("demo_*.txt"), key=lambda p: (p.stem.split("_")[-1], p.stem))
    return f"```text\n{saved[-1].read_text(encoding='utf-8').rstrip()}\n```\n" if saved else ""


def cli_page() -> str:
    """docs/cli.md: `--help` of every command, as a terminal of 88 columns shows it."""
    parts = [
        "# The command line\n",
        "Generated from `metier --help` by `make docs`. Exit codes: 0, 2 (the user's to put right, told in a "
        "sentence), 1 (a fault of metier's), 130 and 143 (stopped by Ctrl-C or SIGTERM). Results go to standard "
        "output, talk to standard error.\n",
        _help([]),
    ]
    for name in ORDER:
        parts += [f"## metier {name}\n", _help([name])]
    return "\n".join(parts)


def _help(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="metier", terminal_width=88)
    if result.exit_code:
        raise RuntimeError(result.output)
    lines = [line.rstrip() for line in result.output.strip("\n").splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def recipe_page() -> str:
    """docs/recipe.md: one table a section, from the fields' own descriptions."""
    parts = [
        "# The recipe\n",
        "Generated from the code by `make docs`. A recipe is one YAML file; `base`, `out` and `data.sources` have no "
        "default. `--set section.key=value` overrides one value. *Classic* is what `preset: classic` changes: the "
        "tutorial's own values. The recipe as resolved, every value spelled out, is stored in the run's folder.\n",
        _section("The run", Recipe, ""),
    ]
    for name, field in Recipe.model_fields.items():
        if _is_section(field):
            parts.append(_section(name, typing.cast(type[BaseModel], field.annotation), f"{name}."))
    return "\n".join(parts)


def _section(title: str, model: type[BaseModel], prefix: str) -> str:
    classic: dict[str, Any] = CLASSIC.get(title, {})
    lines = [f"## {title}\n", f"{' '.join((model.__doc__ or '').split())}\n"]
    lines += ["| key | type | default | classic | meaning |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if _is_section(field):
            continue
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        other = f"`{_yaml(classic[name])}`" if name in classic and classic[name] != field.default else ""
        meaning = (field.description or "").replace("|", r"\|")
        kind = _type(field).replace("|", r"\|")
        lines.append(f"| `{prefix}{name}` | {kind} | {default} | {other} | {meaning} |")
    return "\n".join(lines) + "\n"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _yaml(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation, field.metadata)


def _type_name(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type in the reader's words, with its limits: `number > 0`, `auto or whole number >= 1`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner, *more = arguments
        limits = [m for item in more for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _type_name(inner, limits)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if arguments:
        return " or ".join(_type_name(a) for a in arguments if a is not NoneType)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    if annotation is str:
        return "text"
    limits = [f"{sign} {getattr(m, key)}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return f"{names[annotation]} {', '.join(limits)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
