"""LoRA training on a CPU: metier against PEFT with transformers' Trainer, the same job in the same run.

    python benchmarks/bench_training_cpu.py

The job: SmolLM2-135M-Instruct, the bundled ICD-10 terms as metier renders them, rank 16 on all linear
layers, 16 records a step. Every contender gets the same batches in the same order, the same start of A and B, the same
learning rates, and a process of its own; rounds alternate, so that a busy machine slows all of them alike.
A step is timed from the end of the one before, collating included: process time (what the process itself computed, in
one thread, whoever else was on the machine), with wall time beside it. Writes
benchmarks/results/training_<machine>_<yyyymm>.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "metier" / "bundled" / "icd10cm.yaml"
RECORDS_PER_STEP, WARM_UP_STEPS, TIMED_STEPS = 16, 1, 5
NUM_STEPS = WARM_UP_STEPS + TIMED_STEPS
LEARNING_RATE = 1e-3
RANK, ALPHA = 16, 32
ROUNDS = 3
CONTENDERS = {
    "peft-fp32": "PEFT + Trainer, fp32, padded",
    "peft-bf16": "PEFT + Trainer, bf16=True (autocast), padded",
    "metier-fp32": "metier, precision: fp32",
    "metier-auto": "metier, precision: auto",
}


def make_job(folder: Path, run: Path) -> None:
    """Writes job.json (the base's path, and the records of every step) and start.safetensors (A and B)."""
    import safetensors.torch
    import torch

    from metier.model.chat import Renderer, eos_token_ids
    from metier.model.load import load_base
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig
    from metier.training.labels import render_records
    from metier.training.schedule import make_plan, records_of_step, seed_of
    from metier.training.train import read_split

    base = load_base("smollm2-135m", dtype=torch.float32, device=torch.device("cpu"))
    renderer = Renderer(base.tokenizer, eos_token_ids(base.path))
    rendered, _ = render_records(*read_split(run / "dataset", "train"), renderer, train_config("fp32"))
    plan = make_plan(train_config("fp32"), len(rendered), base.model.config.hidden_size, base.device)
    steps = [[rendered[i] for i in records_of_step(plan, 0, step)] for step in range(NUM_STEPS)]
    records = [[{"input_ids": r.input_ids, "labels": r.labels} for r in step] for step in steps]
    (folder / "job.json").write_text(json.dumps({"base": str(base.path), "steps": records}))
    adapter = attach(base.model, AdapterConfig(rank=RANK, alpha=ALPHA), seed=seed_of("adapter", 0))
    safetensors.torch.save_file(adapter.tensors(), folder / "start.safetensors")


def train_config(precision: str) -> Any:
    from metier.recipe import TrainConfig

    return TrainConfig(
        max_steps=NUM_STEPS, micro_batch_size=RECORDS_PER_STEP, learning_rate=LEARNING_RATE, warmup_ratio=0.0,
        precision=precision,
    )  # fmt: skip


def run_metier(folder: Path, precision: str) -> dict[str, Any]:
    """metier's own Trainer, step by step, on the job's records."""
    import safetensors.torch

    from metier.model.chat import Rendered
    from metier.model.device import resolve_device, resolve_precision
    from metier.model.load import load_base
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig
    from metier.training.loop import Trainer
    from metier.training.schedule import make_plan, records_of_step
    from metier.training.train import fitted

    job = json.loads((folder / "job.json").read_text())
    config, device = train_config(precision), resolve_device("cpu")
    dtype = resolve_precision(config.precision, device)
    base = load_base(job["base"], dtype=dtype, device=device)
    adapter = attach(base.model, AdapterConfig(rank=RANK, alpha=ALPHA), seed=0)
    adapter.load(safetensors.torch.load_file(folder / "start.safetensors"))
    # One epoch of exactly these records, laid so that each step draws the ones that it should.
    steps = job["steps"]
    plan = make_plan(config, NUM_STEPS * RECORDS_PER_STEP, base.model.config.hidden_size, device)
    records: list[Any] = [None] * (NUM_STEPS * RECORDS_PER_STEP)
    for number, step in enumerate(steps):
        for index, record in zip(records_of_step(plan, 0, number), step, strict=True):
            records[index] = Rendered(record["input_ids"], record["labels"])
    plan = fitted(plan, base, adapter.config, config, records, lambda text: None)
    trainer = Trainer(base, adapter, config, plan, 0, records, [], folder / "none", print)
    base.model.train()
    losses, ends = [], [clocks()]
    for _ in range(NUM_STEPS):
        losses.append(trainer.step().loss)
        ends.append(clocks())
    return {"losses": losses, "ends": ends, "dtype": str(dtype).removeprefix("torch.")}


def run_peft(folder: Path, is_bf16: bool) -> dict[str, Any]:
    """The tutorial's way: PEFT's LoRA, transformers' Trainer, batches padded to their longest record."""
    import peft
    import safetensors.torch
    import torch
    import transformers

    job = json.loads((folder / "job.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["base"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    loaded = peft.set_peft_model_state_dict(model, safetensors.torch.load_file(folder / "start.safetensors"))
    assert not loaded.unexpected_keys
    losses: list[float] = []
    ends = [(0.0, 0.0)]

    class Timed(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends[0] = clocks()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(clocks())

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=RECORDS_PER_STEP, max_steps=NUM_STEPS,
        learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        bf16=is_bf16, use_cpu=True, dataloader_pin_memory=False, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    records = [record for step in job["steps"] for record in step]
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    Timed(model=model, args=arguments, train_dataset=records, data_collator=collator, callbacks=[Clock()]).train()
    return {"losses": losses, "ends": ends, "dtype": "bf16 autocast" if is_bf16 else "float32"}


def clocks() -> tuple[float, float]:
    """Process time and wall time, in seconds."""
    return time.process_time(), time.perf_counter()


def work(contender: str, folder: Path) -> None:
    """A contender's process: prints its result as the last line."""
    side, _, precision = contender.partition("-")
    result = run_metier(folder, precision) if side == "metier" else run_peft(folder, precision == "bf16")
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result))


def seconds_to_first_step(run: Path, environment: dict[str, str]) -> float:
    """From the start of `metier train`, with the model in the cache, to the line of its first step."""
    command = [sys.executable, "-c", "from metier.cli import main; main()", "train", str(RECIPE), "--out", str(run)]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("training 1/"):
            seconds = time.perf_counter() - started
            process.kill()
            process.wait()
            return seconds
    sys.exit("metier train made no step:\n" + "".join(said))


def run_contender(name: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--contender", name, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ends = result["ends"]
    for index, clock in enumerate(("seconds", "wall")):
        result[clock] = [b[index] - a[index] for a, b in zip(ends, ends[1:], strict=False)][WARM_UP_STEPS:]
    print(f"{name}: {RECORDS_PER_STEP / statistics.median(result['seconds']):.2f} records/s", flush=True)
    return result


def write_report(
    results: dict[str, list[dict[str, Any]]], first_step: list[float], job: dict[str, Any], machine: str
) -> Path:
    """The table: medians over all rounds, each round's own rate, and how far the losses are apart."""
    from metier.artifacts import write_atomic

    losses = results["peft-fp32"][0]["losses"]
    rows = []
    for name, rounds in results.items():
        same = results.get("peft-bf16" if rounds[0]["dtype"].startswith("bf") else "peft-fp32", results["peft-fp32"])
        cpu, wall = (statistics.median(s for r in rounds for s in r[clock]) for clock in ("seconds", "wall"))
        rates = [RECORDS_PER_STEP / statistics.median(r["seconds"]) for r in rounds]
        times = [
            rate * statistics.median(other["seconds"]) / RECORDS_PER_STEP
            for rate, other in zip(rates, same, strict=True)
        ]
        apart = max(abs(a - b) for r in rounds for a, b in zip(r["losses"], losses, strict=True))
        rows.append(
            f"| {CONTENDERS[name]} | {rounds[0]['dtype']} | {RECORDS_PER_STEP / cpu:.2f} | "
            f"{', '.join(f'{rate:.2f}' for rate in rates)} | {', '.join(f'{ratio:.2f}' for ratio in times)} | "
            f"{RECORDS_PER_STEP / wall:.2f} | {max(r['peak_gib'] for r in rounds):.2f} | "
            f"{rounds[0]['losses'][-1]:.4f} | {apart:.1e} |"
        )
    lengths = [[len(record["input_ids"]) for record in step] for step in job["steps"]]
    real, padded = sum(map(sum, lengths)), sum(max(step) * len(step) for step in lengths)
    names = ("torch", "transformers", "peft", "accelerate", "metier")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    text = f"""# LoRA training on a CPU: metier against PEFT + transformers' Trainer

{datetime.date.today().isoformat()}. `python benchmarks/bench_training_cpu.py`; {platform.system()} {platform.machine()}, \
{os.cpu_count()} cores ({", ".join(units)}), one thread; {versions}.

SmolLM2-135M-Instruct, ICD-10 terms, rank {RANK} on all linear layers, {RECORDS_PER_STEP} records a step, no dropout; the same \
batches, start and learning rates for all. {TIMED_STEPS} timed steps after {WARM_UP_STEPS} of warm-up, {len(first_step)} rounds, \
contenders in turn, each in a process of its own. Padding to the longest record of a batch makes {padded:,} tokens of {real:,} \
({padded / real:.2f} x).

| | arithmetic | records/s, process time | in each round | x PEFT in the same arithmetic, in each round | records/s, wall | peak memory, GiB | last loss | loss differs from PEFT fp32 by |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

`metier train`, process start to the end of the first step, model in the cache: \
{", ".join(f"{s:.1f}" for s in first_step)} s.
"""  # noqa: E501
    path = ROOT / "benchmarks" / "results" / f"training_{machine}_{datetime.date.today():%Y%m}.md"
    write_atomic(path, text.encode())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=f"cpu{os.cpu_count()}", help="in the results file's name")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        return work(arguments.contender, arguments.folder)

    from metier import pipeline
    from metier.model.device import resolve_device, resolve_precision
    from metier.recipe import load_recipe

    has_bf16 = str(resolve_precision("auto", resolve_device("cpu"))) == "torch.bfloat16"
    names = [name for name in CONTENDERS if has_bf16 or name != "peft-bf16"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE",
                                    "OMP_NUM_THREADS": "1"}  # fmt: skip
        pipeline.prepare(load_recipe(RECIPE, [], str(folder / "run")))
        make_job(folder, folder / "run")
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        first_step = []
        job = json.loads((folder / "job.json").read_text())
        for number in range(ROUNDS):
            first_step.append(seconds_to_first_step(folder / "run", environment))
            print(f"first step after {first_step[-1]:.1f} s", flush=True)
            for name in names if number % 2 == 0 else reversed(names):
                results[name].append(run_contender(name, folder, environment))
            # After each round, so that a run that is cut off has left what it measured.
            report = write_report(results, first_step, job, arguments.machine)
    print(report.read_text())


if __name__ == "__main__":
    main()
