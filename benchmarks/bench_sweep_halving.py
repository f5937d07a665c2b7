"""Sixteen configurations with successive halving against sixteen full runs: the time, and whose winner is how good.

    python benchmarks/bench_sweep_halving.py --work FOLDER [--steps 81] [--base smollm2-135m]

SmolLM2-135M-Instruct's real weights and the bundled ICD-10-CM recipe: four ranks and four learning rates, compared on
the validation split every ninth of the steps. Each way starts from the loaded base: side by side with halving first,
then full runs one after another (`at_once: 1`, `halving: 1`) and side by side. Before, two steps of each rank alone
and of all together compile the kernels. Last, the best configuration is trained with four seeds: what two equal runs
differ by. A row is printed as soon as it is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RANGES: dict[str, Any] = {
    "adapter.rank": [4, 8, 16, 32], "train.learning_rate": [3e-4, 1e-3, 3e-3, 1e-2],
}  # fmt: skip
WAYS = {
    "side by side with halving": {"halving": 3, "at_once": 16},
    "full runs, one after another": {"halving": 1, "at_once": 1},
    "full runs side by side": {"halving": 1, "at_once": 16},
}  # fmt: skip


def main() -> None:
    from metier import pipeline
    from metier.recipe import load_recipe
    from metier.recipe.sweep import SweepConfig
    from metier.training.sweep import sweep
    from metier.training.trials import data_key

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=81)
    parser.add_argument("--base", default="smollm2-135m")
    asked = parser.parse_args()
    overrides = [f"train.max_steps={asked.steps}", "train.save_every=1000", "data.test=100", f"base={asked.base}"]
    recipe = load_recipe(ROOT / "metier" / "bundled" / "icd10cm.yaml", overrides, str(asked.work / "run"))
    pipeline.prepare(recipe)
    base = pipeline.base_of(recipe, pipeline.Silent())

    def tried(name: str, config: dict[str, Any], steps: int) -> dict[str, Any]:
        """The sweep's outcome, with the wall time of all of it, without loading the base."""
        train = recipe.train.model_copy(update={"max_steps": steps, "eval_every": max(1, steps // 9)})
        some = recipe.model_copy(update={"sweep": SweepConfig.model_validate(config), "train": train})
        work = asked.work / name.replace(" ", "-")
        work.mkdir(parents=True)
        tick = time.perf_counter()
        found = sweep(base, some, datasets={data_key(some): Path(some.out) / "dataset"}, work=work,
                      report=lambda *_, **__: None, say=lambda _: None)  # fmt: skip
        return found | {"wall": time.perf_counter() - tick}

    tick = time.perf_counter()
    for name, number, rates in (("alone", 1, [1e-3]), ("all", 16, RANGES["train.learning_rate"])):
        ranges = RANGES | {"train.learning_rate": rates}
        tried(f"first {name}", {"ranges": ranges, "trials": 16, "halving": 1, "at_once": number}, 2)
    print(f"first steps: {time.perf_counter() - tick:.1f} s", flush=True)
    found = {}
    for name, way in WAYS.items():
        found[name] = tried(name, {"ranges": RANGES, "trials": 16} | way, asked.steps)
        winner = found[name]["trials"][0]
        print(f"{name}: {found[name]['wall']:.1f} s, {told(winner)} {winner['val_loss']:.4f}", flush=True)
    full = found["full runs, one after another"]
    loss_of = {row["number"]: row["val_loss"] for row in full["trials"]}
    best = {key: [value] for key, value in full["trials"][0]["values"].items()} | {"seed": [1, 2, 3, 4]}
    seeds = [row["val_loss"] for row in tried("seeds", {"ranges": best, "halving": 1}, asked.steps)["trials"]]

    print("\n| way | wall s | of the full runs' | steps | winner: rank, rate | val loss | val loss of its full run |")
    print("|---|---:|---:|---:|---|---:|---:|")
    for name, one in found.items():
        winner, steps = one["trials"][0], sum(row["steps"] for row in one["trials"])
        print(f"| {name} | {one['wall']:.1f} | {one['wall'] / full['wall']:.2f} | {steps:,} | {told(winner)} | "
              f"{winner['val_loss']:.4f} | {loss_of[winner['number']]:.4f} |")  # fmt: skip
    print(f"the full runs' winner with four seeds: {', '.join(f'{loss:.4f}' for loss in seeds)}; standard deviation "
          f"{statistics.stdev(seeds):.4f}")  # fmt: skip
    print("full runs: " + ", ".join(f"{told(row)} {row['val_loss']:.4f}" for row in full["trials"]))


def told(row: dict[str, Any]) -> str:
    """A configuration's values: `8, 0.001`."""
    return ", ".join(f"{value:g}" for value in row["values"].values())


if __name__ == "__main__":
    main()
