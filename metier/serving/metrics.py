"""Counters, gauges and histograms in Prometheus' text format (version 0.0.4): numbers alone, never a text of anyone."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What the server has done. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, Labels], float] = defaultdict(float)
        self._histograms: dict[tuple[str, Labels], list[float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Adds to the counter `name`."""
        with self._lock:
            self._counters[name, tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Adds a duration to the histogram `name`."""
        key = name, tuple(sorted(labels.items()))
        with self._lock:
            # One slot a bucket, one for what is longer, and the sum.
            slots = self._histograms.setdefault(key, [0.0] * (len(SECONDS) + 2))
            slots[bisect_left(SECONDS, seconds)] += 1
            slots[-1] += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, with `gauges` as they stand now."""
        lines: list[str] = []
        with self._lock:
            for name in sorted({name for name, _ in self._counters}):
                lines.append(f"# TYPE metier_{name} counter")
                lines += [
                    f"metier_{name}{_braced(labels)} {value:g}"
                    for (n, labels), value in sorted(self._counters.items())
                    if n == name
                ]
            for name in sorted({name for name, _ in self._histograms}):
                lines.append(f"# TYPE metier_{name} histogram")
                for (n, labels), slots in sorted(self._histograms.items()):
                    if n == name:
                        lines += _histogram(name, labels, slots)
        for name, value in gauges.items():
            lines += [f"# TYPE metier_{name} gauge", f"metier_{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, slots: list[float]) -> list[str]:
    lines, total = [], 0.0
    for bound, number in zip([*map(str, SECONDS), "+Inf"], slots[:-1], strict=True):
        total += number
        lines.append(f"metier_{name}_bucket{_braced((*labels, ('le', bound)))} {total:g}")
    return [
        *lines,
        f"metier_{name}_sum{_braced(labels)} {slots[-1]:g}",
        f"metier_{name}_count{_braced(labels)} {total:g}",
    ]


def _braced(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{k}="{_escaped(v)}"' for k, v in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
