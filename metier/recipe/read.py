"""YAML -> Recipe: the file, its overrides and its paths; what is wrong in it is told with its line."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from metier.errors import RecipeError, did_you_mean
from metier.recipe.recipe import CLASSIC, Recipe


def load_recipe(path: Path, overrides: list[str] | None = None, out: str | None = None) -> Recipe:
    """Reads and validates a recipe file, with `a.b=c` overrides applied and sources made absolute.

    Raises `RecipeError` for a missing file, broken YAML, an unknown key or a wrong value; the message
    names the file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        hint = "`metier demo` shows one; recipes/ holds more"
        raise RecipeError(f"there is no recipe at `{path}`", hint=hint) from None
    except IsADirectoryError:
        raise RecipeError(f"`{path}` is a folder, and a recipe is a YAML file") from None
    except OSError as error:
        raise RecipeError(f"`{path}` cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"`{path}` is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return parse_recipe(text, name=str(path), folder=path.parent, overrides=overrides or [], out=out)


def parse_recipe(
    text: str, *, name: str, folder: Path, overrides: list[str] | None = None, out: str | None = None
) -> Recipe:
    """A Recipe from YAML text. `name` stands in errors; relative sources are under `folder`."""
    try:
        tree = yaml.compose(io.StringIO(text), Loader=yaml.SafeLoader)
        values = yaml.load(io.StringIO(text), Loader=_NumberLoader)
    except RecursionError:
        raise RecipeError(f"`{name}` is nested too deeply to be a recipe") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        hint = "a recipe has at least base:, out: and data: {sources: [...]}"
        raise RecipeError(f"`{name}` holds no recipe", hint=hint)
    for override in overrides or []:
        _apply(values, override)
    if out is not None:
        values["out"] = out
    merged = _merge(CLASSIC, values) if values.get("preset") == "classic" else values
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_explain(error, name, tree, overrides or [])) from None

    def located(path: str) -> str:
        return _as_path(str((folder / os.path.expanduser(path)).absolute()), name)

    sources = {name: [located(s) for s in getattr(recipe.data, name)] for name in ("sources", "test_sources")}
    dedup = recipe.dedup.model_copy(update={"benchmarks": [located(s) for s in recipe.dedup.benchmarks]})
    balance = recipe.balance.model_copy(update={"general": [located(s) for s in recipe.balance.general]})
    is_file = recipe.domain is not None and recipe.domain.endswith((".yaml", ".yml"))
    own = recipe.privacy.policy.endswith((".yaml", ".yml"))
    privacy = recipe.privacy.model_copy(update={"policy": located(recipe.privacy.policy)}) if own else recipe.privacy
    domain = located(recipe.domain) if recipe.domain and is_file else recipe.domain
    base = recipe.base
    is_path = base.startswith((".", "/", "~")) or base.endswith(".gguf") or os.path.exists(located(base))
    data = recipe.data.model_copy(update=sources)
    out = _as_path(os.path.expanduser(recipe.out), name)
    return recipe.model_copy(
        update={
            "data": data, "privacy": privacy, "dedup": dedup, "balance": balance, "domain": domain, "out": out,
            "base": located(base) if is_path else base,
        }
    )  # fmt: skip


def _as_path(text: str, name: str) -> str:
    """`text`, where a path can be kept as text. Raises `RecipeError` for what is not UTF-8, and for NUL."""
    if "\0" in text or text.encode(errors="replace").decode() != text:
        raise RecipeError(f"{name}: the path {text!a} is not UTF-8 or holds NUL", hint="rename the file or folder")
    return text


class _NumberLoader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML follows 1.1: `2e-4` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in lines:
                problem = f"`{key.value}` stands on line {lines[key.value]} already"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_NumberLoader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"`--set {override}`: expected key=value, such as `--set train.epochs=1`")
    try:
        value = yaml.load(io.StringIO(text), Loader=_NumberLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, dict):
        value = text  # `Classify: {text}` is a template; an override sets one value, never a section
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"`--set {override}`: `{section}` is a value, not a section")
        values = inner
    values[last] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(error: ValidationError, name: str, tree: yaml.Node | None, overrides: list[str]) -> str:
    """One sentence per wrong place, with its line or override; a union's several complaints become one."""
    sentences: dict[tuple[str, ...], str] = {}
    set_keys = {override.partition("=")[0]: override for override in overrides}
    for item in error.errors():
        place = _fields_only(item["loc"])
        line = _line(tree, place)
        key = ".".join(place)
        override = next(
            (o for k, o in set_keys.items() if f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.")), None
        )
        where = f"`--set {override}`" if override else f"{name}, line {line}" if line else name
        if item["type"] == "extra_forbidden":
            known = _fields_of(place[:-1])
            sentence = f"{where}: unknown key `{key}`{did_you_mean(place[-1], known)}; known here: {', '.join(known)}"
        elif item["type"] == "missing":
            sentence = f"{where}: `{key}` is missing; it has no default"
        elif item["type"] == "value_error":
            sentence = f"{where}: {item['ctx']['error']}"
        else:
            sentence = f"{where}: `{key}` is {item['input']!r:.60}; {_lower(item['msg'])}"
            if place in sentences:
                sentence = f"{sentences[place]}, or {_lower(item['msg'])}"
        sentences[place] = sentence
    deepest = [p for p in sentences if not any(q[: len(p)] == p for q in sentences if q != p)]
    return "\n".join(sentences[p] for p in deepest)


def _lower(message: str) -> str:
    message = message.removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _fields_only(location: tuple[str | int, ...]) -> tuple[str, ...]:
    """A pydantic location without the union branches that it ends in."""
    place: list[str] = []
    model: Any = Recipe
    for part in location:
        fields = getattr(model, "model_fields", None)
        if fields is None:
            if isinstance(part, int):
                place.append(str(part))
            continue
        place.append(str(part))
        model = fields[part].annotation if part in fields else None
    return tuple(place)


def _fields_of(place: tuple[str, ...]) -> list[str]:
    model: Any = Recipe
    for part in place:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _line(tree: yaml.Node | None, place: tuple[str, ...]) -> int | None:
    """The line (from 1) of the deepest part of `place` that stands in the file, or None."""
    line = None
    for part in place:
        if isinstance(tree, yaml.MappingNode):
            found = next(((k, v) for k, v in tree.value if k.value == part), None)
            if found is None:
                break
            line, tree = found[0].start_mark.line + 1, found[1]
        elif isinstance(tree, yaml.SequenceNode) and part.isdigit() and int(part) < len(tree.value):
            tree = tree.value[int(part)]
            line = tree.start_mark.line + 1
        else:
            break
    return line
