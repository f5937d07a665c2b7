"""RUN/evidence and its parents -> RUN/MODEL_CARD.md, a Hugging Face model card with a model-index.

The front matter is what the hub reads (library_name, base_model, language, model-index); the text
below says what the adapter is for, what it was trained on, how it did and what was not shown.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from metier import artifacts
from metier.evaluation import sections
from metier.evaluation.report import Run, read_run
from metier.evaluation.texts import SHARES, limits, show, show_delta, statement, words

# Our names, and the hub's.
HUB_METRICS = {"accuracy_generated": "accuracy", "macro_f1": "f1", "bits_per_byte": "bits_per_byte"}


def write_card(run: Path) -> Path:
    """Writes `run`/MODEL_CARD.md and returns its path; `RunError` when the run has no evidence yet."""
    path = run / "MODEL_CARD.md"
    artifacts.write_atomic(path, render_card(read_run(run)).encode())
    return path


def render_card(found: Run) -> str:
    """The card's text."""
    table, name = words(found.language), found.name
    heading = table["card_title"].format(name=name, base=found.base_name)
    counts, splits = found.data["counts"], found.data["splits"]
    parts = [
        f"# {_inline(heading)}",
        _inline(statement(found.evidence, found.language)),
        f"## {table['card_use']}",
        table["card_use_text"].format(task=table[f"task_{found.data['task']}"]),
        f"## {table['limits']}",
        "\n".join(f"- {_inline(sentence)}" for sentence in limits(found.evidence, found.language)),
        f"## {table['card_data']}",
        table["card_data_text"].format(**counts, **splits),
        f"## {table['card_evaluation']}",
        _table(found),
        *_costs(found),
        f"## {table['card_training']}",
        "\n".join(f"- {_inline(name)}: {_inline(value)}" for name, value in _training(found)),
        f"## {table['card_load']}",
        table["card_load_text"],
        _code(shlex.quote(name), table["card_prompt"]),
    ]
    front = yaml.safe_dump(_front_matter(found, name), sort_keys=False, allow_unicode=True)
    body = "\n\n".join(parts)
    return f"---\n{front}---\n\n{body}\n"


def _front_matter(found: Run, name: str) -> dict[str, Any]:
    evidence = found.evidence
    task = {"classification": "text-classification"}.get(found.data["task"], "text-generation")
    results = [
        {
            "type": HUB_METRICS.get(metric, metric),
            "name": f"{words('en')[metric]}{' (%)' if metric in SHARES else ''}",
            "value": round(result["adapter"] * (100 if metric in SHARES else 1), 4),
        }
        for metric, result in evidence["metrics"].items()
    ]
    dataset = {
        "name": f"{name}, held-out records",
        "type": "private",
        "split": "test",
        "revision": found.data["digest"],
    }
    return {
        "library_name": "peft",
        "base_model": found.base_name,
        "language": [code for code in found.languages if code != "other"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peft", "metier"],
        "metrics": sorted({entry["type"] for entry in results}),
        "model-index": [
            {"name": name, "results": [{"task": {"type": task}, "dataset": dataset, "metrics": results}]}
        ],
    }  # fmt: skip


def _costs(found: Run) -> list[str]:
    """What specialising cost and what is remembered, where it was measured."""
    table, evidence = words(found.language), found.evidence
    header = [table[k] for k in ("what", "base", "adapter", "difference", "interval")]
    rows = [header, ["---", "---:", "---:", "---:", "---:"]]
    for row in sections.cost_rows({**evidence["forgetting"], **evidence["behaviour"]}, found.language):
        rows.append([row["name"], row["base"], row["adapter"], row["delta"], f"{row['low']} … {row['high']}"])
    lines = [
        f"- {row['name']}: {row['value']}" + (f" ({row['low']} … {row['high']})" if row["low"] else "")
        for row in sections.memory_rows(evidence, found.language)
    ]
    costs = [f"### {table['forgetting']}", "\n".join(f"| {' | '.join(row)} |" for row in rows)] if rows[2:] else []
    return [*costs, f"### {table['memory']}", "\n".join(lines)]


def _training(found: Run) -> list[tuple[str, str]]:
    """What the adapter's manifest says of the training; an earlier or foreign one may say less."""
    table, training = words(found.language), found.training
    config = {**training["config"].get("adapter", {}), **training["config"].get("train", {})}
    facts = [(name, str(config[name])) for name in ("rank", "alpha", "target_modules", "epochs") if name in config]
    for name in ("peak_learning_rate", "steps", "precision", "device"):
        if name in training:
            facts.append((name, str(training[name])))
    seconds = training.get("train_seconds", training["timing"]["seconds"])
    return [*facts, (table["energy"], sections.energy(training, seconds, found.language))]


def _table(found: Run) -> str:
    table = words(found.language)
    header = [table[k] for k in ("metric", "base", "adapter", "difference", "interval")]
    rows = [header, ["---", "---:", "---:", "---:", "---:"]]
    for metric, result in found.evidence["metrics"].items():
        low, high = (show_delta(metric, v, found.language, unit=False) for v in result["ci95"])
        values = [show(metric, result["base"]), show(metric, result["adapter"])]
        rows.append([table[metric], *values, show_delta(metric, result["delta"], found.language), f"{low} … {high}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _code(run_name: str, prompt: str) -> str:
    lines = [
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("adapter")  # with the base that adapter_config.json names',
        'tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)',
        "```",
        "",
        "```sh",
        f'metier generate {run_name} --prompt "{prompt}"',
        "```",
    ]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Text from the data as plain text in Markdown: no tags, tables, links or code."""
    flat = " ".join(text.split())
    escaped = "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in flat)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
