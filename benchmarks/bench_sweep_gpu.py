"""Eight LoRA configurations trained together and one after another, and PEFT beside them, on one CUDA GPU.

    python benchmarks/bench_sweep_gpu.py                # LLaMA-2-7B shape, fp8 and bf16, some two minutes on an H100
    python benchmarks/bench_sweep_gpu.py fp8 peft       # some rows; SHAPE=smol: another shape

Random weights; all-linear r=16, alpha 32, no dropout, eight learning rates; 2 records of 512 tokens a step, loss on
every token. metier's rows are its own loop (`Together.round`): packing, passes, clipping and updates, timed by the wall
clock until the numbers are there. Each row is the median of 8 steps after 5. Peak memory is torch's, from the first
step on; a process of its own for each precision and for PEFT, which has its turn when metier is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
COUNT, RECORDS, TOKENS, RANK = 8, 2, 512, 16
WARM_UP, STEPS = 9, 8
STORAGE = {"fp8": "fp8", "bf16": "dense"}
EACH = float(os.environ.get("EACH", "75"))


def trainers(base: Any, fused: Any, records: int, count: int, ranks: list[int]) -> list[Any]:
    """`count` configurations of `records` records a step."""
    import torch

    from metier.model.chat import Rendered
    from metier.model.lora import new_adapter
    from metier.recipe import AdapterConfig, TrainConfig
    from metier.training.loop import Trainer
    from metier.training.schedule import make_plan

    found = []
    for number in range(count):
        ids = torch.randint(5, 31000, (64, TOKENS), generator=torch.Generator().manual_seed(number)).tolist()
        config = TrainConfig(
            micro_batch_size=records, learning_rate=1e-5 * 1.5**number, micro_batch_tokens=COUNT * RECORDS * TOKENS,
            epochs=100,
        )  # fmt: skip
        adapter = new_adapter(base.model, AdapterConfig(rank=ranks[number], alpha=32), seed=number)
        plan = make_plan(config, len(ids), base.config.hidden_size, base.device)
        rendered = [Rendered(row, row) for row in ids]
        found.append(Trainer(base, adapter, config, plan, number, rendered, [], Path("none"), print, fused))
    return found


def measure(name: str, together: Any) -> None:
    """Rounds of those who take part now; prints a row."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started, seconds = time.perf_counter(), []
    for _ in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        tick = time.perf_counter()
        results = together.round()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - tick)
        for trainer, result in zip(together.trainers, results, strict=True):
            trainer.counted(result)
    timed = sorted(seconds[WARM_UP:])
    tokens = sum(result.num_tokens for result in results)
    row = {
        "name": name, "tok_s": round(tokens / timed[STEPS // 2]), "ms": round(timed[STEPS // 2] * 1e3, 1),
        "ms_min_max": [round(timed[0] * 1e3, 1), round(timed[-1] * 1e3, 1)],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "first_s": round(seconds[0], 1), "all_s": round(time.perf_counter() - started, 1),
        "loss": round(results[0].loss, 3),
    }  # fmt: skip
    print("ROW " + json.dumps(row), flush=True)


def metier(precision: str) -> None:
    """One run of 1,024 tokens a step, the first two of the eight; the eight together; one run of as many tokens."""
    import torch

    from benchmarks.bench_training import build
    from metier.model.device import resolve_device
    from metier.model.fused import fuse
    from metier.model.load import Base
    from metier.training.together import Together

    resolve_device("cuda")  # as `metier` does: segments that grow
    storage: Any = STORAGE[precision]
    base = Base(build(storage), None, Path("none"), "random", None, "", torch.bfloat16, torch.device("cuda"), storage)
    fused = fuse(base.model)
    assert fused is not None
    base.model.train()
    together = Together(base, fused, COUNT * RECORDS * TOKENS, print)
    for number in range(2):
        (one,) = trainers(base, fused, RECORDS, 1, [RANK])
        together.hold([one])
        measure(f"{precision}: run {number + 1} of eight, alone", together)
        del one
    together.hold(trainers(base, fused, RECORDS * COUNT, 1, [RANK]))
    measure(f"{precision}: one run of {COUNT * RECORDS * TOKENS:,} tokens a step", together)
    together.hold([])
    together.hold(trainers(base, fused, RECORDS, COUNT, [RANK] * COUNT))
    measure(f"{precision}: eight together", together)
    rows = [[4, 8, 16, 32] * 2, [4, 8, 16, 64] * 2, [32], [64], [32] * COUNT, [64] * COUNT]
    for ranks in rows if precision == "fp8" else ():
        count, told = len(ranks), ", ".join(map(str, sorted(set(ranks))))
        together.hold([])
        together.hold(trainers(base, fused, RECORDS * COUNT // count, count, ranks))
        what = f"one run of {COUNT * RECORDS * TOKENS:,} tokens a step" if count == 1 else "eight together"
        measure(f"{precision}: {what}, r={told}", together)


def start(what: str) -> subprocess.Popen[str]:
    """A row's process; PEFT's is that of `bench_training.py` and waits for its turn."""
    command = [sys.executable, __file__, "one", what]
    more = {}
    if what == "peft":
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_training.py"), "one", "peft"]
        more = {"TURNS": "1", "BATCH": str(RECORDS), "SEQ": str(TOKENS), "STEPS": str(STEPS)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | more)


def rows_of(process: subprocess.Popen[str], what: str) -> list[dict[str, Any]]:
    try:
        text, _ = process.communicate("go\n", timeout=EACH)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
        print(f"{what}: cut off after {EACH:.0f} s", flush=True)
    print(text, flush=True)
    return [json.loads(line[4:]) for line in text.splitlines() if line.startswith("ROW ")]


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        metier(sys.argv[2])
        return
    asked = sys.argv[1:] or ["fp8", "peft", "bf16"]
    waiting = start("peft") if "peft" in asked else None  # it fits beside metier, and is warm by then
    rows = []
    for what in asked:
        process = waiting if what == "peft" and waiting else start(what)
        rows += rows_of(process, what)
    print("\n| row | tokens/s | ms a step (least, most) | peak GiB | reserved GiB | first step s |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        low, high = row["ms_min_max"]
        first = row.get("first_s", row.get("first_step_s"))
        print(f"| {row['name']} | {row['tok_s']:,} | {row['ms']} ({low}, {high}) | {row['peak_gib']} | "
              f"{row['reserved_gib']} | {first} |")  # fmt: skip
    speed = {row["name"]: row["tok_s"] for row in rows}
    for precision in STORAGE:
        joint = speed.get(f"{precision}: eight together")
        alone = speed.get(f"{precision}: run 1 of eight, alone")
        peft = next((s for name, s in speed.items() if name.startswith("PEFT")), None)
        if joint and alone:
            beside = f", {joint / peft:.1f} x PEFT" if peft else ""
            print(f"{precision}: {joint / alone:.2f} x one after another{beside}")


if __name__ == "__main__":
    main()
