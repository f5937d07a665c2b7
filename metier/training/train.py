"""RUN/dataset + a base model -> RUN/adapter: labels proved, LoRA trained, the best adapter kept.

One loop for CPU and CUDA. A run that is killed at any moment and started again ends bit-equal on a CPU:
what a step does is a function of the seed and the step's number, and the state between steps is in the
checkpoints.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars

from metier.artifacts import complete, read_manifest, work_folder, write_atomic
from metier.errors import DataError, Interrupted, RunError
from metier.model.chat import Message, Rendered, Renderer, eos_token_ids
from metier.model.device import peak_bytes, reset_peak
from metier.model.load import Base, empty_model
from metier.model.lora import attach, save_adapter
from metier.model.quantise import count_parameters
from metier.model.shards import shards_of
from metier.recipe import AdapterConfig, TrainConfig
from metier.training import ranks
from metier.training.cards import GIB, card_here
from metier.training.fit import job_of
from metier.training.labels import LabelReport, render_records
from metier.training.loop import Report, Trainer
from metier.training.memory import LEAN_FP8, shape_of
from metier.training.pack import pack_batches
from metier.training.plan import CONTEXT_BYTES, best, choices
from metier.training.schedule import Plan, make_plan, seed_of
from metier.training.stop import StopRequest
from metier.training.track import Metrics


def read_weights(dataset: Path, split: str) -> list[float]:
    """How much each record of the split counts, in the file's order: 1 but for class-weighted training records."""
    rows = polars.scan_parquet(dataset / "records.parquet").filter(polars.col("split") == split)
    if "weight" not in rows.collect_schema():
        return [1.0] * rows.select("split").collect().height
    return rows.select(polars.col("weight").fill_null(1.0)).collect()["weight"].to_list()


def read_split(dataset: Path, split: str) -> tuple[list[str], list[list[Message]]]:
    """record_ids and conversations of one split of a data set, in the file's order."""
    table = polars.read_parquet(dataset / "records.parquet", columns=["record_id", "split", "messages"])
    table = table.filter(polars.col("split") == split)
    return table["record_id"].to_list(), table["messages"].to_list()


def train(
    base: Base,
    adapter_config: AdapterConfig,
    config: TrainConfig,
    *,
    dataset: Path,
    out: Path,
    seed: int,
    key: str,
    report: Report,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains an adapter for `base` on the data set's train split into `out` and returns the manifest.

    `key` is the stage's key (see `metier.artifacts`). Of several ranks, all but the first return nothing. Raises
    `LabelError` before the first step when labels would be wrong, `DataError` without training records,
    `RunError` on a full disk, a diverged run, or too little memory, `Interrupted` after a signal, with a
    checkpoint saved.
    """
    started = time.time()
    parent = read_manifest(dataset)
    if parent is None:
        raise RunError(f"`{dataset}` holds no data set", hint="run `metier prepare` first")
    reset_peak(base.device)
    renderer = Renderer(base.tokenizer, eos_token_ids(base.path))
    splits, labels = read_records(dataset, renderer, config, say)
    adapter = attach(base.model, adapter_config, seed=seed_of("adapter", seed))
    total = count_parameters(base.model)
    share = 100 * adapter.num_parameters / total
    say(f"trainable params: {adapter.num_parameters:,} || all params: {total:,} || trainable%: {share:.4f}")
    plan = make_plan(config, len(splits["train"]), base.config.hidden_size, base.device)
    plan = fitted(plan, base, adapter_config, config, splits["train"], say)
    val_records = ranks.share(splits["val"], [record.num_tokens for record in splits["val"]])
    val_batches = pack_batches(val_records, plan.micro_batch_tokens, max(1, len(val_records)))
    work = ranks.from_first(work_folder(out, key) if not ranks.rank() else None)
    trainer = Trainer(
        base, adapter, config, plan, seed, splits["train"], [b.to(base.device) for b in val_batches],
        work / "checkpoints", say,
    )  # fmt: skip
    if trainer.resume():
        say(f"resuming after step {trainer.progress.step} of {plan.total_steps}")
    loop_to_end(trainer, work, list(config.report_to), out.parent.name, report)
    if ranks.rank():
        return {}

    details = write_files(work, trainer, renderer, labels)
    return complete(
        work, out, kind="adapter", key=key, started=started,
        parents={"dataset": parent["digest"], "base": base.digest},
        config={"adapter": adapter_config.model_dump(), "train": config.model_dump()},
        details=details,
    )  # fmt: skip


def write_files(
    folder: Path, trainer: Trainer, renderer: Renderer, labels: dict[str, LabelReport]
) -> dict[str, Any]:  # fmt: skip
    """Writes a finished training's best adapter and its chat template; returns what the manifest says of it."""
    base = trainer.base
    base_name = base.name if "/" in base.name and not Path(base.name).exists() else str(base.path)
    save_adapter(folder, trainer.lora, trainer.best, base=base_name, revision=base.revision)
    write_atomic(folder / "chat_template.jinja", renderer.template.encode())
    return {
        **facts(trainer), "total_parameters": count_parameters(base.model),
        "labels": {split: counted.as_dict() for split, counted in labels.items()},
    }  # fmt: skip


def read_records(
    dataset: Path, renderer: Renderer, config: TrainConfig, say: Callable[[str], None]
) -> tuple[dict[str, list[Rendered]], dict[str, LabelReport]]:
    """The train and val splits as token ids with proved labels, and what was found in each.

    Raises `LabelError` where labels would be wrong and `DataError` without training records.
    """
    splits, labels = {}, {}
    for split in ("train", "val"):
        splits[split], labels[split] = render_records(
            *read_split(dataset, split), renderer, config, weights=read_weights(dataset, split)
        )
    if not splits["train"]:
        raise DataError("the data set has no training records", hint="lower `data.val` and `data.test`")
    _tell_left_out(labels, say)
    return splits, labels


def fitted(
    plan: Plan,
    base: Base,
    adapter: AdapterConfig,
    config: TrainConfig,
    records: list[Rendered],
    say: Callable[[str], None],
) -> Plan:
    """`plan` with the tokens in a pass, and the recomputation, that fit into what the device has left.

    The base is loaded already, so its own memory, and CUDA's, count no more; a resumed run keeps what it had.
    """
    shape = shape_of(empty_model(base.model.config, base.dtype), adapter)
    card, job = card_here(base.device), job_of(records, adapter, config)
    shared_by = ranks.size() if shards_of(base.model) else 1
    ways = choices(shape, job, card, config, precisions_of(base), shared_by=shared_by)
    loaded = min(way.memory["frozen base"] for way in ways) + (0 if card.is_cpu else CONTEXT_BYTES)
    chosen = best(ways, card.memory_bytes + loaded)
    if chosen is None:
        chosen = min(ways, key=lambda way: way.total_bytes)
        say(f"memory may not suffice: {(chosen.total_bytes - loaded) / GIB:.1f} GiB are needed, "
            f"{card.memory_bytes / GIB:.1f} are free; the leanest way is tried")  # fmt: skip
    chosen = ranks.from_first(chosen)
    say(f"passes of {chosen.micro_batch_tokens} tokens, recomputation: {chosen.recompute}; "
        f"{(chosen.total_bytes - loaded) / GIB:.1f} GiB beside the base expected")  # fmt: skip
    copies = 1 if chosen.precision == LEAN_FP8 else 2
    return replace(plan, micro_batch_tokens=chosen.micro_batch_tokens, recompute=chosen.recompute, fp8_copies=copies)


def precisions_of(base: Base) -> list[str]:
    """What the planner calls the precision in which the loaded base is kept."""
    names = {"float32": ["fp32"], "bfloat16": ["bf16"], "float16": ["fp16"], "fp8": ["fp8", LEAN_FP8]}
    return names.get(base.precision, [base.precision])


def loop_to_end(trainer: Trainer, work: Path, report_to: list[str], run_name: str, report: Report) -> None:
    """Trains to the end of the plan. Raises `Interrupted` where a signal came first, to any of the ranks."""
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        metrics = None
        if not ranks.rank():  # which alone writes
            begun = trainer.progress.metrics_bytes
            metrics = stack.enter_context(Metrics(work / "metrics.jsonl", begun, report_to, run_name))
        is_stopped = trainer.loop(report, metrics, stop)
    if is_stopped:
        number, step = stop.signal_number or signal.SIGTERM, trainer.progress.step
        raise Interrupted(number, f"stopped after step {step}, which is saved; run again to go on")


def facts(trainer: Trainer) -> dict[str, Any]:
    """What the manifest says of a finished training."""
    base, progress = trainer.base, trainer.progress
    return {
        "seed": trainer.seed,
        "base": {"name": base.name, "revision": base.revision, "digest": base.digest, "path": str(base.path)},
        "precision": base.precision,
        "device": base.device.type,
        "trainable_parameters": trainer.adapter.num_parameters,
        "steps": progress.step,
        "best_step": progress.best_step,
        "val_loss": progress.best_val_loss,
        "peak_learning_rate": trainer.plan.peak_learning_rate,
        "num_train_records": trainer.plan.num_records,
        "num_train_tokens": progress.num_tokens,
        "num_loss_tokens": progress.num_loss_tokens,
        "num_skipped_steps": progress.num_skipped,
        "micro_batch_tokens": progress.micro_batch_tokens,
        "recompute": progress.recompute,
        "step_backs": progress.step_backs,
        "num_processes": ranks.size(),
        "base_is_shared": shards_of(base.model) is not None,
        "train_seconds": round(progress.seconds, 3),
        "peak_memory_bytes": peak_bytes(base.device),
    }


def _tell_left_out(labels: dict[str, LabelReport], say: Callable[[str], None]) -> None:
    for split, report in labels.items():
        if report.cut_prompts:
            say(
                f"{split}: the prompts of {len(report.cut_prompts)} records were cut by "
                f"{sum(report.cut_prompts.values())} tokens to fit train.max_seq_len; adapter/manifest.json lists them"
            )
        if report.left_out:
            say(f"{split}: {len(report.left_out)} records were left out; adapter/manifest.json says which and why")
