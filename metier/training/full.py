"""RUN/dataset + a base model -> RUN/full: the same recipe with all weights trained, to put LoRA beside it.

The same records in the same order, steps, schedule and validation as the adapter's; only what is trained differs, and
the learning rate. Full fine-tuning wants about a tenth of LoRA's (Schulman et al., LoRA Without Regret, 2025); how
much it is here is decided on the val split: of three rates the one with the lowest loss after a fifth of the steps.
Weights, gradients and AdamW's moments are fp32, and products of matrices in the run's precision (autocast).

Limits: one process; a short trial favours higher rates a little; a base must fit with 16 bytes a weight.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metier.artifacts import complete, read_manifest, work_folder, write_json
from metier.errors import RunError
from metier.model.chat import Rendered, Renderer, eos_token_ids
from metier.model.device import peak_bytes, reset_peak
from metier.model.full import AllWeights, save_model, unfreeze
from metier.model.load import Base
from metier.recipe import TrainConfig
from metier.training.cards import GIB, card_here
from metier.training.loop import Report, Trainer
from metier.training.pack import pack_batches
from metier.training.schedule import Plan, make_plan
from metier.training.train import facts, loop_to_end, read_records

# Of the adapter's peak learning rate; a tenth where there is no val split to choose on.
RATES = (0.03, 0.1, 0.3)
TENTH = 0.1
TRIAL = 0.2
# fp32 weight, gradient and two moments; on a CPU also the best weights so far and a checkpoint as it is written.
BYTES_A_WEIGHT = {"cuda": 16, "cpu": 40}


@dataclass
class Job:
    """What all trainings of one full fine-tuning share."""

    base: Base
    weights: AllWeights
    start: dict[str, torch.Tensor]
    config: TrainConfig
    plan: Plan
    seed: int
    splits: dict[str, list[Rendered]]
    precision: torch.dtype
    work: Path
    report: Report
    say: Callable[[str], None]

    def train(self, rate: float, steps: int, folder: Path) -> Trainer:
        """Trains from the base's weights at a peak of `rate`, or goes on from the checkpoint in `folder`."""
        self.weights.load(self.start)
        val = self.splits["val"]
        batches = pack_batches(val, self.plan.micro_batch_tokens, max(1, len(val)))
        plan = replace(
            self.plan, peak_learning_rate=rate, total_steps=steps, warmup_steps=round(self.config.warmup_ratio * steps),
            eval_every=min(self.plan.eval_every, steps),
        )  # fmt: skip
        trainer = Trainer(
            self.base, self.weights, self.config, plan, self.seed, self.splits["train"],
            [b.to(self.base.device) for b in batches], folder / "checkpoints", self.say,
        )  # fmt: skip
        if trainer.resume():
            self.say(f"all weights: resuming after step {trainer.progress.step} of {steps}")
        # Without its cache: a cast weight would outlive the step that changes it.
        cast = torch.autocast(
            self.base.device.type, self.precision, enabled=self.precision != torch.float32, cache_enabled=False
        )
        with cast:
            loop_to_end(trainer, folder, [], self.work.parent.name, self.report)
        return trainer


def refuse_too_large(num_parameters: int, device: torch.device) -> None:
    """Raises `RunError` where all weights of a model cannot be trained in the memory that is free."""
    needed, free = BYTES_A_WEIGHT[device.type] * num_parameters, card_here(device).memory_bytes
    if needed > free:
        raise RunError(
            f"to train all {num_parameters:,} weights takes about {needed / GIB:.0f} GiB beside the activations, and "
            f"{free / GIB:.0f} GiB are free",
            hint="`--reference full` is for models that fit; without it the adapter is judged as before",
        )


def train_full(
    base: Base, config: TrainConfig, *, precision: torch.dtype, dataset: Path, out: Path, seed: int, key: str,
    report: Report, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Trains all weights of `base`, loaded in fp32, into the checkpoint `out`; returns the manifest.

    `precision` is that of the products, and of the weights as they are written. Goes on where it was stopped. Raises
    as `train` does, `Interrupted` included.
    """
    started = time.time()
    parent = read_manifest(dataset)
    if parent is None:
        raise RunError(f"`{dataset}` holds no data set", hint="run `metier prepare` first")
    reset_peak(base.device)
    splits, labels = read_records(dataset, Renderer(base.tokenizer, eos_token_ids(base.path)), config, say)
    plan = make_plan(config, len(splits["train"]), base.config.hidden_size, base.device)
    weights = unfreeze(base)
    say(f"all weights: {weights.num_parameters:,} parameters are trained")
    work = work_folder(out, key)
    job = Job(base, weights, weights.tensors(), config, plan, seed, splits, precision, work, report, say)
    trials = _trials(job)
    told = [(trial["val_loss"], trial["learning_rate"]) for trial in trials if trial["val_loss"] is not None]
    rate = min(told)[1] if told else TENTH * plan.peak_learning_rate
    say(f"all weights: learning rate {rate:.3g}" + (", the best of the trials on the val split" if told else ""))
    trainer = job.train(rate, plan.total_steps, work)
    dtype = str(precision).removeprefix("torch.")
    save_model(work, base, trainer.best, precision)
    manifest = complete(
        work, out, kind="full", key=key, started=started, parents={"dataset": parent["digest"], "base": base.digest},
        config={"train": config.model_dump()},
        details={
            **facts(trainer), "total_parameters": weights.num_parameters, "precision": f"float32, products in {dtype}",
            "trials": trials, "labels": {split: counted.as_dict() for split, counted in labels.items()},
            "peak_memory_bytes": peak_bytes(base.device),
        },
    )  # fmt: skip
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return manifest


def _trials(job: Job) -> list[dict[str, Any]]:
    """[{learning_rate, val_loss, steps}] of short trainings, kept in trials.json; none without a val split."""
    if not job.splits["val"]:
        return []
    path = job.work / "trials.json"
    done: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    steps = max(1, math.ceil(TRIAL * job.plan.total_steps))
    for share in RATES[len(done) :]:
        rate = float(f"{share * job.plan.peak_learning_rate:.3g}")
        folder = job.work / "checkpoints" / f"trial-{len(done)}"
        folder.mkdir(parents=True, exist_ok=True)
        trainer = job.train(rate, steps, folder)
        loss = trainer.progress.best_val_loss
        done.append({"learning_rate": rate, "val_loss": loss, "steps": steps})
        job.say(f"all weights: a trial of {steps} steps at {rate:.3g}: val loss {loss}")
        write_json(path, done)
        shutil.rmtree(folder, ignore_errors=True)  # all weights, several times
    return done
