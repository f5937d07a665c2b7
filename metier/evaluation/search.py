"""The report's part on a sweep: what was tried, as a table and as a figure.

In: RUN/sweep/trials.json, where the adapter is a sweep's winner. Out: rows of text, and SVG.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from metier.evaluation.plots import ADAPTER_COLOUR, BASE_COLOUR, BETTER_COLOUR, WORSE_COLOUR, Drawing, figure_style
from metier.evaluation.texts import Language, words

COLOURS = (ADAPTER_COLOUR, WORSE_COLOUR, BETTER_COLOUR, BASE_COLOUR)


def read_trials(run: Path, training: dict[str, Any]) -> dict[str, Any] | None:
    """The table of the sweep that the adapter came from, or None."""
    path = run / "sweep" / "trials.json"
    if "sweep" not in training or not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def search_rows(trials: dict[str, Any], language: Language) -> dict[str, Any]:
    """The sentence above the table, and the table's rows, the best first."""
    table = words(language)
    states = Counter(row["state"] for row in trials["trials"])
    note = table["search_note"].format(n=trials["num_trials"], method=trials["method"], stopped=states["stopped"])
    rows = [
        {
            "name": ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in row["values"].items()),
            "loss": "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            "steps": f"{row['steps']:,} / {row['total_steps']:,}",
            "outcome": table[f"sweep_{row['state']}"],
        }
        for row in trials["trials"]
    ]
    return {"note": note, "rows": rows}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def search_chart(trials: dict[str, Any], language: Language) -> str:
    """Learning rate to the right, logarithmic, loss upward, a line for each rank; hollow where stopped early."""
    table = words(language)
    with figure_style("search"):
        drawing = Drawing("search", 2.9, (0.65, 0.15, 0.15, 0.5))
        axes = drawing.axes
        rows = [row for row in trials["trials"] if row["val_loss"] is not None]
        for i, rank in enumerate(sorted({row["rank"] for row in rows})):
            mine = sorted((r["learning_rate"], r["val_loss"], r["state"]) for r in rows if r["rank"] == rank)
            colour, name = COLOURS[i % len(COLOURS)], drawing.word(table["rank_of"].format(rank=rank))
            axes.plot([r[0] for r in mine], [r[1] for r in mine], color=colour, linewidth=1.0, alpha=0.6, label=name)
            for rate, loss, state in mine:
                face = colour if state == "complete" else "none"
                axes.plot([rate], [loss], "o", color=colour, markerfacecolor=face, markersize=5)
        axes.set_xscale("log")
        axes.set_xticks(sorted({row["learning_rate"] for row in rows})[:6])
        axes.set_xticklabels([f"{rate:g}" for rate in sorted({row["learning_rate"] for row in rows})[:6]])
        axes.minorticks_off()
        axes.set_xlabel(drawing.word(table["fig_rate_axis"]))
        axes.grid(axis="y", color=BASE_COLOUR, alpha=0.25, linewidth=0.6)
        axes.legend(loc="best")
        return drawing.svg(table["fig_search"])
