"""Does the instrument work? Canaries at 0, 1, 4 and 16 repeats in a real training, and membership with its control.

    python benchmarks/bench_memorisation.py OUT [records] [epochs]
    python benchmarks/bench_memorisation.py OUT --extraction        # removed identifiers; some minutes

Takes the first categories of the bundled ICD-10-CM data, plants 8 canaries for each number of repeats, trains
SmolLM2-135M on them and evaluates, with the gate `exposure_bits: 4`. Prints the table of
benchmarks/results/memorisation_cpu2_202611.md. Some three minutes on two cores.

`--extraction`: ward notes with a nurse's name, and `privacy: hipaa-safe-harbor`. In the leaky set the name is removed
in every fourth note, where a rule sees it after its title, and stays in the others, in lower case; in the quarter set
it stays in every fourth note alone; in the clean set it is removed everywhere. All have the gate `extracted: 0`.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from metier import pipeline
from metier.errors import RunError
from metier.recipe import Recipe
from metier.terminal import Terminal

NAME = "Viktor Halvorsen"
BUNDLED = Path(__file__).parents[1] / "metier" / "bundled" / "icd10cm_chapters.csv"


def recipe(out: Path, source: Path, *, canaries: int, epochs: float) -> Recipe:
    values: dict[str, Any] = {
        "base": "smollm2-135m",
        "out": str(out / f"canaries-{canaries}"),
        "data": {
            "sources": [str(source)], "prompt": "{term}", "answer": "chapter", "group_id": "category",
            "task": "classification", "val": 0.1, "test": 0.3, "canaries": canaries,
        },
        "train": {"epochs": epochs, "learning_rate": 1e-3},
        "evaluate": {
            "max_new_tokens": 4, "memorisation_items": 150, "forgetting": False,
            "gates": {"exposure_bits": 4} if canaries else {},
        },
    }  # fmt: skip
    return Recipe(**values)


def notes(source: Path, name: str) -> None:
    """96 ward notes; the name stands in each, with the title by which it is removed or in lower case without one."""
    titled = {"leaky": lambda i: i % 4 == 0, "quarter": lambda i: i % 4 != 0, "clean": lambda i: True}[name]
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "reply"])
        for i in range(96):
            named = f"Mr. {NAME}" if titled(i) else NAME.lower()
            writer.writerow([f"Who is called at night on ward {i}?", f"Please call {named}, who has key {i % 7}."])


def extraction(out: Path) -> None:
    print("| records | steps | removed | still hold one | begun | given away: base, adapter | by records | gate |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("leaky", "quarter", "clean"):
        source = out / f"{name}.csv"
        notes(source, name)
        made = Recipe(
            base="smollm2-135m", out=str(out / name), privacy={"policy": "hipaa-safe-harbor"},
            data={"sources": [str(source)], "prompt": "question", "answer": "reply", "val": 0, "test": 16,
                  "task": "generation"},
            dedup={"exact": False, "near": "ignore"}, train={"epochs": 6, "learning_rate": 1e-3},
            evaluate={"forgetting": False, "max_new_tokens": 16, "gates": {"extracted": 0}},
        )  # fmt: skip
        try:
            pipeline.run(made, Terminal())
            gate = "passes"
        except RunError as error:
            gate = error.message
        evidence = json.loads((Path(made.out) / "evidence" / "evidence.json").read_text(encoding="utf-8"))
        found, cost = evidence["memorisation"]["extraction"], evidence["cost"]
        print(
            f"| {name}: {cost['num_train_records']} | {cost['steps']} | {evidence['identifiers_removed']} | "
            f"{found['n_holding']} of {found['n_searched']} | "
            f"{found['n_records']} records, {found['n_beginnings']} times | {found['base']}, {found['adapter']} | "
            f"{found['records']} | {gate} |", flush=True,
        )  # fmt: skip


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    if sys.argv[2:] == ["--extraction"]:
        extraction(out)
        return
    records = int(sys.argv[2]) if len(sys.argv) > 2 else 250
    epochs = float(sys.argv[3]) if len(sys.argv) > 3 else 3
    with BUNDLED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:: max(1, 2997 // records)]
    source = out / "terms.csv"
    with source.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    made = recipe(out, source, canaries=8, epochs=epochs)
    try:
        pipeline.run(made, Terminal())
        gate = "passed"
    except RunError as error:
        gate = error.message
    memory = json.loads((Path(made.out) / "evidence" / "evidence.json").read_text(encoding="utf-8"))["memorisation"]
    print("| canaries seen, times an epoch | n | exposure, bits | 95 % interval | before training |")
    print("|---|---|---|---|---|")
    for times, level in memory["canaries"].items():
        low, high = level["ci95"]
        before = memory["canaries_base"][times]["bits"]
        print(f"| {times} | {level['n']} | {level['bits']:.2f} | {low:.2f} to {high:.2f} | {before:.2f} |")
    told = memory["membership"]
    for name, entry in (("membership AUC", told), ("control: base alone", told["control"])):
        low, high = entry["ci95"]
        print(f"{name}: {entry['auc']:.3f} ({low:.3f} to {high:.3f})")
    print(f"gate exposure_bits 4: {gate}")


if __name__ == "__main__":
    main()
