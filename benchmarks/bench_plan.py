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
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
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
            del weight  # which quantising is to free
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


def write_checkpoint(folder: Path) -> None:
    """A 7B checkpoint with random bf16 weights, a shard a layer, and a tokenizer of 256 words."""
    import safetensors.torch
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from metier.model.load import empty_model

    config = transformers.LlamaConfig()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty_model(config, torch.bfloat16).named_parameters():
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        weight = weight.fill_(1.0) if parameter.dim() == 1 else weight.normal_(std=0.02)
        key = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(key, {})[name] = weight.cpu()
        if len(shards[key]) == 9:
            safetensors.torch.save_file(shards.pop(key), folder / f"model-{key}.safetensors", {"format": "pt"})
    for key, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / f"model-{key}.safetensors", {"format": "pt"})


def first_step(folder: Path, precision: str, started: float) -> None:
    """From the start of the process to the end of the first step of 16 x 512 tokens, as JSON."""
    import torch

    from metier.model.chat import Rendered
    from metier.model.device import storage_of
    from metier.model.load import load_base
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig, TrainConfig
    from metier.training.loop import Trainer
    from metier.training.schedule import make_plan

    imported = time.time() - started
    device = torch.device("cuda")
    base = load_base(folder, dtype=torch.bfloat16, device=device, storage=storage_of(precision))  # type: ignore[arg-type]
    loaded = time.time() - started
    adapter = attach(base.model, AdapterConfig(), seed=0)
    records = [Rendered(list(range(5, 5 + RECORD_TOKENS)), list(range(5, 5 + RECORD_TOKENS)))] * 16
    config = TrainConfig(micro_batch_size=16, max_steps=1, learning_rate=1e-4)
    trainer = Trainer(base, adapter, config, make_plan(config, 16, 4096, device), 0, records, [], folder, print)
    base.model.train()
    loss = trainer.step().loss
    torch.cuda.synchronize()
    print(json.dumps({
        "precision": precision, "imported": imported, "loaded": loaded, "first_step": time.time() - started,
        "finite": math.isfinite(loss), "device_peak": torch.cuda.max_memory_allocated() / 2**30,
        "host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }))  # fmt: skip


def start_up() -> list[str]:
    """Lines of the report: a first step from a checkpoint that was just written, for two precisions."""
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, __file__, "--write", temporary], check=True)
        for precision in ("bf16", "nf4"):
            command = [sys.executable, __file__, "--start", precision, temporary, str(time.time())]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines.append(f"- 7B, {precision}: failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:160]}")
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                f"- 7B, {precision}: first step of 16 x 512 tokens {r['first_step']:.1f} s after the process started "
                f"(imports {r['imported']:.1f}, base loaded and digested {r['loaded']:.1f}); peak on the card "
                f"{r['device_peak']:.1f} GiB, of the host {r['host_peak']:.1f} GiB, the mapped files counted"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h100", help="in the results file's name")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", choices=["memory", "start"], help="one half alone, printed and not written")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="which memory cases")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        return write_checkpoint(arguments.write)
    if arguments.start:
        return first_step(Path(arguments.start[1]), arguments.start[0], float(arguments.start[2]))
    if arguments.case is not None:
        return work(CASES[arguments.case])
    rows, card = memory_rows(arguments.cases) if arguments.only != "start" else ([], "")
    starts = start_up() if arguments.only != "memory" else []
    if arguments.only is None:
        write_report(rows, starts, card, arguments)


def memory_rows(cases: Iterable[int]) -> tuple[list[str], str]:
    """The table's rows, one case after the other, and the card's name."""
    rows, card = [], ""
    for number in cases:
        shape, path, precision, recompute, tokens, limit = CASES[number]
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
    return rows, card


def write_report(rows: list[str], starts: list[str], card: str, arguments: argparse.Namespace) -> None:
    """The results file."""
    import torch

    text = f"""# What `metier plan` predicts, and what training then takes

{datetime.date.today().isoformat()}. `python benchmarks/bench_plan.py`; {card}, torch {torch.__version__}. Random weights, all-linear rank 16, records of \
{RECORD_TOKENS} tokens with {100 * SHARE:.0f} % of them trained; {STEPS} steps, the fastest but the first. 'allocated' is the tensors' peak (torch), \
predicted without the context and fragmentation; 'device' is all that the card has in use after the steps, predicted in full.

| shape | path | base in | limit | recomputation | tokens a pass | predicted GiB | allocated GiB | off by | predicted in all | device GiB | predicted tok/s | tok/s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Start-up, from a checkpoint of 33 safetensors files that was just written (so in the page cache):
{chr(10).join(starts)}
"""  # noqa: E501
    arguments.out.mkdir(exist_ok=True)
    path = arguments.out / f"plan_{arguments.machine}_{datetime.date.today():%Y%m}.md"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
