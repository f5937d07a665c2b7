"""metier's engine beside transformers' continuous batching and sequential `generate`: same prompts, one model, a CPU.

    python benchmarks/bench_batching.py RUN --requests 48

In: a run, whose base and adapter answer questions about its held-out terms, greedy, in fp32, in one process and without
HTTP. transformers' manager holds one model with one adapter injected, so base and adapter are two managers after
one another; metier's engine has both in one batch. Told: new tokens a second, and how many answers equal `generate`'s.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import polars as pl
import torch
import transformers

from benchmarks.bench_serving import make_jobs
from metier.model.bank import AdapterBank
from metier.model.generate import SamplingParams, generate_ids
from metier.model.specialist import Specialist, load
from metier.serving.engine import Engine, Failed, Finished, Generation, Token
from metier.serving.sampling import Sampling

Answers = list[list[int]]


def sequential(model: Specialist, prompts: Answers, new: int) -> tuple[Answers, float]:
    begun = time.monotonic()
    stop = model.renderer.stop_token_ids
    found = [
        next(iter(generate_ids(model.base, [p], SamplingParams(new), stop_token_ids=stop, batch_size=1)))[1]
        for p in prompts
    ]
    return found, time.monotonic() - begun


def transformers_batching(model: Specialist, prompts: Answers, new: int) -> tuple[Answers, float]:
    """`generate_batch` with its own defaults; the model is as before afterwards."""
    stop = sorted(model.renderer.stop_token_ids)
    config = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=stop[0], use_cuda_graph=False
    )
    begun = time.monotonic()
    outputs = model.base.model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    seconds = time.monotonic() - begun
    # Results are keyed by request ids that count upwards; each holds its own prompt.
    ordered = sorted(outputs.values(), key=lambda o: int(o.request_id.rpartition("_")[2]))
    return [list(o.generated_tokens) for o in ordered], seconds


def metier_batching(model: Specialist, adapter: Path, jobs: list[tuple[Any, list[int]]], new: int) -> Any:
    bank = AdapterBank(model.base)
    bank.add("adapter", adapter)
    engine = Engine(bank, max_rows=32, max_waiting=len(jobs)).start()
    found: Answers = [[] for _ in jobs]
    left = threading.Semaphore(0)

    def sink_of(index: int) -> Any:
        def sink(event: Any) -> None:
            if isinstance(event, Token):
                found[index].append(event.id)
            elif isinstance(event, Finished | Failed):
                left.release()

        return sink

    begun = time.monotonic()
    stop = model.renderer.stop_token_ids
    engine.submit(*(Generation(p, name, new, stop, Sampling(), sink_of(i)) for i, (name, p) in enumerate(jobs)))
    for _ in jobs:
        left.acquire()
    seconds = time.monotonic() - begun
    engine.close()
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    adapted = load(args.run, device="cpu", precision="fp32")
    base = load(adapted.base.name, device="cpu", precision="fp32")
    records = pl.read_parquet(args.run / "dataset" / "records.parquet").filter(pl.col("split") == "test")
    terms = [m[-2]["content"] for m in records["messages"].to_list()]
    jobs = [
        (job["body"]["model"], base.renderer.prompt(job["body"]["messages"]))
        for job in make_jobs(args.requests, [None, "adapter"], terms, args.max_tokens)  # type: ignore[list-item]
    ]
    want: Answers = [[] for _ in jobs]
    totals: dict[str, list[float]] = {}
    for name, model in ((None, base), ("adapter", adapted)):
        mine = [i for i, (asked, _) in enumerate(jobs) if asked == name]
        for way, answer in (("sequential", sequential), ("transformers", transformers_batching)):
            found, seconds = answer(model, [jobs[i][1] for i in mine], args.max_tokens)
            if way == "sequential":
                for i, ids in zip(mine, found, strict=True):
                    want[i] = ids
            same = sum(_cut(ids, model) == _cut(want[i], model) for i, ids in zip(mine, found, strict=True))
            _note(totals, way, found, seconds, same)
    found, seconds = metier_batching(base, args.run / "adapter", jobs, args.max_tokens)
    same = sum(_cut(a, base) == _cut(b, base) for a, b in zip(found, want, strict=True))
    _note(totals, "metier", found, seconds, same)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    for way, (tokens, spent, equal) in totals.items():
        print(f"| {way} | {tokens / spent:.1f} | {spent:.1f} s | {equal:.0f} of {len(jobs)} |")


def _cut(ids: list[int], model: Specialist) -> list[int]:
    """Without the stop token, which one way tells and another does not."""
    return [i for i in ids if i not in model.renderer.stop_token_ids]


def _note(totals: dict[str, list[float]], way: str, found: Answers, seconds: float, same: int) -> None:
    total = totals.setdefault(way, [0.0, 0.0, 0.0])
    for i, value in enumerate((sum(map(len, found)), seconds, same)):
        total[i] += value


if __name__ == "__main__":
    main()
