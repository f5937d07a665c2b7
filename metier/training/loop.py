"""A run in progress: step after step, with what is logged, validated, saved and stepped back from on the way.

What a step does is a function of the seed and the step's number; the state between steps is in the
checkpoints. A step whose loss or gradient is not finite leaves no trace in the weights: it is skipped, counted and
said; three in a row end the run. A step that runs out of memory is done again from its start in smaller passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from metier.errors import RunError
from metier.model.chat import Rendered
from metier.model.full import AllWeights
from metier.model.fused import fuse
from metier.model.load import Base
from metier.model.lora import Adapter
from metier.model.recompute import can_recompute, set_recompute
from metier.recipe import TrainConfig
from metier.training import ranks
from metier.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from metier.training.pack import PackedBatch, pack_batches
from metier.training.schedule import Plan, learning_rate_at, records_of_step, seed_of
from metier.training.step import OutOfMemory, StepResult, mean_loss, start_step
from metier.training.stop import StopRequest
from metier.training.track import Metrics


class Report(Protocol):
    """Where the loop tells how far it is: `done` of `total` steps, with the numbers of the step."""

    def __call__(self, what: str, done: int, total: int, **numbers: float) -> None: ...


@dataclass
class Trainer:
    """A run in progress: the model, what it trains on, and where it stands.

    `adapter` is what is trained, which may be all weights. `val_batches` are this rank's part of the val split. `model`
    is given where it is shared with other adapters.
    """

    base: Base
    adapter: Adapter | AllWeights
    config: TrainConfig
    plan: Plan
    seed: int
    train_records: Sequence[Rendered]
    val_batches: Sequence[PackedBatch]
    folder: Path
    say: Callable[[str], None]
    model: Any = None

    def __post_init__(self) -> None:
        self.progress = Progress(micro_batch_tokens=self.plan.micro_batch_tokens, recompute=self.plan.recompute)
        self.best: dict[str, torch.Tensor] = self.adapter.tensors()
        self._ahead: tuple[tuple[int, int], list[PackedBatch]] | None = None
        self.optimizer = torch.optim.AdamW(
            list(self.adapter.parameters.values()), lr=self.plan.peak_learning_rate,
            weight_decay=self.config.weight_decay, fused=True,
        )  # fmt: skip
        if self.model is None:
            self.model = self.base.model
            if isinstance(self.adapter, Adapter):
                self.model = fuse(self.base.model, self.adapter, fp8_copies=self.plan.fp8_copies) or self.base.model
        self.has_val = ranks.totals(len(self.val_batches))[0] > 0
        is_fp16 = self.base.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.base.device.type, enabled=is_fp16)

    @property
    def lora(self) -> Adapter:
        """The adapter, where no other weights are trained."""
        assert isinstance(self.adapter, Adapter)
        return self.adapter

    def step(self) -> StepResult:
        """The next optimizer step; afterwards `progress` counts it."""
        return self.counted(self.attempt())

    def batches(self) -> list[PackedBatch]:
        """This rank's passes of the next step, on the device."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (self.progress.step, self.progress.micro_batch_tokens):
            return ahead[1]
        return self._batches_of(self.progress.step)

    def _batches_of(self, number: int) -> list[PackedBatch]:
        chosen = [self.train_records[i] for i in records_of_step(self.plan, self.seed, number)]
        places = ranks.share(range(len(chosen)), [record.num_tokens for record in chosen])
        # By its place in the step: a record's dropout is the same in any pass of any rank.
        keys = [seed_of("dropout", self.seed, number, place) & 0x7FFFFFFF for place in places]
        batches = pack_batches(
            [chosen[place] for place in places], self.progress.micro_batch_tokens, self.config.micro_batch_size, keys
        )
        return [batch.to(self.base.device) for batch in batches]

    def attempt(self) -> StepResult:
        """The next step, not counted yet; in smaller passes where memory runs out."""
        try:
            return self._train_step()
        except OutOfMemory as error:
            reason = str(error)
        self._step_back(reason)
        return self.attempt()

    def _train_step(self) -> StepResult:
        # For an architecture with dropout of its own.
        torch.manual_seed(seed_of("dropout", self.seed, self.progress.step))
        result = start_step(
            self.model, self.optimizer, self.batches(), learning_rate=self.learning_rate,
            max_grad_norm=self.config.max_grad_norm, scaler=self.scaler,
        )  # fmt: skip
        following = self.progress.step + 1
        if following < self.plan.total_steps:  # packed while the GPU works
            self._ahead = (following, self.progress.micro_batch_tokens), self._batches_of(following)
        return result()

    def counted(self, result: StepResult) -> StepResult:
        """Counts a step that was made or skipped. Raises `RunError` after three skipped ones in a row."""
        number = self.progress.step
        self.progress.step += 1
        self.progress.num_tokens += result.num_tokens
        self.progress.num_loss_tokens += result.num_loss_tokens
        self.progress.num_skipped += result.is_skipped
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if result.is_skipped else 0
        # fp16's loss scaler finds its scale by skipping; elsewhere three in a row mean a diverged run.
        if self.progress.skipped_in_a_row >= 3 and not self.scaler.is_enabled():
            raise RunError(
                f"the loss or its gradient was not finite in steps {number - 1} to {number + 1}; the weights are whole",
                hint="lower `train.learning_rate`; nothing of these steps reached the adapter or a checkpoint",
            )
        return result

    def _step_back(self, reason: str) -> None:
        """After running out of memory: no recorded passes, half the tokens a pass, recomputation, then a sentence.

        Weights, optimizer and step are as they were, and a step's records stay the same: the step is only cut
        into more passes. Every rank comes here together, and finds the same.
        """
        progress = self.progress
        self.optimizer.zero_grad(set_to_none=True)
        graphs = getattr(self.model, "graphs", None)
        gave_up = ranks.totals(graphs is not None and graphs.give_up())[0] > 0
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if gave_up:
            self.say(
                f"step {progress.step + 1}: out of memory; passes are no longer recorded, and the step is done again"
            )
            return
        chosen = records_of_step(self.plan, self.seed, progress.step)
        longest = max(self.train_records[i].num_tokens for i in chosen)
        if not progress.step_backs and progress.micro_batch_tokens > longest:
            progress.micro_batch_tokens = max(longest, progress.micro_batch_tokens // 2)
            remedy = f"passes of {progress.micro_batch_tokens} tokens"
        elif progress.recompute != "full" and can_recompute(self.model):
            progress.recompute = "full"
            set_recompute(self.model, "full")
            remedy = "activations are recomputed"
        else:
            raise RunError(
                f"out of memory in step {progress.step + 1}, with passes of {progress.micro_batch_tokens} tokens and "
                f"recomputation: {progress.recompute} ({reason})",
                hint="`metier plan` says what fits: a smaller base, fewer bits (`train.precision`), or shorter records "
                "(`train.max_seq_len`); the last checkpoint is intact",
            )
        progress.step_backs.append({"step": progress.step + 1, "remedy": remedy})
        self.say(f"step {progress.step + 1}: out of memory; {remedy}, and the step is done again from its start")

    @property
    def learning_rate(self) -> float:
        return learning_rate_at(
            min(self.progress.step, self.plan.total_steps - 1), self.plan.total_steps,
            peak=self.plan.peak_learning_rate, minimum=self.config.min_learning_rate,
            warmup_steps=self.plan.warmup_steps,
        )  # fmt: skip

    def validate(self) -> float | None:
        """Loss on the val split, if there is one; keeps the adapter when it is the best so far."""
        val_loss = mean_loss(self.model, self.val_batches) if self.has_val else None
        best = self.progress.best_val_loss
        if val_loss is not None and not math.isfinite(val_loss):
            self.say(f"step {self.progress.step}: the loss on the val split is not finite; this adapter is not kept")
            return None
        if val_loss is None or best is None or val_loss < best:
            self.best = self.adapter.tensors()
            self.progress.best_val_loss, self.progress.best_step = val_loss, self.progress.step
        return val_loss

    def save(self) -> None:
        """A checkpoint of now, written by rank 0."""
        if not ranks.rank():
            save_checkpoint(self.folder, self.progress, *self.state())

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` needs beside `progress`: tensors by name, and JSON."""
        tensors = {f"adapter/{k}": v for k, v in self.adapter.tensors().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for name, parameter in self.adapter.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value.detach().cpu()
        return tensors, {"scaler": self.scaler.state_dict()}

    def resume(self) -> bool:
        """Continues from the newest whole checkpoint, if there is one."""
        found = ranks.from_first(load_checkpoint(self.folder, self.say) if not ranks.rank() else None)
        if found is None:
            return False
        self.restore(*found)
        return True

    def restore(self, progress: Progress, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Stands where `progress` and `state()` were taken."""
        self.progress = progress
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
        set_recompute(self.model, self.progress.recompute)

    def loop(self, report: Report, metrics: Metrics | None, stop: StopRequest) -> bool:
        """Steps until the plan is done or `stop` is asked for: logs (on rank 0), validates and saves on the way.

        Returns whether it was stopped, which may be after the last step.
        """
        plan, config, progress = self.plan, self.config, self.progress
        log = metrics.log if metrics else _log_nothing
        before = progress.seconds
        started = time.perf_counter()
        self.base.model.train()
        set_recompute(self.model, progress.recompute)
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
                progress.metrics_bytes = log(step=progress.step, learning_rate=learning_rate, skipped=1)
            elif progress.step % config.log_every == 0 or progress.step == 1 or is_last:
                progress.metrics_bytes = log(step=progress.step, **numbers)
            if progress.step % plan.eval_every == 0 or is_last:
                val_loss = self.validate()
                if val_loss is not None:
                    numbers["val_loss"] = val_loss
                    progress.metrics_bytes = log(step=progress.step, val_loss=val_loss)
            report("training", progress.step, plan.total_steps, **numbers)
            # Read once: a later signal is for the next step to see. A signal to one rank stops them all.
            is_stopping = ranks.totals(stop.signal_number is not None)[0] > 0
            if progress.step % config.save_every == 0 or is_last or is_stopping:
                self.save()
            if is_stopping:
                return True
        return False


def _log_nothing(**values: float) -> int:
    return 0
