"""The evaluation stage: dataset + adapter + base -> evidence.

In: RUN/dataset and RUN/adapter, and the loaded model, base and adapter in one. Out: RUN/evidence with
evidence.json (verdict, metrics, controls, slices, cost, limits) and items.parquet (every answer). Both
models answer the same test records; what is compared is paired (compare.py).

The same inputs give the same bytes: no times are written here, and floats are rounded to 12 digits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from metier import artifacts
from metier.errors import RunError
from metier.evaluation import controls, metrics, tasks, texts
from metier.evaluation.compare import compare
from metier.evaluation.metrics import Metric
from metier.evaluation.tasks import Answers, Item, Progress
from metier.recipe import EvaluateConfig

if TYPE_CHECKING:
    from metier.model.specialist import Specialist

# References of at most this many bytes (some five words, or ten Han characters) can be hit exactly.
SHORT_REFERENCE = 30
COST = ("trainable_parameters", "num_train_tokens", "num_train_records", "steps")


def evaluate(
    specialist: Specialist, *, dataset: Path, adapter: Path, config: EvaluateConfig, seed: int, out: Path, key: str,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Compares base and adapter on the test split and writes the artifact `out`; returns its manifest.

    `progress(what, done, total)` is called as the work goes on. Raises `RunError` when a parent artifact
    is missing or the disk is full, `DataError` without test records, `RecipeError` for a task that the
    dataset cannot be asked and `ModelError` when a model gives no finite likelihoods.
    """
    started = time.time()
    data, training = _manifest(dataset, "dataset"), _manifest(adapter, "adapter")
    test = tasks.read_items(dataset, "test")
    chosen = tasks.choose_items(test, max_items=config.max_items, seed=seed)
    asked = tasks.choose_tasks(config, data)
    labels = list(data["labels"])
    max_new_tokens = tasks.longest_answer(specialist, chosen, config) if asked != ["perplexity"] else 0
    items, left_out = tasks.leave_out(specialist, chosen, max_new_tokens)
    base, tuned = (
        tasks.ask(specialist, items, tasks=asked, labels=labels, max_new_tokens=max_new_tokens, use_adapter=use,
                  progress=progress)
        for use in (False, True)
    )  # fmt: skip
    progress("intervals", 0, 1)
    train, val = tasks.read_items(dataset, "train"), tasks.read_items(dataset, "val")
    measured = build_metrics(items, base, tuned, asked, labels)
    groups = [f"record {i.record_id}" if i.group_id is None else f"group {i.group_id}" for i in items]
    results = compare(measured, groups, resamples=config.bootstrap_samples, seed=seed)
    primary = _primary(items, asked)
    known = {metrics.normalise(i.prompt_text) for i in train}
    evidence: dict[str, Any] = {
        "schema": 1,
        "verdict": {"statement": "", "outcome": results[primary]["outcome"], "primary_metric": primary},
        "metrics": results,
        "controls": run_controls(train, val, items, tuned, groups, config.bootstrap_samples, seed),
        "slices": slices(measured, primary, items),
        "cost": _cost(training),
        "limits": [],
        "decoding": {
            "method": "greedy", "max_new_tokens": max_new_tokens,
            "base_cut": base.num_cut, "adapter_cut": tuned.num_cut,
        },
        "seed": seed,
        "n": len(items),
        "num_groups": len(set(groups)),
        "num_test_records": len(test),
        "left_out": left_out,
        "num_test_prompts_in_train": sum(metrics.normalise(i.prompt_text) in known for i in items),
        "labels_not_in_train": sorted({i.label for i in items if i.label} - {i.label for i in train}),
    }  # fmt: skip
    # The words are made from the numbers as they are stored, so that the report can make them again.
    evidence = round_floats(evidence)
    evidence["verdict"]["statement"] = texts.statement(evidence, "en")
    evidence["limits"] = texts.limits(evidence, "en")
    work = artifacts.work_folder(out, key)
    artifacts.write_json(work / "evidence.json", evidence)
    _write_items(work / "items.parquet", items, base, tuned)
    progress("intervals", 1, 1)
    return artifacts.complete(
        work, out, kind="evidence", key=key, config=config.model_dump(mode="json"),
        parents={"dataset": data["digest"], "adapter": training["digest"]}, started=started,
        details={"seed": seed, "n": len(items), "verdict": evidence["verdict"]},
    )  # fmt: skip


def build_metrics(
    items: list[Item], base: Answers, tuned: Answers, asked: list[str], labels: list[str]
) -> list[Metric]:
    """All metrics of the tasks that were asked, the most telling first."""
    references = [i.reference for i in items]
    truth = [i.label or "" for i in items]
    found: list[Metric] = []
    if base.labels is not None and tuned.labels is not None:
        found.append(metrics.proportion("accuracy", _equal(base.labels, truth), _equal(tuned.labels, truth)))
        f1 = [metrics.f1_statistics(side.labels or [], truth) for side in (base, tuned)]
        found.append(Metric("macro_f1", f1[0], f1[1], metrics.macro_f1))
    if base.completions is not None and tuned.completions is not None:
        sides = (base.completions, tuned.completions)
        name = "accuracy_generated" if "classification" in asked else "exact_match"
        found.append(metrics.proportion(name, *(metrics.exact_match(c, references) for c in sides)))
        if "classification" in asked:
            names = {metrics.normalise(label) for label in labels}
            invalid = [np.array([metrics.normalise(text) not in names for text in c], dtype=bool) for c in sides]
            found.append(metrics.proportion("invalid_share", invalid[0], invalid[1], up=False))
        if "generation" in asked:
            languages = [i.language for i in items]
            bleu = [metrics.bleu_statistics(c, references, languages) for c in sides]
            chrf = [metrics.chrf_statistics(c, references) for c in sides]
            found.append(Metric("bleu", bleu[0], bleu[1], metrics.bleu))
            found.append(Metric("chrf", chrf[0], chrf[1], metrics.chrf))
    for name, value in (("perplexity", metrics.perplexity), ("bits_per_byte", metrics.bits_per_byte)):
        per = "num_tokens" if name == "perplexity" else "num_bytes"
        pairs = [np.stack([side.nll, getattr(side, per)], axis=1) for side in (base, tuned)]
        found.append(Metric(name, pairs[0], pairs[1], value, higher_is_better=False))
    return found


def run_controls(
    train: list[Item], val: list[Item], items: list[Item], tuned: Answers, groups: list[str], resamples: int, seed: int
) -> dict[str, Any]:
    """How a constant answer and naive Bayes do, and by how much the adapter's labels are better.

    Empty unless the adapter's labels were asked for and there are train labels. `delta` is the adapter's
    accuracy minus the control's, `outcome` the adapter's against the control.
    """
    examples = [(i.prompt_text, i.label) for i in train if i.label is not None]
    if tuned.labels is None or not examples:
        return {}
    held_out = [(i.prompt_text, i.label) for i in val if i.label is not None]
    prompts = [i.prompt_text for i in items]
    truth = [i.label or "" for i in items]
    predictions = {
        "majority_class": controls.majority_class(examples, prompts),
        "naive_bayes": controls.naive_bayes(examples, held_out, prompts),
    }
    found = {}
    for name, predicted in predictions.items():
        accuracy = metrics.proportion("accuracy", _equal(predicted, truth), _equal(tuned.labels, truth))
        result = compare([accuracy], groups, resamples=resamples, seed=seed)["accuracy"]
        found[name] = {
            "accuracy": result["base"],
            "accuracy_ci95": result["base_ci95"],
            "macro_f1": float(metrics.macro_f1(metrics.f1_statistics(predicted, truth).sum(0))),
            **{k: result[k] for k in ("delta", "ci95", "outcome")},
        }
    return found


def slices(measured: list[Metric], primary: str, items: list[Item]) -> dict[str, dict[str, Any]]:
    """The primary metric by language, and by label where there are labels: {value: {base, adapter, n}}."""
    metric = next(m for m in measured if m.name == primary)
    found: dict[str, dict[str, Any]] = {}
    for name in ("language", "label"):
        values = np.array([getattr(i, name) or "" for i in items])
        found[name] = {
            str(value): {
                "base": float(metric.value(metric.base[values == value].sum(0))),
                "adapter": float(metric.value(metric.adapter[values == value].sum(0))),
                "n": int((values == value).sum()),
            }
            for value in np.unique(values[values != ""])
        }
    return found


def round_floats(value: Any) -> Any:
    """A JSON value with every float rounded to 12 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {k: round_floats(v) for k, v in value.items()}
    return [round_floats(v) for v in value] if isinstance(value, list) else value


def _manifest(folder: Path, kind: str) -> dict[str, Any]:
    manifest = artifacts.read_manifest(folder)
    if manifest is None or manifest.get("kind") != kind:
        stage = {"dataset": "prepare", "adapter": "train"}[kind]
        raise RunError(f"there is no complete {kind} at `{folder}`", hint=f"`metier {stage}` makes it")
    return manifest


def _primary(items: list[Item], asked: list[str]) -> str:
    if "classification" in asked:
        return "accuracy"
    if "generation" not in asked:
        return "perplexity"
    lengths = [len(i.reference.encode()) for i in items]
    return "exact_match" if float(np.median(lengths)) <= SHORT_REFERENCE else "chrf"


def _equal(predicted: Sequence[str], truth: Sequence[str]) -> npt.NDArray[np.bool_]:
    return np.array([p == t for p, t in zip(predicted, truth, strict=True)], dtype=bool)


def _cost(training: dict[str, Any]) -> dict[str, Any]:
    weights = training["files"].get("adapter_model.safetensors", {})
    cost = {name: training[name] for name in COST if name in training}
    return {**cost, "adapter_bytes": weights["bytes"]} if weights else cost


def _write_items(path: Path, items: list[Item], base: Answers, tuned: Answers) -> None:
    import polars as pl

    columns: dict[str, Any] = {
        "record_id": [i.record_id for i in items],
        "group_id": [i.group_id for i in items],
        "language": [i.language for i in items],
        "reference": [i.reference for i in items],
    }
    nothing = [None] * len(items)
    references, truth = columns["reference"], [i.label for i in items]
    for name, side in (("base", base), ("adapter", tuned)):
        columns[f"{name}_completion"] = side.completions or nothing
        columns[f"{name}_label"] = side.labels or nothing
        columns[f"{name}_nll"] = side.nll
        columns[f"{name}_correct"] = (
            [p == t for p, t in zip(side.labels, truth, strict=True)] if side.labels else nothing
        )
        generated = metrics.exact_match(side.completions, references).tolist() if side.completions else nothing
        columns[f"{name}_generated_correct"] = generated
    strings = {n: pl.String for n in columns if n.endswith(("_completion", "_label", "_id"))}
    columns["num_tokens"], columns["num_bytes"] = base.num_tokens.astype(np.int64), base.num_bytes.astype(np.int64)
    flags = {n: pl.Boolean for n in columns if n.endswith("_correct")}
    with artifacts.disk_errors(path):
        pl.DataFrame(columns, schema_overrides={**strings, **flags}).write_parquet(path)
