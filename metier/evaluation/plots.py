"""The report's figures: inline SVG that reads on a light and on a dark page, with no fonts and no scripts.

In: numbers and words. Out: SVG text. Words are drawn as short place holders and put into the SVG
afterwards: then no font is asked for a glyph it lacks, and no dollar sign is taken for a formula. Text
takes the page's own colour.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

BASE_COLOUR = "#8b93a1"
ADAPTER_COLOUR = "#2f86c9"
BETTER_COLOUR = "#2e9e6b"
WORSE_COLOUR = "#d3593f"
# Never shown: replaced by the page's text colour.
TEXT_COLOUR = "#010203"
WIDTH = 4.6
RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT_COLOUR),
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


class Drawing:
    """One figure with one axes. `word` gives the place holder to draw for a text."""

    def __init__(self, name: str, height: float, margins: tuple[float, float, float, float]) -> None:
        """`margins` in inches: left, right, top, bottom."""
        from matplotlib.figure import Figure

        left, right, top, bottom = margins
        self.name = name
        self.words: list[str] = []
        self.figure = Figure(figsize=(WIDTH, height))
        self.axes = self.figure.add_axes(
            (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
        )

    def word(self, text: str) -> str:
        self.words.append("".join(c for c in text if c.isprintable()))
        return f"[[{len(self.words) - 1}]]"

    def svg(self, description: str) -> str:
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        text = text.replace(TEXT_COLOUR, "currentColor").replace("'DejaVu Sans'", "system-ui")
        text = re.sub(r"\[\[(\d+)\]\]", lambda m: html.escape(self.words[int(m[1])]), text)
        label = html.escape(description)
        return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def line_chart(
    name: str, series: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, x_label: str, description: str
) -> str:
    """Lines of (label, x, y); the first in the adapter's colour, the second with markers."""
    with figure_style(name):
        drawing = Drawing(name, 2.7, (0.65, 0.15, 0.15, 0.5))
        for i, (label, x, y) in enumerate(series):
            style: dict[str, Any] = {"color": (ADAPTER_COLOUR, WORSE_COLOUR)[i], "marker": ("", "o")[i]}
            if len(x) == 1:
                style["marker"] = "o"
            drawing.axes.plot(x, y, label=drawing.word(label), linewidth=1.4, markersize=3.5, **style)
        drawing.axes.set_xlabel(drawing.word(x_label))
        drawing.axes.grid(axis="y", color=BASE_COLOUR, alpha=0.25, linewidth=0.6)
        if len(series) > 1:
            drawing.axes.legend(loc="upper left", bbox_to_anchor=(0.62, 1.0))
        return drawing.svg(description)


def delta_chart(
    name: str, rows: Sequence[tuple[str, float, float, float, str]], *, description: str, one_scale: bool = False
) -> str:
    """Rows of (label, delta, low, high, outcome), zero in the middle, better to the right; each row on its own
    scale, or all on one."""
    widest = [max(abs(low), abs(high), abs(delta)) for _, delta, low, high, _ in rows]
    scales = [max(widest) or 1.0] * len(rows) if one_scale else [w or 1.0 for w in widest]
    with figure_style(name):
        height = 0.5 * len(rows) + 0.2
        drawing = Drawing(name, height, (0.1, 0.1, 0.05, 0.1))
        axes = drawing.axes
        for i, ((label, delta, low, high, outcome), scale) in enumerate(zip(rows, scales, strict=True)):
            colour = {"better": BETTER_COLOUR, "worse": WORSE_COLOUR}.get(outcome, BASE_COLOUR)
            axes.plot([-1.05, 1.05], [i, i], color=BASE_COLOUR, alpha=0.35, linewidth=0.8)
            axes.plot([0, 0], [i - 0.16, i + 0.16], color=TEXT_COLOUR, linewidth=1)
            axes.plot([low / scale, high / scale], [i, i], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot([delta / scale], [i], "o", color=colour, markersize=6)
            axes.text(-1.05, i - 0.22, drawing.word(label), ha="left", va="bottom")
        axes.set(xlim=(-1.1, 1.1), ylim=(len(rows) - 0.6, -0.75))
        axes.set_axis_off()
        return drawing.svg(description)


def label_chart(
    name: str, rows: Sequence[tuple[str, float, float, int]], *, sides: tuple[str, str], description: str
) -> str:
    """Rows of (label, base, adapter, n), shares from 0 to 1: the label above two bars."""
    with figure_style(name):
        drawing = Drawing(name, 0.42 * len(rows) + 0.9, (0.12, 0.3, 0.5, 0.4))
        axes = drawing.axes
        places = np.arange(len(rows))
        for offset, column, colour in ((0.1, 1, BASE_COLOUR), (0.3, 2, ADAPTER_COLOUR)):
            values = [float(row[column]) for row in rows]
            axes.barh(places + offset, values, height=0.18, color=colour, label=drawing.word(sides[column - 1]))
        for i, (label, _, _, n) in enumerate(rows):
            axes.text(0, i - 0.02, drawing.word(f"{label} ({n})"), ha="left", va="bottom", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.45, -0.55), yticks=[])
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.spines["left"].set_visible(False)
        handles, names = axes.get_legend_handles_labels()
        drawing.figure.legend(handles, names, loc="upper left", borderaxespad=0.2, labelspacing=0.3)
        return drawing.svg(description)


def reliability_chart(
    name: str, curves: Sequence[tuple[str, Sequence[dict[str, Any]]]], *, x_label: str, description: str
) -> str:
    """Curves of (label, bins) as calibration.py makes them: confidence to the right, accuracy upward."""
    with figure_style(name):
        drawing = Drawing(name, 3.4, (0.55, 0.15, 0.15, 0.5))
        axes = drawing.axes
        axes.plot([0, 1], [0, 1], color=BASE_COLOUR, linewidth=0.8, linestyle=(0, (4, 3)))
        for (label, bins), colour, marker in zip(curves, (BASE_COLOUR, ADAPTER_COLOUR), ("s", "o"), strict=True):
            x, y = ([float(b[key]) for b in bins] for key in ("confidence", "accuracy"))
            gaps = [
                [max(0.0, sign * (b["ci95"][side] - b["accuracy"])) for b in bins] for side, sign in ((0, -1), (1, 1))
            ]
            axes.errorbar(
                x, y, yerr=gaps, color=colour, marker=marker, markersize=4, linewidth=1.4, elinewidth=0.8,
                label=drawing.word(label),
            )  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=drawing.word(x_label))
        axes.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        axes.grid(color=BASE_COLOUR, alpha=0.25, linewidth=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(0.02, 1.0))
        return drawing.svg(description)


def confusion_chart(name: str, counts: np.ndarray[Any, Any], *, description: str) -> str:
    """A square of counts [true, predicted], each row as shares, ticks by number from 1."""
    from matplotlib.colors import LinearSegmentedColormap

    size = len(counts)
    # From transparent to the adapter's colour: the page's background shows where there is nothing.
    colours = LinearSegmentedColormap.from_list("shares", [(0.18, 0.53, 0.79, 0.0), (0.18, 0.53, 0.79, 1.0)])
    with figure_style(name):
        drawing = Drawing(name, WIDTH, (0.4, 0.1, 0.1, 0.4))
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        drawing.axes.pcolormesh(
            np.arange(size + 1) + 0.5, np.arange(size + 1) + 0.5, shares, cmap=colours, vmin=0, vmax=1
        )
        for row, column in zip(*np.nonzero(counts), strict=True):
            if size <= 12:
                drawing.axes.text(column + 1, row + 1, str(counts[row, column]), ha="center", va="center", fontsize=8)
        drawing.axes.set(xticks=range(1, size + 1), yticks=range(1, size + 1), ylim=(size + 0.5, 0.5))
        drawing.axes.tick_params(labelsize=7 if size > 12 else 9)
        return drawing.svg(description)


def figure_style(name: str) -> Any:
    """The figures' settings, inside a `with`."""
    from matplotlib import rc_context

    rc: Any = {**RC, "svg.hashsalt": name}
    return rc_context(rc)
