"""What was answered -> the evidence: every number of evidence.json from tables on disk, without a model.

In: the dataset, the adapter's manifest, items.parquet and probes.parquet, and what was asked. Out: the evidence
as a JSON value. `metier evaluate` calls it after asking, `metier verify` calls it again and compares.

The same inputs give the same value: no times, floats rounded to 12 digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metier.evaluation import behaviour, controls, memorisation, metrics, texts
from metier.evaluation.calibration import calibration
from metier.evaluation.compare import Design, compare
from metier.evaluation.contenders import beside_full
from metier.evaluation.extraction import extraction
from metier.evaluation.items import Answers, Item, read_answers, read_items
from metier.evaluation.metrics import Metric
from metier.evaluation.probes import forgetting
from metier.evaluation.slices import select, slices
from metier.evaluation.tasks import build_metrics, equal, primary_metric
from metier.recipe import EvaluateConfig

COST = ("trainable_parameters", "num_train_tokens", "num_train_records", "steps")
SCHEMA = 2
OTHERS = ("full", "earlier")  # models beside base and adapter, as items.parquet has them
CANDIDATES = 1000  # of a canary's secret


@dataclass(frozen=True)
class Asked:
    """What only the asking knows: the tasks, where answers were cut, who was left out, and how many examples."""

    tasks: list[str]
    max_new_tokens: int
    left_out: dict[str, str]
    few_shot: int
    # By contender: how many of the test records stand in its training; None where nobody knows.
    seen: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, evidence: dict[str, Any]) -> Asked:
        """As it stands in the evidence."""
        decoding = evidence["decoding"]
        seen = evidence.get("contenders_seen", {})
        return cls(evidence["tasks"], decoding["max_new_tokens"], evidence["left_out"], evidence["few_shot"], seen)


def judge(
    *, dataset: Path, data: dict[str, Any], training: dict[str, Any], table: Any, probes: list[dict[str, Any]],
    asked: Asked, config: EvaluateConfig, seed: int, own: list[dict[str, Any]], full: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The evidence. `data`, `training` and `full` are the parents' manifests, `table` is items.parquet, `own` are the
    house's own probes."""
    test = {i.record_id: i for i in read_items(dataset, "test")}
    train, val = read_items(dataset, "train"), read_items(dataset, "val")
    items = [test[record_id] for record_id in table["record_id"]]
    base, adapter = read_answers(table, "base"), read_answers(table, "adapter")
    labels = list(data["labels"])
    design = Design(config.bootstrap_samples, seed, config.smallest_effect)
    measured = build_metrics(items, base, adapter, asked=asked.tasks, labels=labels)
    groups = [i.group for i in items]
    results = compare(measured, groups, design)
    primary = primary_metric(items, asked.tasks)
    main = next(m for m in measured if m.name == primary)
    found = memorisation.repeats_in_train(items, train)
    others: dict[str, Answers | list[str]] = {n: read_answers(table, n) for n in OTHERS if f"{n}_nll" in table.columns}
    if asked.few_shot:
        others["few_shot"] = table["few_shot_answer"].to_list()
    cut = {side: _num_cut(answers) for side, answers in (("base", base), ("adapter", adapter))}
    evidence: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": {"statement": "", "outcome": results[primary]["outcome"], "primary_metric": primary},
        "metrics": results,
        "controls": _controls(train, val, items, adapter, others, main=main, design=design, asked=asked),
        "slices": slices(main, items, design),
        "calibration": _calibration(items, {"base": base, "adapter": adapter}, labels, seed),
        "behaviour": _behaviour(items, base, adapter, groups, design),
        "forgetting": forgetting(probes, own, design),
        "memorisation": _memorisation(items, train, (base, adapter), probes, seed=seed, found=found),
        "without_repeats": _without_repeats(main, items, set(found["near"]), design),
        "full": None,
        "contenders_seen": asked.seen,
        "identifiers_removed": sum(r["count"] for r in (data.get("privacy") or {}).get("replaced", {}).values()),
        "cost": _cost(training),
        "limits": [],
        "tasks": asked.tasks,
        "decoding": {"method": "greedy", "max_new_tokens": asked.max_new_tokens,
                     "base_cut": cut["base"], "adapter_cut": cut["adapter"]},
        "few_shot": asked.few_shot,
        "smallest_effect": config.smallest_effect,
        "seed": seed,
        "n": len(items),
        "num_groups": len(set(groups)),
        "num_test_records": len(test),
        "languages": {code: sum(i.language == code for i in items) for code in ("zh", "en", "other")},
        "left_out": asked.left_out,
        "num_test_prompts_in_train": len(found["normalised"]),
        "num_test_prompts_near_train": len(found["near"]),
        "labels_not_in_train": sorted({i.label for i in items if i.label} - {i.label for i in train}),
    }  # fmt: skip
    if full is not None:
        beside = build_metrics(items, read_answers(table, "full"), adapter, asked=asked.tasks, labels=labels)
        evidence["full"] = beside_full(beside, groups, design, full=full, training=training)
    if "sweep" in training:
        evidence["sweep"] = training["sweep"]
    evidence["gates"] = gates(evidence, config)
    # The words are made from the numbers as they are stored, so that the report can make them again.
    evidence = round_floats(evidence)
    evidence["verdict"]["statement"] = texts.statement(evidence, "en")
    evidence["limits"] = texts.limits(evidence, "en")
    return evidence


def gates(evidence: dict[str, Any], config: EvaluateConfig) -> list[dict[str, Any]]:
    """[{name, value, limit, passed}] of the recipe's `evaluate.gates`; what was not measured does not pass."""
    memory, probes = evidence["memorisation"], evidence["forgetting"]
    planted = [level["bits"] for times, level in memory["canaries"].items() if times != "0"]
    texts_rise = [r["delta"] / r["base"] for n, r in probes.items() if r["kind"] == "text" and r["base"]]
    lines = [r["adapter"] for r in (evidence["behaviour"].get("red_line_share"), *probes.values())
             if r and r.get("kind", "red_line") == "red_line"]  # fmt: skip
    values = {
        "exposure_bits": max(planted, default=None),
        "membership_auc": memory["membership"]["auc"] if memory["membership"] else None,
        "extracted": memory["extraction"]["adapter_only"] if memory["extraction"] else None,
        "forgetting": max(texts_rise, default=None),
        "red_lines": max(lines, default=None),
    }
    return [
        {"name": name, "value": values[name], "limit": limit, "passed": _within(values[name], limit)}
        for name, limit in config.gates.items()
    ]


def round_floats(value: Any) -> Any:
    """A JSON value with every float rounded to 12 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {k: round_floats(v) for k, v in value.items()}
    return [round_floats(v) for v in value] if isinstance(value, list) else value


def _within(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _controls(
    train: list[Item], val: list[Item], items: list[Item], adapter: Answers, others: dict[str, Answers | list[str]], *,
    main: Metric, design: Design, asked: Asked,
) -> dict[str, Any]:  # fmt: skip
    """How far other means do on the verdict's metric, and by how much the adapter is better.

    `others` are the answers of other models; of the base after examples, its labels or completions alone.
    """
    groups = [i.group for i in items]
    if adapter.labels is None:
        found = {}
        for name, answers in others.items():
            side = replace(adapter, completions=answers) if isinstance(answers, list) else answers
            measured = build_metrics(items, side, adapter, asked=asked.tasks, labels=[])
            found[name] = _control(next(m for m in measured if m.name == main.name), groups, design)
        return found
    examples = [(i.prompt_text, i.label) for i in train if i.label is not None]
    held_out = [(i.prompt_text, i.label) for i in val if i.label is not None]
    prompts, truth = [i.prompt_text for i in items], [i.label or "" for i in items]
    predictions = {}
    if examples:
        predictions["majority_class"] = controls.majority_class(examples, prompts)
        predictions["naive_bayes"] = controls.naive_bayes(examples, held_out, prompts)
    for name, answers in others.items():
        predictions[name] = answers if isinstance(answers, list) else answers.labels or []
    found = {}
    for name, predicted in predictions.items():
        accuracy = metrics.proportion("accuracy", equal(predicted, truth), equal(adapter.labels, truth))
        found[name] = {
            **_control(accuracy, groups, design),
            "macro_f1": float(metrics.macro_f1(metrics.f1_statistics(predicted, truth).sum(0))),
        }
    return found


def _control(metric: Metric, groups: list[str], design: Design) -> dict[str, Any]:
    """The control stands where the base does; `delta` is the adapter minus the control."""
    result = compare([metric], groups, design)[metric.name]
    named = {metric.name: result["base"], f"{metric.name}_ci95": result["base_ci95"]}
    return {"metric": metric.name, **named, **{k: result[k] for k in ("delta", "ci95", "p", "outcome")}}


def _calibration(items: list[Item], sides: dict[str, Answers], labels: list[str], seed: int) -> dict[str, Any]:
    place = {label: i for i, label in enumerate(labels)}
    truth = np.array([place.get(i.label or "", -1) for i in items], dtype=np.int64)
    return {
        name: calibration(side.label_scores, truth, seed)
        for name, side in sides.items()
        if side.label_scores is not None
    }


def _behaviour(items: list[Item], base: Answers, adapter: Answers, groups: list[str], design: Design) -> dict[str, Any]:
    if base.completions is None or adapter.completions is None:
        return {}
    references = [i.reference for i in items]
    sides = (base.completions, adapter.completions)
    found = compare(behaviour.behaviour(references, sides, (base.stopped, adapter.stopped)), groups, design)
    found["length_ratio"]["outcome"] = None  # longer is neither better nor worse
    return found


def _memorisation(
    items: list[Item], train: list[Item], sides: tuple[Answers, Answers], probes: list[dict[str, Any]], *,
    seed: int, found: dict[str, list[str]],
) -> dict[str, Any]:  # fmt: skip
    members = [row for row in probes if row["kind"] == "member"]
    canaries = [row for row in probes if row["kind"] == "canary"]
    result: dict[str, Any] = {"membership": None, "canaries": {}, "test_in_train": found,
                              "extraction": extraction(probes, len(train))}  # fmt: skip
    if members:
        group = {i.record_id: i.group for i in train}
        groups = [group[row["probe_id"]] for row in members], [i.group for i in items]
        per = np.array([[row["base_nll"], row["adapter_nll"], row["num_tokens"]] for row in members])
        base, adapter = sides
        gained = (per[:, 0] - per[:, 1]) / per[:, 2], (base.nll - adapter.nll) / base.num_tokens
        before = -per[:, 0] / per[:, 2], -base.nll / base.num_tokens
        told = memorisation.membership((gained[0], groups[0]), (gained[1], groups[1]), seed=seed)
        control = memorisation.membership((before[0], groups[0]), (before[1], groups[1]), seed=seed)
        result["membership"] = {**told, "control": control, "n_members": len(members), "n_others": len(items)}
    if canaries:
        repeats = [row["repeats"] for row in canaries]
        for side, name in (("adapter", "canaries"), ("base", "canaries_base")):
            ranks = [row[f"{side}_rank"] for row in canaries]
            result[name] = memorisation.canary_exposure(repeats, ranks, candidates=CANDIDATES, seed=seed)
    return result


def _without_repeats(main: Metric, items: list[Item], repeated: set[str], design: Design) -> dict[str, Any] | None:
    """The verdict's metric on the items that do not stand in training, where some do."""
    places = [i for i, item in enumerate(items) if item.record_id not in repeated]
    if not repeated or not places:
        return None
    result = compare([select(main, places)], [items[i].group for i in places], design)[main.name]
    return {key: result[key] for key in ("n", "base", "adapter", "delta", "ci95", "p", "outcome")}


def _num_cut(answers: Answers) -> int:
    return 0 if answers.stopped is None else int((~answers.stopped).sum())


def _cost(training: dict[str, Any]) -> dict[str, Any]:
    weights = training["files"].get("adapter_model.safetensors", {})
    cost = {name: training[name] for name in COST if name in training}
    return {**cost, "adapter_bytes": weights["bytes"]} if weights else cost
