"""Kills `metier run` again and again, starts it again, and compares what comes out, byte for byte.

    python scripts/kill_test.py --kills 30 --seed 0

A run that nobody kills is the reference. Then each of `--kills` runs, in a folder of its own, gets SIGKILL at
a random moment and the same command once more, until it exits with 0; a third of them are killed a second time on
the way, and a tenth a third time. Half of the moments are drawn uniformly in the reference's duration; the
others in one phase's own duration, after its start, phases in turn, so that the short ones are met as well.
The phase is read from the disk after the process is dead. Exits with 1 when a byte differs.

The base is a tiny LLaMA with random weights; dropout is on, so that a wrong random state would show.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
COMPARED = (
    "dataset/records.parquet", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    "evidence/evidence.json", "evidence/items.parquet",
)  # fmt: skip
PHASES = ("prepare", "load", "train", "save", "evaluate", "report", "exit")
AIMED = ("prepare", "train", "save", "evaluate", "report")
LABELS = ("Circulatory", "Respiratory", "Digestive", "Skin")
RECIPE = """\
base: {base}
out: {out}
seed: 5
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 40, test: 60}}
adapter: {{rank: 32, dropout: 0.1}}
train:
  {{max_steps: 40, epochs: 9, micro_batch_size: 16, micro_batch_tokens: 512, learning_rate: 5e-3, save_every: 2,
    log_every: 1}}
evaluate: {{tasks: [classification, generation], max_new_tokens: 160, bootstrap_samples: 2000}}
"""


@dataclass
class Trial:
    """One run: in which phases it was killed, how often it was started, and which files differ in the end."""

    killed_in: list[str] = field(default_factory=list)
    starts: int = 0
    differing: list[str] = field(default_factory=list)


def phase_of(out: Path) -> str:
    """Where the run in `out` stands, by what is on the disk."""
    work = out / ".adapter.partial"
    if not (out / "dataset" / "manifest.json").exists():
        return "prepare"
    if not (out / "adapter" / "manifest.json").exists():
        if not (work / "metrics.jsonl").exists():
            return "load"
        is_saving = any(work.glob("checkpoints/.*.tmp")) or (work / "adapter_config.json").exists()
        return "save" if is_saving else "train"
    if not (out / "evidence" / "manifest.json").exists():
        return "evaluate"
    done = (out / "report.html").exists() and (out / "MODEL_CARD.md").exists()
    return "exit" if done else "report"


def start(recipe: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log = recipe.with_suffix(".log").open("ab")
    command = [sys.executable, "-c", "from metier.cli import main; main()", "run", str(recipe)]
    with log:
        return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=log, stderr=log)


def reference(recipe: Path, out: Path, environment: dict[str, str]) -> tuple[float, dict[str, float]]:
    """Runs once without a kill; seconds in all, and in each phase."""
    began = last = time.monotonic()
    seconds = dict.fromkeys(PHASES, 0.0)
    process = start(recipe, environment)
    while process.poll() is None:
        time.sleep(0.001)
        now = time.monotonic()
        seconds[phase_of(out)] += now - last
        last = now
    if process.returncode != 0:
        sys.exit(f"the reference run failed:\n{recipe.with_suffix('.log').read_text()}")
    return last - began, seconds


def kill_at(process: subprocess.Popen[bytes], out: Path, phase: str | None, delay: float) -> bool:
    """SIGKILL `delay` seconds after the start, or after `phase` is seen; False when the run was done before."""
    while phase is not None and process.poll() is None and phase_of(out) != phase:
        time.sleep(0.001)
    until = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    process.kill()
    return process.wait() != 0


def make_recipe(folder: Path, base: Path) -> tuple[Path, Path]:
    """A folder with 400 notes of four chapters and a recipe; returns the recipe and the run's folder."""
    folder.mkdir()
    rows = [f"note {i} of kind {i * 7 % 4} with {'fever ' * (i % 5)}and pain,{LABELS[i * 7 % 4]}" for i in range(400)]
    (folder / "notes.csv").write_text("note,chapter\n" + "\n".join(rows) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, out=folder / "run"), encoding="utf-8")
    return folder / "recipe.yaml", folder / "run"


def trial(
    recipe: Path, out: Path, *, plan: list[tuple[str | None, float]], golden: Path, environment: dict[str, str]
) -> Trial:
    """Runs with the planned kills, then to the end, and compares with the reference's files in `golden`."""
    result = Trial()
    for phase, delay in plan:
        result.starts += 1
        if not kill_at(start(recipe, environment), out, phase, delay):
            break
        result.killed_in.append(phase_of(out))
    result.starts += 1
    if start(recipe, environment).wait() != 0:
        result.differing = ["the command failed"]
        print(recipe.with_suffix(".log").read_text(), file=sys.stderr)
        return result
    result.differing = [name for name in COMPARED if (out / name).read_bytes() != (golden / name).read_bytes()]
    lines = (out / "adapter" / "metrics.jsonl").read_bytes().count(b"\n")
    if lines != (golden / "adapter" / "metrics.jsonl").read_bytes().count(b"\n"):
        result.differing.append("adapter/metrics.jsonl (number of lines)")
    strays = [p.name for p in out.iterdir() if p.name.endswith((".partial", ".tmp", ".old"))]
    result.differing += [f"{name} was left" for name in strays]
    return result


def draw_plans(kills: int, seed: int, total: float, seconds: dict[str, float]) -> list[list[tuple[str | None, float]]]:
    """For each run, the kills: (None, seconds after the start) or (phase, seconds after it begins)."""
    rng = random.Random(seed)
    plans = []
    for number in range(kills):
        draw = rng.random()
        plan: list[tuple[str | None, float]] = []
        for _ in range(3 if draw < 0.1 else 2 if draw < 0.43 else 1):
            plan.append((None, rng.uniform(0, total)))
        if number % 2:
            phase = AIMED[number // 2 % len(AIMED)]
            # A phase that comes in pieces, as saving does, is met in one of them.
            plan[0] = (phase, rng.uniform(0, seconds[phase] / (20 if phase == "save" else 1)))
        plans.append(plan)
    return plans


def report(trials: list[Trial], seconds: dict[str, float], seed: int) -> str:
    """The results file, in Markdown."""
    killed = Counter(phase for trial in trials for phase in trial.killed_in)
    wrong = sum(bool(trial.differing) for trial in trials)
    lines = [
        "# A run that is killed and started again ends with the same bytes",
        "",
        f"{datetime.date.today().isoformat()}. `python scripts/kill_test.py --kills {len(trials)} --seed {seed}`; "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        f"{len(trials)} runs, {sum(killed.values())} kills (SIGKILL), {sum(t.starts for t in trials)} starts: "
        f"**{len(trials) - wrong} of {len(trials)} ended with the reference's bytes, {wrong} did not.**",
        "",
        "Compared: " + ", ".join(f"`{name}`" for name in COMPARED)
        + "; the number of lines of `metrics.jsonl`; nothing half-made left behind.",
        "",
        "| phase | seconds in the reference run | kills that fell in it |",
        "|---|---|---|",
        *(f"| {phase} | {seconds[phase]:.2f} | {killed[phase]} |" for phase in PHASES),
        "",
        "prepare and load include the start of the interpreter; exit is after the report was written.",
        "",
        "| run | killed in | starts | differs |",
        "|---|---|---|---|",
        *(
            f"| {i} | {', '.join(t.killed_in) or '-'} | {t.starts} | {', '.join(t.differing) or 'no'} |"
            for i, t in enumerate(trials, 1)
        ),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--machine", default=f"cpu{os.cpu_count()}", help="in the results file's name")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    # By name, since the tests are not type-checked.
    save_tiny = importlib.import_module("tests.model.tiny").save_tiny

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = os.environ | {
            "METIER_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        base = save_tiny("llama3", folder / "base")
        recipe, golden = make_recipe(folder / "reference", base)
        total, seconds = reference(recipe, golden, environment)
        print(f"reference: {total:.1f} s; " + ", ".join(f"{p} {s:.2f}" for p, s in seconds.items()), flush=True)
        trials = []
        for number, plan in enumerate(draw_plans(arguments.kills, arguments.seed, total, seconds), 1):
            recipe, out = make_recipe(folder / f"run{number:03d}", base)
            trials.append(trial(recipe, out, plan=plan, golden=golden, environment=environment))
            verdict = ", ".join(trials[-1].differing) or "same bytes"
            print(f"run {number}: killed in {', '.join(trials[-1].killed_in) or 'nothing'}; {verdict}", flush=True)
    name = f"kill_{arguments.machine}_{datetime.date.today():%Y%m}.md"
    (ROOT / "benchmarks" / "results" / name).write_text(report(trials, seconds, arguments.seed), encoding="utf-8")
    sys.exit(any(t.differing for t in trials))


if __name__ == "__main__":
    main()
