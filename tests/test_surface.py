"""Tries to widen unnoticed what others rely on: a name, recipe key, option or manifest key is added here on purpose."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel
from typer.main import get_command

import metier
from metier.artifacts import complete, work_folder
from metier.cli import app
from metier.recipe import Recipe

PUBLIC_NAMES = ["Recipe", "deidentify", "evaluate", "export", "load", "prepare", "run", "serve", "train"]

RECIPE_KEYS = """
    base revision out preset seed domain
    scale.workers scale.ray
    data.sources data.test_sources data.encoding data.header_line data.sheets data.passage_chars
    data.prompt data.answer data.system data.history data.messages data.text data.group_id data.task
    data.val data.test data.canaries
    privacy.policy privacy.operators privacy.columns privacy.recognizers privacy.quasi_identifiers privacy.review
    clean.control clean.whitespace clean.width clean.html clean.script clean.mojibake clean.boilerplate
    clean.min_chars clean.max_chars clean.languages clean.contradictions
    dedup.exact dedup.near dedup.threshold dedup.benchmarks
    balance.classes balance.limit balance.sources balance.general balance.general_share
    augment.methods augment.copies augment.paraphrases
    adapter.rank adapter.alpha adapter.target_modules adapter.dropout adapter.bias adapter.use_rslora
    train.epochs train.max_steps train.micro_batch_size train.grad_accum_steps train.micro_batch_tokens
    train.max_seq_len train.over_length train.train_on train.learning_rate train.min_learning_rate train.warmup_ratio
    train.weight_decay train.max_grad_norm train.precision train.device train.log_every train.eval_every
    train.save_every train.report_to train.recompute
    evaluate.tasks evaluate.max_items evaluate.max_new_tokens evaluate.bootstrap_samples
    evaluate.smallest_effect evaluate.few_shot evaluate.forgetting evaluate.memorisation_items evaluate.gates
    sweep.ranges sweep.method sweep.trials sweep.halving sweep.at_once
    evaluate.own_probes evaluate.reference evaluate.earlier
    serve.redact serve.notice serve.refuse
"""

DECODING = "--max-new-tokens --seed --temperature --top-p"
COMMANDS = {
    "demo": "--data --out --set",
    "run": "recipe --out --set",
    "sweep": "recipe --out --set",
    "prepare": "recipe --out --set",
    "inspect": "recipe --records --set",
    "plan": "recipe --card --memory --processes --set --shape",
    "train": "recipe --out --set",
    "evaluate": "recipe --out --reference --set",
    "trace": "runs --subject",
    "forget": "run --subject",
    "generate": f"run --base --prompt --system {DECODING}",
    "export": "run --for --out --storage --to",
    "serve": "runs --host --port --api-key-file --guard --max-batch --max-new-tokens --request-seconds --precision "
    "--device",
    "compare": "runs --csv --language",
    "verify": "run --head",
    "chat": f"run --base --compare --system {DECODING}",
}

MANIFEST_KEYS = [
    "kind",
    "metier_version",
    "key",
    "digest",
    "config",
    "parents",
    "files",
    "libraries",
    "python",
    "machine",
    "timing",
]


def test_public_names_are_the_listed_ones() -> None:
    assert sorted(metier.__all__) == PUBLIC_NAMES
    assert sorted(dir(metier)) == PUBLIC_NAMES


def test_every_public_name_is_there() -> None:
    for name in PUBLIC_NAMES:
        assert callable(getattr(metier, name))


def test_recipe_keys_are_the_listed_ones() -> None:
    keys = []
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [f"{name}.{inner}" for inner in kind.model_fields]
        else:
            keys.append(name)
    assert sorted(keys) == sorted(RECIPE_KEYS.split())


def test_every_recipe_key_is_documented() -> None:
    for section in (Recipe, *(f.annotation for f in Recipe.model_fields.values())):
        if isinstance(section, type) and issubclass(section, BaseModel):
            for name, field in section.model_fields.items():
                is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
                assert is_section or field.description, name


def test_commands_and_their_options_are_the_listed_ones() -> None:
    found = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        options = [option for parameter in command.params for option in parameter.opts]
        found[name] = sorted(option for option in options if option not in ("--help", "-h"))
    assert found == {name: sorted(options.split()) for name, options in COMMANDS.items()}


def test_every_command_is_explained_with_an_example() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"Example: metier {name}" in (command.help or ""), name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_manifest_keys_are_the_listed_ones(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "a", "k")
    manifest = complete(work, tmp_path / "a", kind="t", key="k", config={}, parents={}, started=time.time(), details={})
    assert sorted(manifest) == sorted(MANIFEST_KEYS)
