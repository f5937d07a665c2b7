"""What `metier plan` predicts against what a GPU then uses: peak memory and tokens/s of real steps, random weights.

    python benchmarks/bench_plan.py

LLaMA-2-7B and a 70B shape, in bf16, fp8 and nf4, fused and generic path, with and without recomputation. Each case
has a process of its own: the model is made on the card layer by layer, and five steps of packed records of 512 tokens
are trained. Cases marked 16 GiB run under a limit on the process's memory. Writes
benchmarks/results/plan_<machine>_<yyyymm>.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SHAPES: dict[str, dict[str, int]] = {
    "7B": {},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip
# shape, path, precision, recomputation, tokens in a pass, limit in GiB (0: none)
CASES: list[tuple[str, str, str, str, int, int]] = [
    ("7B", "fused", "bf16", "none", 8192, 0),
    ("7B", "fused", "bf16", "mlp", 8192, 0),
    ("7B", "fused", "bf16", "full", 8192, 0),
    ("7B", "fused", "fp8", "none", 8192, 0),
    ("7B", "fused", "fp8, one copy", "full", 8192, 0),
    ("7B", "fused", "nf4", "full", 2048, 0),
    ("7B", "generic", "bf16", "none", 2048, 0),
    ("7B", "generic", "bf16", "full", 2048, 0),
    ("7B", "fused", "bf16", "auto", 0, 16),
    ("7B", "fused", "nf4", "auto", 0, 16),
    ("70B", "fused", "nf4", "full", 2048, 0),
]
RECORD_TOKENS, STEPS, SHARE = 512, 5, 0.3


def make_base(shape: str, precision: str) -> Any:
    """Random weights on the card, a layer at a time, quantised as they come."""
    import torch
    import transformers
    from torch import nn

    from metier.model.device import storage_of
    from metier.model.load import Base, empty_model
    from metier.model.quantise import quantise_linear

    device, storage = torch.device("cuda"), storage_of(precision.partition(",")[0])  # type: ignore[arg-type]
    config = transformers.LlamaConfig(**SHAPES[shape])
    model = empty_model(config, torch.bfloat16)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            weight = weight.fill_(1.0) if parameter.dim() == 1 else weight.normal_(std=0.02)
            setattr(module, key, nn.Parameter(weight, requires_grad=False))
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantise_linear(module, storage))
    model.model.rotary_emb.to(device)
    return Base(model, None, ROOT, shape, None, "", torch.bfloat16, device, storage)


def work(case: tuple[str, str, str, str, int, int]) -> None:
    """One case in this process; prints what was predicted and measured as JSON."""
    import torch

    from metier.model.chat import Rendered
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig, TrainConfig
    from metier.training import loop
    from metier.training.cards import GIB, card_here
    from metier.training.fit import job_of
    from metier.training.memory import LEAN_FP8, shape_of
    from metier.training.plan import best, choices
    from metier.training.schedule import make_plan

    shape_name, path, precision, recompute, tokens, limit = case
    device = torch.device("cuda")
    torch.cuda.init()
    whole = torch.cuda.get_device_properties(device).total_memory
    if limit:  # what the process may hold: the limit without the context's own share
        torch.cuda.set_per_process_memory_fraction((limit - 0.6) * GIB / whole)
    if path == "generic":
        loop.fuse = lambda *_, **__: None  # type: ignore[assignment]
    base = make_base(shape_name, precision)
    config = TrainConfig(
        micro_batch_size=32, max_steps=STEPS, micro_batch_tokens=tokens or "auto", recompute=recompute,  # type: ignore[arg-type]
        learning_rate=1e-4, max_seq_len=2048,
    )  # fmt: skip
    supervised = int(RECORD_TOKENS * SHARE)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 30000, (RECORD_TOKENS,), generator=generator).tolist() for _ in range(32)]
    records = [Rendered(i, [-100] * (RECORD_TOKENS - supervised) + i[-supervised:]) for i in ids]
    from dataclasses import replace

    from metier.model.load import empty_model

    shape = replace(shape_of(empty_model(base.model.config, base.dtype), AdapterConfig()), path=path)
    card = card_here(device)
    held = (limit or whole / GIB) * GIB
    ways = choices(shape, job_of(records, AdapterConfig(), config), card, config, [precision])
    chosen = best(ways, int(held)) or min(ways, key=lambda way: way.total_bytes)
    if tokens:
        config = config.model_copy(update={"micro_batch_size": tokens // RECORD_TOKENS})
        records = records[: tokens // RECORD_TOKENS]
        ways = choices(shape, job_of(records, AdapterConfig(), config), card, config, [precision])
        chosen = ways[0]
    adapter = attach(base.model, AdapterConfig(), seed=0)
    plan = make_plan(config, len(records) * STEPS, shape.hidden, device)
    plan = replace(plan, micro_batch_tokens=chosen.micro_batch_tokens, recompute=chosen.recompute)
    plan = replace(plan, fp8_copies=1 if chosen.precision == LEAN_FP8 else 2)
    trainer = loop.Trainer(base, adapter, config, plan, 0, records * STEPS, [], ROOT, print)
    base.model.train()
    loop.set_recompute(trainer.model, chosen.recompute)
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        result = trainer.step()
        losses.append(result.loss)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / result.num_tokens)
    free, _ = torch.cuda.mem_get_info()
    print(json.dumps({
        "case": case, "card": card.name, "recompute": chosen.recompute, "tokens": chosen.micro_batch_tokens,
        "memory": chosen.memory, "predicted": chosen.total_bytes / GIB, "predicted_rate": chosen.tok_per_sec,
        "allocated": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB,
        "device": (whole - free) / GIB, "rate": 1 / min(seconds[1:]), "finite": all(map(math.isfinite, losses)),
        "step_backs": trainer.progress.step_backs,
    }))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h100", help="in the results file's name")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        return work(CASES[arguments.case])
    import torch

    rows, card = [], ""
    for number, (shape, path, precision, recompute, tokens, limit) in enumerate(CASES):
        done = subprocess.run(
            [sys.executable, __file__, "--case", str(number)], capture_output=True, text=True, check=False
        )
        asked = f"| {shape} | {path} | {precision} | {f'{limit} GiB' if limit else 'none'} "
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["?"])[-1][:160]
            rows.append(f"{asked}| {recompute} | {tokens} | failed: {reason} | | | | | |")
        else:
            r = json.loads(done.stdout.splitlines()[-1])
            card = r["card"]
            part = r["predicted"] - r["memory"].get("CUDA and fragmentation", 0) / 2**30
            apart = 100 * (part / r["allocated"] - 1)
            rows.append(
                f"{asked}| {r['recompute']} | {r['tokens']:,} | {part:.2f} | {r['allocated']:.2f} | {apart:+.1f} % | "
                f"{r['predicted']:.2f} | {r['device']:.2f} | {r['predicted_rate']:,.0f} | {r['rate']:,.0f} |"
                + (f" stepped back: {r['step_backs']}" if r["step_backs"] else "")
            )
        print(rows[-1], flush=True)
    text = f"""# What `metier plan` predicts, and what training then takes

{datetime.date.today().isoformat()}. `python benchmarks/bench_plan.py`; {card}, torch {torch.__version__}. Random weights, all-linear rank 16, records of \
{RECORD_TOKENS} tokens with {100 * SHARE:.0f} % of them trained; {STEPS} steps, the fastest but the first. 'allocated' is the tensors' peak (torch), \
predicted without the context and fragmentation; 'device' is all that the card has in use after the steps, predicted in full.

| shape | path | base in | limit | recomputation | tokens a pass | predicted GiB | allocated GiB | off by | predicted in all | device GiB | predicted tok/s | tok/s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""  # noqa: E501
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"plan_{arguments.machine}_{datetime.date.today():%Y%m}.md"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
