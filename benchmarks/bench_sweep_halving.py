"""Sixteen configurations with successive halving against sixteen full runs: the time, and whose winner is how good.

    python benchmarks/bench_sweep_halving.py --work FOLDER [--steps 165] [--base smollm2-135m]

SmolLM2-135M-Instruct's real weights and the bundled ICD-10-CM recipe: four ranks and four learning rates. Each way
starts from the loaded base. Full runs are trained one after another (`at_once: 1`, `halving: 1`), then side by side,
then side by side with halving. Before, each way makes two steps, so that kernels are compiled. The best configuration
is then trained with four seeds: what two equal runs differ by.
"""

from __future__ import annotations

import argparse
import json
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
    "full runs, one after another": {"halving": 1, "at_once": 1},
    "full runs side by side": {"halving": 1, "at_once": 16},
    "side by side with halving": {"halving": 3, "at_once": 16},
}  # fmt: skip


def main() -> None:
    from metier import pipeline
    from metier.recipe import load_recipe
    from metier.recipe.sweep import SweepConfig
    from metier.training.sweep import sweep
    from metier.training.trials import data_key

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=165)
    parser.add_argument("--base", default="smollm2-135m")
    asked = parser.parse_args()
    overrides = [f"train.max_steps={asked.steps}", f"train.eval_every={max(1, asked.steps // 5)}"]
    overrides += ["train.save_every=1000", "data.test=100", f"base={asked.base}"]
    recipe = load_recipe(ROOT / "metier" / "bundled" / "icd10cm.yaml", overrides, str(asked.work / "run"))
    pipeline.prepare(recipe)
    base = pipeline.base_of(recipe, pipeline.Silent())

    def tried(name: str, config: dict[str, Any], steps: int) -> dict[str, Any]:
        """The sweep's outcome, with the wall time of all of it, without loading the base."""
        train = recipe.train.model_copy(update={"max_steps": steps, "eval_every": max(1, steps // 5)})
        some = recipe.model_copy(update={"sweep": SweepConfig.model_validate(config), "train": train})
        work = asked.work / name.replace(" ", "-")
        work.mkdir(parents=True)
        tick = time.perf_counter()
        found = sweep(base, some, datasets={data_key(some): Path(some.out) / "dataset"}, work=work,
                      report=lambda *_, **__: None, say=lambda text: print(f"  {text}", flush=True))  # fmt: skip
        return found | {"wall": time.perf_counter() - tick}

    found = {}
    for name, way in WAYS.items():
        tick = time.perf_counter()
        tried(f"first {name}", {"ranges": RANGES, "trials": 16} | way, 2)
        print(f"{name}: two steps of each, kernels compiled, {time.perf_counter() - tick:.1f} s", flush=True)
        found[name] = tried(name, {"ranges": RANGES, "trials": 16} | way, asked.steps)
        print(f"{name}: {found[name]['wall']:.1f} s", flush=True)
    full, *_ = found.values()
    loss_of = {row["number"]: row["val_loss"] for row in full["trials"]}
    best = {key: [value] for key, value in full["trials"][0]["values"].items()} | {"seed": [1, 2, 3, 4]}
    seeds = [row["val_loss"] for row in tried("seeds", {"ranges": best, "halving": 1}, asked.steps)["trials"]]

    print(
        "\n| way | wall s | of the full runs' | steps | winner | its loss on the val split | its loss in the full run |"
    )
    print("|---|---:|---:|---:|---|---:|---:|")
    for name, one in found.items():
        winner, steps = one["trials"][0], sum(row["steps"] for row in one["trials"])
        print(
            f"| {name} | {one['wall']:.1f} | {one['wall'] / full['wall']:.2f} | {steps:,} | "
            f"{json.dumps(winner['values'])} | {winner['val_loss']:.4f} | {loss_of[winner['number']]:.4f} |"
        )
    print(f"\nthe full runs' winner with four seeds: {', '.join(f'{loss:.4f}' for loss in seeds)}; standard deviation "
          f"{statistics.stdev(seeds):.4f}")  # fmt: skip
    print("loss of each full run: " + ", ".join(f"{json.dumps(row['values'])} {row['val_loss']:.4f}"
                                                for row in full["trials"]))  # fmt: skip


if __name__ == "__main__":
    main()
