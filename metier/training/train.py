"""RUN/dataset + a base model -> RUN/adapter: labels proved, LoRA trained, the best adapter kept.

One loop for CPU and CUDA. A run that is killed at any moment and started again ends bit-equal on a CPU:
what a step does is a function of the seed and the step's number, and the state between steps is in the
checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import polars
import torch

from metier.artifacts import complete, read_manifest, work_folder, write_atomic
from metier.errors import DataError, Interrupted, RunError
from metier.model.chat import Message, Rendered, Renderer, eos_token_ids
from metier.model.fused import fuse
from metier.model.load import Base, tokens_per_pass
from metier.model.lora import Adapter, attach, save_adapter
from metier.model.quantise import count_parameters
from metier.recipe import AdapterConfig, TrainConfig
from metier.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from metier.training.labels import LabelReport, render_records
from metier.training.pack import PackedBatch, pack_batches
from metier.training.schedule import learning_rate_at, peak_learning_rate
from metier.training.step import StepResult, mean_loss, train_step
from metier.training.stop import StopRequest
from metier.training.track import Metrics


class Report(Protocol):
    """Where the loop tells how far it is: `done` of `total` steps, with the numbers of the step."""

    def __call__(self, what: str, done: int, total: int, **numbers: float) -> None: ...


@dataclass(frozen=True)
class Plan:
    """A run in numbers, fixed before the first step."""

    num_records: int
    records_per_step: int
    total_steps: int
    total_records: int
    warmup_steps: int
    peak_learning_rate: float
    micro_batch_tokens: int
    eval_every: int


def make_plan(config: TrainConfig, num_records: int, hidden_size: int, device: torch.device) -> Plan:
    """Steps, warm-up and learning rate that `config` means for this many records."""
    per_step = config.micro_batch_size * config.grad_accum_steps
    total_records = math.ceil(config.epochs * num_records)
    total_steps = math.ceil(total_records / per_step)
    if config.max_steps is not None and config.max_steps < total_steps:
        total_steps = config.max_steps
        total_records = total_steps * per_step
    budget = config.micro_batch_tokens
    return Plan(
        num_records=num_records,
        records_per_step=per_step,
        total_steps=total_steps,
        total_records=total_records,
        warmup_steps=round(config.warmup_ratio * total_steps),
        peak_learning_rate=peak_learning_rate(config, hidden_size),
        micro_batch_tokens=tokens_per_pass(device) if budget == "auto" else budget,
        eval_every=config.eval_every or max(1, math.ceil(total_steps / 10)),
    )


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine and in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def records_of_step(plan: Plan, seed: int, step: int) -> list[int]:
    """Which records a step trains on: epoch after epoch, each in its own seeded order."""
    first = step * plan.records_per_step
    last = min(first + plan.records_per_step, plan.total_records)
    chosen = []
    for epoch in range(first // plan.num_records, (last - 1) // plan.num_records + 1):
        start = epoch * plan.num_records
        chosen += _epoch_order(plan.num_records, seed, epoch)[max(first - start, 0) : max(last - start, 0)]
    return chosen


@functools.lru_cache(maxsize=2)
def _epoch_order(num_records: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
    return torch.randperm(num_records, generator=generator).tolist()


def read_split(dataset: Path, split: str) -> tuple[list[str], list[list[Message]]]:
    """record_ids and conversations of one split of a data set, in the file's order."""
    table = polars.read_parquet(dataset / "records.parquet", columns=["record_id", "split", "messages"])
    table = table.filter(polars.col("split") == split)
    return table["record_id"].to_list(), table["messages"].to_list()


@dataclass
class Trainer:
    """A run in progress: the model, what it trains on, and where it stands."""

    base: Base
    adapter: Adapter
    config: TrainConfig
    plan: Plan
    seed: int
    train_records: Sequence[Rendered]
    val_batches: Sequence[PackedBatch]
    folder: Path
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.model = fuse(self.base.model, self.adapter) or self.base.model
        self.best: dict[str, torch.Tensor] = self.adapter.tensors()
        self.optimizer = torch.optim.AdamW(
            list(self.adapter.parameters.values()), lr=self.plan.peak_learning_rate,
            weight_decay=self.config.weight_decay, fused=True,
        )  # fmt: skip
        is_fp16 = self.base.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.base.device.type, enabled=is_fp16)

    def step(self) -> StepResult:
        """The next optimizer step; afterwards `progress` counts it."""
        number = self.progress.step
        chosen = [self.train_records[i] for i in records_of_step(self.plan, self.seed, number)]
        batches = pack_batches(chosen, self.plan.micro_batch_tokens, self.config.micro_batch_size)
        torch.manual_seed(seed_of("dropout", self.seed, number))
        result = train_step(
            self.model,
            self.optimizer,
            [batch.to(self.base.device) for batch in batches],
            learning_rate=self.learning_rate,
            max_grad_norm=self.config.max_grad_norm,
            scaler=self.scaler,
        )
        self.progress.step += 1
        self.progress.num_tokens += result.num_tokens
        self.progress.num_loss_tokens += result.num_loss_tokens
        self.progress.num_skipped += result.is_skipped
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if result.is_skipped else 0
        # fp16's loss scaler finds its scale by skipping; elsewhere three in a row mean a diverged run.
        if self.progress.skipped_in_a_row >= 3 and not self.scaler.is_enabled():
            raise RunError(
                f"the loss or its gradient was not finite in steps {number - 1} to {number + 1}; the weights are whole",
                hint="lower `train.learning_rate`; nothing of these steps reached the adapter",
            )
        return result

    @property
    def learning_rate(self) -> float:
        return learning_rate_at(
            min(self.progress.step, self.plan.total_steps - 1), self.plan.total_steps,
            peak=self.plan.peak_learning_rate, minimum=self.config.min_learning_rate,
            warmup_steps=self.plan.warmup_steps,
        )  # fmt: skip

    def validate(self) -> float | None:
        """Loss on the val split, if there is one; keeps the adapter when it is the best so far."""
        val_loss = mean_loss(self.model, self.val_batches) if self.val_batches else None
        best = self.progress.best_val_loss
        if val_loss is not None and not math.isfinite(val_loss):
            self.say(f"step {self.progress.step}: the loss on the val split is not finite; this adapter is not kept")
            return None
        if val_loss is None or best is None or val_loss < best:
            self.best = self.adapter.tensors()
            self.progress.best_val_loss, self.progress.best_step = val_loss, self.progress.step
        return val_loss

    def save(self) -> None:
        """A checkpoint of now."""
        tensors = {f"adapter/{k}": v for k, v in self.adapter.tensors().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for name, parameter in self.adapter.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value.detach().cpu()
        save_checkpoint(self.folder, self.progress, tensors, {"scaler": self.scaler.state_dict()})

    def resume(self) -> bool:
        """Continues from the newest whole checkpoint, if there is one."""
        found = load_checkpoint(self.folder, self.say)
        if found is None:
            return False
        self.progress, tensors, extra = found
        self.adapter.load({k.removeprefix("adapter/"): v for k, v in tensors.items() if k.startswith("adapter/")})
        self.best = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        for name, parameter in self.adapter.parameters.items():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer/{key}/{name}" in tensors:
                    state[key] = tensors[f"optimizer/{key}/{name}"].to(parameter.device)
            if state:
                self.optimizer.state[parameter] = state
        if extra["scaler"]:
            self.scaler.load_state_dict(extra["scaler"])
        return True

    def loop(self, report: Report, metrics: Metrics, stop: StopRequest) -> None:
        """Steps until the plan is done or `stop` is asked for: logs, validates and saves on the way."""
        plan, config, progress = self.plan, self.config, self.progress
        before = progress.seconds
        started = time.perf_counter()
        self.base.model.train()
        while progress.step < plan.total_steps:
            learning_rate, tick = self.learning_rate, time.perf_counter()
            result = self.step()
            seconds = time.perf_counter() - tick
            progress.seconds = before + time.perf_counter() - started
            is_last = progress.step == plan.total_steps
            numbers: dict[str, float] = {
                "loss": result.loss, "learning_rate": learning_rate, "grad_norm": result.grad_norm,
                "tok_per_sec": result.num_tokens / seconds, "num_tokens": result.num_tokens,
                "num_loss_tokens": result.num_loss_tokens,
            }  # fmt: skip
            if result.is_skipped:
                self.say(f"step {progress.step}: loss or gradient not finite; the step is skipped")
            elif progress.step % config.log_every == 0 or progress.step == 1 or is_last:
                progress.metrics_bytes = metrics.log(step=progress.step, **numbers)
            if progress.step % plan.eval_every == 0 or is_last:
                val_loss = self.validate()
                if val_loss is not None:
                    numbers["val_loss"] = val_loss
                    progress.metrics_bytes = metrics.log(step=progress.step, val_loss=val_loss)
            report("training", progress.step, plan.total_steps, **numbers)
            is_stopping = stop.signal_number is not None  # read once: a later signal is for the next step to see
            if progress.step % config.save_every == 0 or is_last or is_stopping:
                self.save()
            if is_stopping:
                return


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

    `key` is the stage's key (see `metier.artifacts`). Raises `LabelError` before the first step when
    labels would be wrong, `DataError` without training records, `RunError` on a full disk or a
    diverged run, `Interrupted` after a signal, with a checkpoint saved.
    """
    started = time.time()
    parent = read_manifest(dataset)
    if parent is None:
        raise RunError(f"`{dataset}` holds no data set", hint="run `metier prepare` first")
    renderer = Renderer(base.tokenizer, eos_token_ids(base.path))
    splits, labels = {}, {}
    for split in ("train", "val"):
        splits[split], labels[split] = render_records(*read_split(dataset, split), renderer, config)
    if not splits["train"]:
        raise DataError("the data set has no training records", hint="lower `data.val` and `data.test`")
    _tell_left_out(labels, say)

    adapter = attach(base.model, adapter_config, seed=seed_of("adapter", seed))
    total = count_parameters(base.model)
    share = 100 * adapter.num_parameters / total
    say(f"trainable params: {adapter.num_parameters:,} || all params: {total:,} || trainable%: {share:.4f}")
    plan = make_plan(config, len(splits["train"]), base.config.hidden_size, base.device)
    val_batches = pack_batches(splits["val"], plan.micro_batch_tokens, max(1, len(splits["val"])))
    work = work_folder(out, key)
    trainer = Trainer(
        base, adapter, config, plan, seed, splits["train"], [b.to(base.device) for b in val_batches],
        work / "checkpoints", say,
    )  # fmt: skip
    if trainer.resume():
        say(f"resuming after step {trainer.progress.step} of {plan.total_steps}")
    with (
        StopRequest() as stop,
        Metrics(
            work / "metrics.jsonl", trainer.progress.metrics_bytes, list(config.report_to), out.parent.name
        ) as metrics,
    ):
        trainer.loop(report, metrics, stop)
    if stop.signal_number is not None:
        step = trainer.progress.step
        raise Interrupted(stop.signal_number, f"stopped after step {step}, which is saved; run again to go on")

    base_name = base.name if "/" in base.name and not Path(base.name).exists() else str(base.path)
    save_adapter(work, adapter, trainer.best, base=base_name, revision=base.revision)
    write_atomic(work / "chat_template.jinja", renderer.template.encode())
    return complete(
        work, out, kind="adapter", key=key, started=started,
        parents={"dataset": parent["digest"], "base": base.digest},
        config={"adapter": adapter_config.model_dump(), "train": config.model_dump()},
        details={
            **_facts(trainer), "total_parameters": total,
            "labels": {split: counted.as_dict() for split, counted in labels.items()},
        },
    )  # fmt: skip


def _facts(trainer: Trainer) -> dict[str, Any]:
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
        "train_seconds": round(progress.seconds, 3),
    }


def _tell_left_out(labels: dict[str, LabelReport], say: Callable[[str], None]) -> None:
    for split, report in labels.items():
        if report.cut_prompts:
            say(f"{split}: the prompts of {len(report.cut_prompts)} records were cut to fit train.max_seq_len")
        if report.left_out:
            say(f"{split}: {len(report.left_out)} records were left out; adapter/manifest.json says which and why")
