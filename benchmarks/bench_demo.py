"""The two demos, end to end: the adapter beside its base, a constant answer and naive Bayes, and what it cost.

    python benchmarks/bench_demo.py icd10cm china-law

Each demo is one `metier demo` in a process of its own; wall time and peak memory are the process's.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / f"demo_cpu{os.cpu_count()}_{time.strftime('%Y%m')}.md"


def measure(data: str, out: Path) -> tuple[Path, float, float]:
    """Runs one demo: the run's folder, wall seconds, peak GiB."""
    command = [sys.executable, "-c", "from metier.cli import main; main()", "demo", "--data", data, "--out", str(out)]
    started = time.time()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"metier demo --data {data} failed")
    return out, time.time() - started, usage.ru_maxrss / 2**20


def row(run: Path, wall_s: float, peak_gib: float) -> str:
    """One line of the table."""
    evidence = json.loads((run / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    manifests: dict[str, Any] = {
        stage: json.loads((run / stage / "manifest.json").read_text(encoding="utf-8"))
        for stage in ("dataset", "adapter", "evidence")
    }
    accuracy, generated = evidence["metrics"]["accuracy"], evidence["metrics"]["accuracy_generated"]
    bayes = evidence["controls"]["naive_bayes"]
    low, high = (100 * x for x in accuracy["ci95"])
    blow, bhigh = (100 * x for x in bayes["ci95"])
    seconds = " + ".join(f"{m['timing']['seconds']:.0f}" for m in manifests.values())
    return (
        f"| {run.name} | {evidence['n']} of {evidence['num_groups']} groups | {100 * accuracy['base']:.1f} % | "
        f"**{100 * accuracy['adapter']:.1f} %** | {low:+.1f} to {high:+.1f} | {100 * generated['base']:.1f} %, "
        f"{100 * generated['adapter']:.1f} % | {100 * evidence['controls']['majority_class']['accuracy']:.1f} % | "
        f"{100 * bayes['accuracy']:.1f} % | {blow:+.1f} to {bhigh:+.1f} ({bayes['outcome']}) | "
        f"{manifests['adapter']['steps']} steps, {manifests['adapter']['num_train_tokens']:,} tokens, "
        f"{manifests['adapter']['precision']} | {seconds} | {wall_s:.0f} | {peak_gib:.1f} |"
    )


def write(rows: list[str]) -> None:
    import torch

    head = [
        "run", "test records", "base", "adapter", "difference", "generated: base, adapter", "largest class",
        "naive Bayes",
        "adapter minus naive Bayes", "training", "seconds: data + training + evaluation", "wall, s", "peak, GiB",
    ]  # fmt: skip
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    lines = [
        "# The demos: held-out records of unseen groups, base against adapter, on a CPU",
        "",
        f"{time.strftime('%Y-%m-%d')}. `python benchmarks/bench_demo.py icd10cm china-law`; {machine}; seed 0,",
        "SmolLM2-135M-Instruct, the bundled recipes.",
        "",
        "Accuracy is by log-likelihood over the labels; differences in points, with 95 % intervals clustered by group.",
        "Naive Bayes learns from the whole train split, the adapter from what its steps see of it.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *rows,
        "",
    ]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write([row(*measure(name, Path(folder) / name)) for name in sys.argv[1:] or ["icd10cm", "china-law"]])
