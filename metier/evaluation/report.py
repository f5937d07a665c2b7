"""RUN's artifacts -> RUN/report.html: one page that a department head reads and an engineer checks.

Self-contained: no scripts, no network, figures as inline SVG; light and dark, phone and paper. It speaks
Chinese when most records are Chinese, else English. Everything stems from the files of the run, and every
text from data or models is escaped and isolated from the direction of the text around it.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from metier import artifacts
from metier.errors import RunError
from metier.evaluation import overlap, plots, sections, texts
from metier.evaluation.search import read_trials, search_chart, search_rows
from metier.evaluation.texts import Language, show, show_delta, words
from metier.reasons import in_chinese

EXAMPLES = 8
EXAMPLE_CHARACTERS = 300
TOP_LABELS = 25


@dataclass(frozen=True)
class Run:
    """The files of a run, read; `training` is the adapter's manifest and `curve` its metrics.jsonl."""

    data: dict[str, Any]
    training: dict[str, Any]
    judged: dict[str, Any]
    evidence: dict[str, Any]
    curve: list[dict[str, Any]]
    items: list[dict[str, Any]]
    name: str
    base_name: str
    languages: list[str]
    exports: list[dict[str, Any]]
    trials: dict[str, Any] | None = None
    speaks: Language | None = None

    @property
    def language(self) -> Language:
        return self.speaks or ("zh" if self.languages[:1] == ["zh"] else "en")


def read_run(run: Path) -> Run:
    """Reads a finished run; each item carries its prompt. Raises `RunError` when a part is missing."""
    import polars as pl

    manifests = {}
    for kind, stage in (("dataset", "prepare"), ("adapter", "train"), ("evidence", "evaluate")):
        manifest = artifacts.read_manifest(run / kind)
        if manifest is None:
            raise RunError(f"there is no complete {kind} in `{run}`", hint=f"`metier {stage}` makes it")
        manifests[kind] = manifest
    records = pl.read_parquet(
        run / "dataset" / "records.parquet", columns=["record_id", "messages", "language", "label"]
    )
    counts = records["language"].value_counts().sort(["count", "language"], descending=[True, False])
    items = pl.read_parquet(run / "evidence" / "items.parquet").join(
        records.select("record_id", "messages", "label"), on="record_id", how="left", maintain_order="left"
    )
    recipe = _recipe(run)
    base = manifests["adapter"].get("base", {}).get("name") or str(recipe.get("base", "?"))
    return Run(
        data=manifests["dataset"],
        training=manifests["adapter"],
        judged=manifests["evidence"],
        evidence=json.loads((run / "evidence" / "evidence.json").read_text(encoding="utf-8")),
        curve=_curve(run / "adapter" / "metrics.jsonl"),
        items=items.to_dicts(),
        # Not the folder's: a run that was moved or renamed is still the same.
        name=Path(str(recipe.get("out", ""))).name or run.resolve().name,
        # A local folder's name says enough, and its path is nobody's business.
        base_name=Path(base).name if Path(base).is_absolute() else base,
        languages=counts["language"].to_list(),
        exports=[json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("export/*/PARITY.json"))],
        trials=read_trials(run, manifests["adapter"]),
    )


def write_report(run: Path) -> list[str]:
    """Writes `run`/report.html in the language of the records, and report.en.html or report.zh.html in the other.

    Returns their names; raises `RunError` when the run has no evidence yet.
    """
    made = pages(read_run(run))
    for name, page in made.items():
        artifacts.write_atomic(run / name, page.encode())
    return list(made)


def pages(found: Run) -> dict[str, str]:
    """The report's text in both languages, by file name."""
    other: Language = "en" if found.language == "zh" else "zh"
    return {"report.html": render(found), f"report.{other}.html": render(replace(found, speaks=other))}


def render(found: Run) -> str:
    """The report as HTML, in the language that `found` speaks."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(clip=_clip, svg=_safe_svg)
    return environment.get_template("report.html.j2").render(
        t=words(found.language),
        language=found.language,
        run=found,
        evidence=found.evidence,
        statement=texts.statement(found.evidence, found.language).replace(" %", "\N{NO-BREAK SPACE}%"),
        limits=texts.limits(found.evidence, found.language),
        results=_results(found),
        method=texts.method(found.evidence, found.judged["config"]["bootstrap_samples"], found.language),
        controls=_controls(found),
        worse_at=sections.worse_at(found.evidence, found.language),
        removed=_removed(found),
        privacy=_privacy_classes(found),
        rejected=_rejected(found),
        slices=sections.slice_rows(found.evidence, found.language),
        forgetting=sections.cost_rows(found.evidence["forgetting"], found.language),
        behaviour=sections.cost_rows(found.evidence["behaviour"], found.language),
        memory=sections.memory_rows(found.evidence, found.language),
        beside_full=sections.beside_full(found.evidence, found.language),
        exports=sections.export_rows(found.exports, found.training["digest"]),
        gates=sections.gate_rows(found.evidence, found.language),
        calibration=sections.calibration_text(found.evidence, found.language),
        without_repeats=_without_repeats(found),
        examples=_examples(found),
        search=search_rows(found.trials, found.language) if found.trials else None,
        figures=_figures(found),
        key=[label for label, _ in _top_labels(found)],
        cost=_cost(found),
        cut_at=EXAMPLE_CHARACTERS,
    )


def _results(found: Run) -> list[dict[str, Any]]:
    """The metrics table's rows, as text."""
    rows = []
    for name, result in found.evidence["metrics"].items():
        rows.append({
            "name": words(found.language)[name],
            "lower": not result["higher_is_better"],
            "base": show(name, result["base"]),
            "adapter": show(name, result["adapter"]),
            "outcome": result["outcome"],
            **_difference(found, name, result),
        })  # fmt: skip
    return rows


def _difference(found: Run, metric: str, result: dict[str, Any]) -> dict[str, str]:
    low, high = (show_delta(metric, v, found.language, unit=False) for v in result["ci95"])
    return {"delta": show_delta(metric, result["delta"], found.language), "low": low, "high": high}


def _without_repeats(found: Run) -> dict[str, Any] | None:
    result = found.evidence["without_repeats"]
    metric = found.evidence["verdict"]["primary_metric"]
    return sections.compared(metric, result, found.language) if result else None


def _controls(found: Run) -> list[dict[str, Any]]:
    table = words(found.language)
    rows = []
    for name, control in found.evidence["controls"].items():
        if name == "full":
            continue  # it has a section of its own
        metric = control["metric"]
        rows.append({"key": name, "name": table[name], "value": show(metric, control[metric]),
                     "outcome": control["outcome"], **_difference(found, metric, control)})  # fmt: skip
    return rows


def _examples(found: Run) -> dict[str, list[dict[str, Any]]]:
    """The items that changed most, by answer first and by likelihood among equals."""
    scored = []
    for item in found.items:
        bits = {s: item[f"{s}_nll"] / item["num_bytes"] / float(np.log(2)) for s in ("base", "adapter")}
        gain = bits["base"] - bits["adapter"]
        scored.append(((_change(item), gain), item, bits))
    scored.sort(key=lambda entry: entry[0], reverse=True)
    by_answer = any(item["base_label"] is not None or item["base_completion"] is not None for item in found.items)
    wins = [e for e in scored if (e[0][0] if by_answer else e[0][1]) > 0][:EXAMPLES]
    losses = [e for e in reversed(scored) if (e[0][0] if by_answer else e[0][1]) < 0][:EXAMPLES]
    return {name: [_example(found, item, bits) for _, item, bits in entries]
            for name, entries in (("wins", wins), ("losses", losses))}  # fmt: skip


def _change(item: dict[str, Any]) -> float:
    """How much better the adapter's answer is than the base's: right or wrong for labels, else chrF."""
    if item["base_label"] is not None:
        return float(item["adapter_correct"]) - float(item["base_correct"])
    if item["base_completion"] is None:
        return 0.0
    sides = [item["adapter_completion"], item["base_completion"]]
    adapter, base = overlap.chrf(overlap.chrf_statistics(sides, [item["reference"]] * 2))
    return float(adapter - base)


def _example(found: Run, item: dict[str, Any], bits: dict[str, float]) -> dict[str, str]:
    table = words(found.language)
    answers = {}
    for side in ("base", "adapter"):
        answer = item[f"{side}_label"] if item[f"{side}_label"] is not None else item[f"{side}_completion"]
        answers[side] = table["bits"].format(value=f"{bits[side]:.3f}") if answer is None else answer
    asked = [m["content"] for m in item["messages"][:-1] if m["role"] != "system"]
    return {"prompt": "\n".join(asked), "reference": item["reference"], **answers}


def _figures(found: Run) -> dict[str, str]:
    """SVG by name; a figure is left out where there is nothing to draw."""
    table = words(found.language)
    figures = {}
    rows = []
    for name, result in found.evidence["metrics"].items():
        sign = 1 if result["higher_is_better"] else -1
        low, high = sorted(sign * v for v in result["ci95"])
        label = f"{table[name]}: {sections.with_interval(name, result, found.language)}"
        rows.append((label, sign * result["delta"], low, high, result["outcome"]))
    figures["deltas"] = plots.delta_chart("deltas", rows, description=table["fig_deltas"])
    if parts := sections.slice_deltas(found.evidence, found.language):
        figures["slices"] = plots.delta_chart("slices", parts, description=table["fig_slices"], one_scale=True)
    if found.trials:
        figures["search"] = search_chart(found.trials, found.language)
    top = _top_labels(found)
    if top:
        sides = (table["base_model"], table["specialised"])
        description = table["fig_labels"].format(n=len(top))
        chart = [(label, e["base"], e["adapter"], e["n"]) for label, e in top]
        figures["labels"] = plots.label_chart("labels", chart, sides=sides, description=description)
    if len(found.evidence["slices"]["label"]) == len(top) > 1 and found.evidence["controls"]:
        figures["confusion"] = plots.confusion_chart(
            "confusion", _confusion(found, [label for label, _ in top]), description=table["fig_confusion"]
        )
    if found.evidence["calibration"]:
        curves = [
            (table[name], found.evidence["calibration"][side]["bins"])
            for name, side in (("base_model", "base"), ("specialised", "adapter"))
        ]
        figures["calibration"] = plots.reliability_chart(
            "calibration", curves, x_label=table["confidence"], description=table["fig_calibration"]
        )
    lines = [(table[key], *_series(found.curve, key)) for key in ("loss", "val_loss")]
    lines = [line for line in lines if line[1]]
    if lines:
        figures["loss"] = plots.line_chart("loss", lines, x_label=table["step"], description=table["fig_loss"])
        rate = _series(found.curve, "learning_rate")
        figures["rate"] = plots.line_chart("rate", [("", *rate)], x_label=table["step"], description=table["fig_rate"])
    return figures


def _top_labels(found: Run) -> list[tuple[str, dict[str, Any]]]:
    if found.evidence["verdict"]["primary_metric"] != "accuracy":
        return []
    labels = sorted(found.evidence["slices"]["label"].items(), key=lambda entry: (-entry[1]["n"], entry[0]))
    return labels[:TOP_LABELS]


def _confusion(found: Run, labels: list[str]) -> np.ndarray[Any, Any]:
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for item in found.items:
        if item["label"] in place and item["adapter_label"] in place:
            counts[place[item["label"]], place[item["adapter_label"]]] += 1
    return counts


def _removed(found: Run) -> list[tuple[str, int]]:
    """What preparation took out of the texts: identifiers by type, the most frequent first."""
    replaced = (found.data.get("privacy") or {}).get("replaced", {})
    return sorted(((name, entry["count"]) for name, entry in replaced.items()), key=lambda e: (-e[1], e[0]))


def _privacy_classes(found: Run) -> tuple[str, list[tuple[str, str, str]]]:
    """The law, and its classes: which, how many identifiers were replaced, and whether all that was found was."""
    privacy = found.data.get("privacy") or {}
    table, language = words(found.language), found.language
    rows = [
        (
            f"{entry['letter']} {entry.get(f'what_{language}', entry['what'])}",
            f"{entry['replaced']:,}" if "replaced" in entry else "-",
            f"{table['class_' + entry['status'].replace(' ', '_')]} {', '.join(entry.get('kept', ()))}".rstrip(),
        )
        for entry in privacy.get("classes", [])
    ]
    return str(privacy.get("law_in", {}).get(language, privacy.get("law", ""))), rows


def _rejected(found: Run) -> list[tuple[str, int]]:
    """The reasons why rows were rejected, in the reader's language, and how many rows each."""
    counts = sorted(found.data["rejected_by_reason"].items())
    return [(in_chinese(reason) if found.language == "zh" else reason, count) for reason, count in counts]


def _cost(found: Run) -> list[tuple[str, str]]:
    table = words(found.language)
    rows = [
        (table[name], f"{value / 1e6:,.1f} MB" if name == "adapter_bytes" else f"{value:,}")
        for name, value in found.evidence["cost"].items()
    ]
    seconds = found.training.get("train_seconds", found.training["timing"]["seconds"])
    rows.append((table["time"], sections.duration(seconds, found.language)))
    if found.training.get("peak_memory_bytes"):
        rows.append((table["peak_memory_bytes"], sections.gibibytes(found.training["peak_memory_bytes"])))
    rows.append((table["energy"], sections.energy(found.training, seconds, found.language)))
    speeds = _series(found.curve, "tok_per_sec")[1]
    if speeds:
        rows.append((table["speed"], f"{statistics.median(speeds):,.0f}"))
    device = found.training.get("device", "")
    rows.append((table["machine"], ", ".join(part for part in (found.training["machine"], device) if part)))
    return rows


def _curve(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _series(curve: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(line["step"], line[key]) for line in curve if line.get(key) is not None]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def _recipe(run: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load((run / "recipe.yaml").read_bytes())
    except (OSError, yaml.YAMLError):
        return {}  # missing or altered; `metier verify` says so
    return found if isinstance(found, dict) else {}


def _clip(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"


def _safe_svg(text: str) -> Any:
    """Our own figures, whose words were escaped when they were put in."""
    from markupsafe import Markup

    return Markup(text)
