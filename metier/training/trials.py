"""One configuration of a sweep in training, and what all of them share.

In: the base, the recipe, the data sets. Out: a member of the company that `metier.training.together` trains, with its
metrics, its comparisons, and its row of the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from metier.errors import DataError, RecipeError, RunError
from metier.model.chat import Rendered, Renderer, eos_token_ids
from metier.model.fused import FusedModel, can_fuse, fuse
from metier.model.load import Base, empty_model
from metier.model.lora import new_adapter
from metier.model.recompute import set_recompute
from metier.recipe import Recipe, variant
from metier.training.cards import card_here
from metier.training.checkpoint import Progress
from metier.training.fit import job_of
from metier.training.labels import LabelReport
from metier.training.loop import Trainer
from metier.training.memory import shape_of
from metier.training.pack import PackedBatch, pack_batches
from metier.training.plan import CONTEXT_BYTES, Choice, best, choices
from metier.training.schedule import make_plan, seed_of
from metier.training.step import StepResult
from metier.training.track import Metrics
from metier.training.train import fitted, precisions_of, read_records

MOST_AT_ONCE = 16


@dataclass
class Ground:
    """What every configuration of a sweep stands on; `datasets` are the data sets' folders by `data_key`."""

    base: Base
    recipe: Recipe
    datasets: Mapping[str, Path]
    work: Path
    say: Callable[[str], None]
    records: dict[str, list[Rendered]] = field(default_factory=dict)
    labels: dict[str, dict[str, LabelReport]] = field(default_factory=dict)
    val_batches: list[PackedBatch] = field(default_factory=list)
    renderer: Renderer = field(init=False)
    fused: FusedModel | None = None
    at_once: int = 1
    budget: int = 1024
    recompute: str = "none"

    def open(self, variants: list[Recipe], count: int) -> None:
        """Renders the records, decides how many adapters are trained at a time, and prepares the base for them.

        `count` configurations are to be trained in all, and `variants` are the extremes of what they may be. Raises
        `DataError` without records to train on or to choose by, `RecipeError` for trained biases.
        """
        if self.recipe.adapter.bias != "none":
            raise RecipeError("a sweep shares the base's bias terms, and `adapter.bias` trains them",
                              hint="set `adapter.bias: none`")  # fmt: skip
        self.renderer = Renderer(self.base.tokenizer, eos_token_ids(self.base.path))
        for key, folder in self.datasets.items():
            splits, self.labels[key] = read_records(folder, self.renderer, self.recipe.train, self.say)
            self.records[key], val = splits["train"], splits["val"]
            if not val:
                raise DataError("a sweep chooses on the validation split, and there is none", hint="set `data.val`")
        names = {name for each in variants for name in new_adapter(self.base.model, each.adapter, seed=0).layers}
        choice = self._fit(variants, count)
        self.budget, self.recompute = choice.micro_batch_tokens, choice.recompute
        batches = pack_batches(val, self.budget, len(val))
        self.val_batches = [batch.to(self.base.device) for batch in batches]
        copies = 1 if "one copy" in choice.precision else 2
        if any(each.adapter.dropout == 0 for each in variants) and names:
            self.fused = fuse(self.base.model, fp8_copies=copies)

    def _fit(self, variants: list[Recipe], count: int) -> Choice:
        """Sets `at_once`; the way to train so many of the largest of `variants` that fits, or the leanest one."""
        asked = self.recipe.sweep.at_once
        most = min(count, MOST_AT_ONCE) if asked == "auto" else asked
        largest = max((each.adapter for each in variants), key=lambda adapter: adapter.rank)
        config = max((each.train for each in variants), key=lambda train: train.micro_batch_size)
        job = job_of(next(iter(self.records.values())), largest.model_copy(update={"dropout": 0.0}), config)
        card = card_here(self.base.device)
        for at_once in range(most, 0, -1):
            together = largest.model_copy(update={"rank": largest.rank * at_once})
            shape = shape_of(empty_model(self.base.model.config, self.base.dtype), together)
            some = replace(job, records_per_pass=job.records_per_pass * at_once)
            ways = choices(shape, some, card, self.recipe.train, precisions_of(self.base))
            loaded = min(way.memory["frozen base"] for way in ways) + (0 if card.is_cpu else CONTEXT_BYTES)
            chosen = best(ways, card.memory_bytes + loaded)
            if chosen is not None or asked != "auto" or at_once == 1:
                self.at_once = at_once
                return chosen or min(ways, key=lambda way: way.total_bytes)
        raise AssertionError("one adapter is the least")


def data_key(recipe: Recipe) -> str:
    """Configurations with the same key are trained on the same data set."""
    return json.dumps(recipe.balance.model_dump(mode="json"), sort_keys=True)


@dataclass
class Member:
    """Configuration `number` in training. `rungs` are the steps after which it is compared with the others."""

    number: int
    values: dict[str, Any]
    recipe: Recipe
    trainer: Trainer
    metrics: Metrics
    rungs: list[int]

    @classmethod
    def start(
        cls, ground: Ground, number: int, values: dict[str, Any], *, rungs: list[float],
        found: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None,
    ) -> Member:  # fmt: skip
        """Sets it up at its first step, or where `found`, the JSON and the tensors of `state`, were taken."""
        recipe = variant(ground.recipe, values)
        key, base = data_key(recipe), ground.base
        adapter = new_adapter(base.model, recipe.adapter, seed=seed_of("adapter", recipe.seed))
        plan = make_plan(recipe.train, len(ground.records[key]), base.config.hidden_size, base.device)
        is_fused = ground.fused is not None and can_fuse(adapter)
        if is_fused:
            plan = replace(plan, micro_batch_tokens=ground.budget, recompute=ground.recompute)
        else:  # its passes are its own, and cut as they would be alone: dropout depends on that
            plan = fitted(plan, base, recipe.adapter, recipe.train, ground.records[key], _say_nothing)
        trainer = Trainer(
            base, adapter, recipe.train, plan, recipe.seed, ground.records[key], ground.val_batches, ground.work,
            ground.say, ground.fused if is_fused else base.model,
        )  # fmt: skip
        set_recompute(trainer.model, plan.recompute)
        if found is not None:
            state, tensors = found
            trainer.restore(Progress(**state["progress"]), tensors, state["extra"])
        path = ground.work / "metrics" / f"trial-{number:02d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        grain, last = plan.eval_every, plan.total_steps
        steps = [max(grain, round(share * last / grain) * grain) for share in rungs]
        metrics = Metrics(path, trainer.progress.metrics_bytes, [], "")
        return cls(number, values, recipe, trainer, metrics, [step for step in steps if step < last])

    @property
    def label(self) -> str:
        return label(self.number, self.values)

    def after(self, result: StepResult, *, learning_rate: float, validate: Callable[[], float | None]) -> str | None:
        """Counts, logs and validates a step; `complete`, `diverged`, `rung`, or None where it just goes on."""
        trainer = self.trainer
        progress, plan = trainer.progress, trainer.plan
        try:
            trainer.counted(result)
        except RunError:
            return "diverged"
        is_last = progress.step == plan.total_steps
        if result.is_skipped:
            progress.metrics_bytes = self.metrics.log(step=progress.step, learning_rate=learning_rate, skipped=1)
        elif progress.step % trainer.config.log_every == 0 or progress.step == 1 or is_last:
            progress.metrics_bytes = self.metrics.log(
                step=progress.step, loss=result.loss, learning_rate=learning_rate, grad_norm=result.grad_norm,
                num_tokens=result.num_tokens, num_loss_tokens=result.num_loss_tokens,
            )  # fmt: skip
        if progress.step % plan.eval_every == 0 or is_last:
            loss = validate()
            if loss is not None:
                progress.metrics_bytes = self.metrics.log(step=progress.step, val_loss=loss)
        if is_last:
            return "complete" if progress.best_val_loss is not None else "diverged"
        return "rung" if progress.step in self.rungs else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `start` needs to go on: tensors by name, and JSON."""
        tensors, extra = self.trainer.state()
        return tensors, {"number": self.number, "values": self.values, "progress": asdict(self.trainer.progress),
                         "extra": extra}  # fmt: skip

    def row(self, state: str) -> dict[str, Any]:
        """The configuration's row of the table: nothing in it depends on the machine's speed."""
        trainer, progress = self.trainer, self.trainer.progress
        loss = progress.best_val_loss
        return {
            "number": self.number, "values": self.values, "state": state, "val_loss": loss,
            "best_step": progress.best_step, "steps": progress.step, "total_steps": trainer.plan.total_steps,
            "learning_rate": trainer.plan.peak_learning_rate, "rank": trainer.lora.config.rank,
            "num_train_tokens": progress.num_tokens, "trainable_parameters": trainer.adapter.num_parameters,
        }  # fmt: skip

    @property
    def loss(self) -> float:
        """What it is compared by: its best loss on the validation split so far."""
        loss = self.trainer.progress.best_val_loss
        return math.nan if loss is None else loss


def label(number: int, values: Mapping[str, Any]) -> str:
    """`configuration 3 (rank 8, learning_rate 0.001)`."""
    told = ", ".join(f"{key.rpartition('.')[2]} {_shown(value)}" for key, value in values.items())
    return f"configuration {number + 1} ({told})"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _say_nothing(text: str) -> None: ...
