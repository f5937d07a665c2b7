"""The Recipe: one YAML file that says what goes in, how it is trained and how it is judged.

Every field is documented here once; `docs/recipe.md` is generated from it. Unknown keys and wrong
values are refused with the line they stand on. `--set a.b=c` overrides one value, and the recipe as
resolved is stored with the run.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metier.errors import RecipeError, did_you_mean

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
# A share of the records (0.1), or a number of them (200).
Size = Annotated[int, Field(ge=0)] | Fraction


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversion between types, no change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the records come from, and what is the prompt and what the answer."""

    sources: list[str] = Field(
        min_length=1, description="Files or globs: CSV, TSV, JSON, JSONL or Parquet, relative to the recipe."
    )
    test_sources: list[str] = Field(
        default=[], description="Files that are the test split as they are; then nothing else becomes test."
    )
    prompt: str | None = Field(
        default=None,
        description="A column's name, or a template with columns in braces: `Classify: {text}`. "
        "Found by itself when absent.",
    )
    answer: str | None = Field(default=None, description="A column's name, or a template. Found by itself when absent.")
    system: str | None = Field(default=None, description="A system message for every record, or a column's name.")
    messages: str | None = Field(default=None, description="The column that holds whole conversations.")
    text: str | None = Field(default=None, description="The column of plain text, for training on text alone.")
    group_id: str | None = Field(
        default=None,
        description="The column that names the patient, client or category; no group crosses a split. "
        "Without it, records with the same prompt stay together.",
    )
    task: Literal["auto", "classification", "generation"] = Field(
        default="auto",
        description="`classification` when the answers are labels; `auto` decides by how few distinct answers "
        "there are.",
    )
    val: Size = Field(
        default=0.1, description="Records for choosing the best adapter: a share (0.1) or a number (200)."
    )
    test: Size = Field(default=0.1, description="Records for the verdict, seen once: a share (0.1) or a number (200).")


class AdapterConfig(Section):
    """W' = W + (alpha / rank) B A, with W frozen (Hu et al., 2021, arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1, le=4096, description="Columns of B and rows of A.")
    alpha: float = Field(default=32, gt=0, description="The update is scaled by alpha / rank.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        min_length=1,
        description="`all-linear` (every linear layer but the output head), or names such as [q_proj, v_proj].",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, in training only.")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which of the model's own bias terms are trained as well."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023, arXiv 2312.03732)."
    )


class TrainConfig(Section):
    """How the adapter is trained: one step updates it once, from micro_batch_size x grad_accum_steps records."""

    epochs: float = Field(default=3, gt=0, description="Passes over the training records.")
    max_steps: Count | None = Field(
        default=None, description="Stop the schedule at this many steps, if epochs are more."
    )
    micro_batch_size: Count = Field(
        default=16, description="Records in one forward and backward pass, packed without padding."
    )
    grad_accum_steps: Count = Field(default=1, description="Micro-batches in one step.")
    micro_batch_tokens: Count | Literal["auto"] = Field(
        default="auto",
        description="Tokens in one pass at most; a larger micro-batch is split, with the same result. "
        "`auto`: 1024 on a CPU, 8192 on a GPU.",
    )
    max_seq_len: int = Field(default=2048, ge=8, description="Tokens in one record at most.")
    over_length: Literal["reject", "cut_prompt"] = Field(
        default="reject",
        description="A longer record is left out and counted, or its prompt is cut at the end and counted; "
        "an answer is never cut.",
    )
    train_on: Literal["last_assistant", "all_assistant", "all_tokens"] = Field(
        default="last_assistant",
        description="Which tokens carry the loss; an answer's end-of-turn token belongs to it.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="The peak. `auto`: 5e-4 x (2000 / hidden size) ^ 0.781, i.e. 2.9e-4 for a 7B model."
    )
    min_learning_rate: float = Field(default=0.0, ge=0, description="eta_min, where the cosine ends.")
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps in which the rate rises linearly."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay, on the adapter.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient is scaled down to this norm.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="Of the frozen base and of the arithmetic; the adapter itself is fp32. `auto`: bf16 where the "
        "device has units for it, else fp16 on a GPU and fp32 on a CPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="`auto`: a GPU if there is one.")
    log_every: Count = Field(default=10, description="Steps between two lines of metrics.jsonl.")
    eval_every: Count | None = Field(
        default=None, description="Steps between two validations; default: ten times a run. The best adapter is kept."
    )
    save_every: Count = Field(default=100, description="Steps between two checkpoints; the last two are kept.")
    report_to: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="Send the metrics there too. Nothing is sent anywhere by default."
    )


class EvaluateConfig(Section):
    """How base and adapter are compared on the test split."""

    tasks: Literal["auto"] | list[Literal["classification", "generation", "perplexity"]] = Field(
        default="auto", min_length=1, description="`auto`: by the data: labels, open answers or plain text."
    )
    max_items: Count | None = Field(
        default=None, description="Test records at most; a seeded choice. Default: all of them."
    )
    max_new_tokens: Count | Literal["auto"] = Field(
        default="auto", description="Tokens in one generated answer at most. `auto`: what the longest reference needs."
    )
    bootstrap_samples: int = Field(default=10_000, ge=100, description="Resamples behind each 95 % interval.")


class Recipe(Section):
    """A whole run. Only `base`, `out` and `data.sources` have no default."""

    base: str = Field(
        min_length=1,
        description="`smollm2-135m`, a local folder, a GGUF file, or a hub id such as meta-llama/Llama-2-7b-chat-hf.",
    )
    revision: str | None = Field(default=None, description="A hub model's commit, tag or branch.")
    out: str = Field(min_length=1, description="The run's folder, relative to where metier is called.")
    preset: Literal["default", "classic"] = Field(
        default="default", description="`classic`: the tutorial's own values; what the recipe states wins over either."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Of the split, the adapter's start, the data's order and dropout."
    )
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        named = [n for n in ("messages", "text") if getattr(self.data, n)]
        if len(named) == 2 or (named and (self.data.prompt or self.data.answer)):
            raise ValueError("data: name either prompt and answer, or messages, or text, not several of them")
        peak = self.train.learning_rate
        if peak != "auto" and self.train.min_learning_rate > peak:
            raise ValueError("train.min_learning_rate is above train.learning_rate, where the cosine starts")
        return self

    def to_yaml(self) -> str:
        """The recipe with every value spelled out; reading it back gives an equal Recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# The tutorial's recipe, value for value. Its max length, 512, cuts the prompt there and never the answer here.
CLASSIC: dict[str, Any] = {
    "adapter": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "dropout": 0.05, "bias": "none"},
    "train": {
        "epochs": 3,
        "micro_batch_size": 4,
        "grad_accum_steps": 4,
        "learning_rate": 2e-4,
        "min_learning_rate": 0.0,
        "warmup_ratio": 0.0,
        "max_seq_len": 512,
        "over_length": "cut_prompt",
        "log_every": 50,
        "save_every": 500,
    },
}


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
    base = recipe.base
    is_path = base.startswith((".", "/", "~")) or base.endswith(".gguf") or os.path.exists(located(base))
    data = recipe.data.model_copy(update=sources)
    out = _as_path(os.path.expanduser(recipe.out), name)
    return recipe.model_copy(update={"data": data, "base": located(base) if is_path else base, "out": out})


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
