"""Several trainings on one base in one process: a round is one optimizer step of each.

Their records share passes over the frozen base, each adapter's rows in one stretch of their own; its losses, gradients,
clipping, optimizer, schedule and step count are its own, so each follows the run that it would be alone, and what is
not finite in one reaches no other. An adapter that the fused path does not take (dropout, another architecture) has
passes of its own in the same round.

Limits: products of matrices differ in the last bits with the number of rows, so an adapter's numbers do so too with
the company it keeps; within one company they are the same bit for bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from metier.errors import RunError
from metier.model.fused import FusedModel
from metier.model.load import Base
from metier.training.loop import Trainer
from metier.training.pack import PackedBatch
from metier.training.step import StepResult, is_out_of_memory, update

Span = tuple[int, int, int]


@dataclass
class Together:
    """`trainers` on `base`; those whose model is `fused` share its passes, of at most `budget` tokens."""

    base: Base
    fused: FusedModel | None
    budget: int
    say: Callable[[str], None]
    trainers: list[Trainer] = field(default_factory=list)

    def hold(self, trainers: Sequence[Trainer]) -> None:
        """Who takes part from now on."""
        self.trainers = list(trainers)
        if self.fused is not None:
            self.fused.hold([trainer.lora for trainer in self.sharing])

    @property
    def sharing(self) -> list[Trainer]:
        """Those of like ranks side by side: kernels take them in one launch."""
        return sorted((t for t in self.trainers if t.model is self.fused), key=lambda t: t.lora.config.rank)

    def round(self) -> list[StepResult]:
        """One step of every trainer, in their order; their `progress` counts it when `counted` is called."""
        sharing = self.sharing
        results = dict(zip(map(id, sharing), self._joint(sharing), strict=True))
        for trainer in self.trainers:
            if trainer.model is not self.fused:
                with self.alone(trainer):
                    results[id(trainer)] = trainer.attempt()
        return [results[id(trainer)] for trainer in self.trainers]

    @contextlib.contextmanager
    def alone(self, trainer: Trainer) -> Iterator[None]:
        """Inside, the base computes with this trainer's adapter."""
        if trainer.model is self.fused:
            assert self.fused is not None
            with self.fused.alone(self.sharing.index(trainer)):
                yield
            return
        trainer.lora.put_in(self.base.model)
        self.base.model.train()
        try:
            yield
        finally:
            trainer.lora.take_out(self.base.model)

    def _joint(self, sharing: list[Trainer]) -> list[StepResult]:
        if len(sharing) < 2:
            return [trainer.attempt() for trainer in sharing]
        try:
            gradients = self._gradients(sharing)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the activations of the failed pass
        else:  # what is done again ends before the first adapter's step
            return self._update(sharing, *gradients)
        for trainer in sharing:
            trainer.optimizer.zero_grad(set_to_none=True)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.budget <= 256:
            raise RunError(
                f"out of memory with {len(sharing)} adapters and passes of {self.budget} tokens",
                hint="set `sweep.at_once` to fewer adapters, or `train.recompute: full`",
            )
        self.budget //= 2
        for trainer in sharing:
            trainer.progress.micro_batch_tokens = min(trainer.progress.micro_batch_tokens, self.budget)
        self.say(f"out of memory: passes of {self.budget} tokens, and the round is done again from its start")
        return self._joint(sharing)

    def _gradients(self, sharing: list[Trainer]) -> tuple[list[list[PackedBatch]], list[torch.Tensor]]:
        """Each adapter's batches and summed loss, with its gradients where its optimizer finds them."""
        assert self.fused is not None
        steps = [trainer.batches() for trainer in sharing]
        shares = [sum(batch.loss_weight for batch in step) for step in steps]
        weights = [
            trainer.scaler.scale(torch.full((), 1 / share, device=self.base.device))
            for trainer, share in zip(sharing, shares, strict=True)
        ]
        totals = [torch.zeros((), device=self.base.device) for _ in sharing]
        self.fused.clear()
        for company in companies(steps, self.budget):
            batch, spans, sizes = side_by_side(company)
            each = torch.cat([weights[number].expand(size) for number, size in sizes])
            counts = batch.loss_weights
            losses = self.fused.accumulate_each(batch, each if counts is None else each * counts, spans)
            losses = losses if counts is None else losses * counts
            for (number, _), own in zip(sizes, torch.split(losses, [size for _, size in sizes]), strict=True):
                totals[number] += own.sum()
        self.fused.settle()
        return steps, totals

    def _update(
        self, sharing: list[Trainer], steps: list[list[PackedBatch]], totals: list[torch.Tensor]
    ) -> list[StepResult]:
        """Each adapter's step."""
        # All are on their way before one is waited for.
        numbers = torch.stack([
            update(
                trainer.optimizer, total, learning_rate=trainer.learning_rate,
                max_grad_norm=trainer.config.max_grad_norm, scaler=trainer.scaler,
            )
            for trainer, total in zip(sharing, totals, strict=True)
        ]).tolist()  # fmt: skip
        results = []
        for step, (loss, grad_norm) in zip(steps, numbers, strict=True):
            share = sum(batch.loss_weight for batch in step)
            num_tokens = sum(batch.num_tokens for batch in step)
            num_loss_tokens = sum(batch.num_loss_tokens for batch in step)
            is_skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
            results.append(StepResult(loss / share, grad_norm, num_tokens, num_loss_tokens, is_skipped))
        return results


def companies(steps: Sequence[Sequence[PackedBatch]], budget: int) -> list[list[tuple[int, PackedBatch]]]:
    """The passes of a round: batches of different adapters (by number), side by side up to `budget` tokens."""
    passes: list[list[tuple[int, PackedBatch]]] = []
    for turn in range(max(map(len, steps))):
        passes.append([])
        room = budget
        for number, step in enumerate(steps):
            if turn >= len(step):
                continue
            if passes[-1] and step[turn].num_tokens > room:
                passes.append([])
                room = budget
            passes[-1].append((number, step[turn]))
            room -= step[turn].num_tokens
    return passes


def side_by_side(
    company: Sequence[tuple[int, PackedBatch]],
) -> tuple[PackedBatch, tuple[Span, ...], list[tuple[int, int]]]:
    """One pass from several adapters' batches; the adapters' spans; how many supervised positions each has."""
    ids, places, positions, targets, spans, sizes = [], [], [], [], [], []
    lengths: list[int] = []
    counts = [torch.ones_like(batch.loss_targets, dtype=torch.float32) if batch.loss_weights is None
              else batch.loss_weights for _, batch in company]  # fmt: skip
    is_weighted = any(batch.loss_weights is not None for _, batch in company)
    start = 0
    for number, batch in company:
        ids.append(batch.input_ids)
        places.append(batch.position_ids)
        positions.append(batch.loss_positions + start)
        targets.append(batch.loss_targets)
        lengths += batch.lengths
        end = start + batch.num_tokens
        spans.append((number, start, end))
        sizes.append((number, batch.num_loss_tokens))
        start = end
    joined = PackedBatch(torch.cat(ids, 1), torch.cat(places, 1), torch.cat(positions), torch.cat(targets),
                         tuple(lengths), torch.cat(counts) if is_weighted else None)  # fmt: skip
    return joined, tuple(spans), sizes
