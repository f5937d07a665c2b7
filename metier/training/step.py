"""One optimizer step. The step's loss is the sum over its unmasked tokens, divided by their number.

So a record weighs the same however the step is cut into micro-batches, or divided over processes: 1 x 8
equals 8 x 1. With weights w, of class-weighted records, it is sum(w * loss) / sum(w) over the whole step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from metier.errors import RunError
from metier.kernels.reference import cross_entropy_sum
from metier.model.fused import FusedModel
from metier.model.lora import LoRALinear
from metier.model.shards import shards_of
from metier.training import ranks
from metier.training.pack import PackedBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss` in nats a token (weighted), `grad_norm` before clipping; `is_skipped` when either was not finite."""

    loss: float
    grad_norm: float
    num_tokens: int
    num_loss_tokens: int
    is_skipped: bool


class OutOfMemory(Exception):
    """A pass of this step ran out of memory, on this rank or another; raised on every rank."""


def loss_sum(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Summed cross-entropy in nats (fp32 scalar) of one pass; only supervised positions reach the output head.

    Each position counts as much as it weighs.

    `model` is a transformers model, or the `FusedModel` over one.
    """
    if isinstance(model, FusedModel):
        return model.loss_sum(batch)
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.loss_positions,
    ).logits
    return cross_entropy_sum(logits[0], batch.loss_targets, batch.loss_weights)


def train_step(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[PackedBatch], **how: Any) -> StepResult:
    """`start_step`, waited for."""
    return start_step(model, optimizer, batches, **how)()


def start_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    *,
    learning_rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler,
) -> Callable[[], StepResult]:
    """Forward and backward over `batches`, clip, update. A step with NaN or inf leaves the weights as they were.

    What is returned waits for the result: until then the host has time for something else, where a GPU does the work.
    With several ranks, `batches` are this rank's part of the step; the result is of all of them. Raises `OutOfMemory`
    on all of them when a pass of one did not fit; weights and optimizer are then as they were.
    `scaler` scales the loss for fp16 and is disabled otherwise.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.zeros((), device=parameters[0].device)
    num_loss_tokens, num_tokens, loss_weight = ranks.totals(
        sum(batch.num_loss_tokens for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(batch.loss_weight for batch in batches),
    )
    weight = scaler.scale(torch.full_like(total, 1 / loss_weight))
    reason = ""
    for batch, this_pass in passes(model, batches, backward=True):
        with this_pass:
            try:
                if batch is not None and not reason:
                    total += accumulate(model, batch, weight)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = (str(error).splitlines() or ["memory"])[0]
    # The failed pass's activations are free from here on. The ranks agree before they add up gradients.
    if ranks.size() > 1:
        loss_of_all, num_failed = ranks.totals(0.0 if reason else float(total), bool(reason))
        if num_failed:
            raise OutOfMemory(reason or "another rank ran out of memory")
    elif reason:
        raise OutOfMemory(reason)
    ranks.sum_gradients(parameters)
    # Of several ranks the loss is known already; of one it may still be on its way.
    loss = total if ranks.size() == 1 else torch.tensor(loss_of_all, dtype=torch.float64)
    numbers = update(optimizer, loss, learning_rate=learning_rate, max_grad_norm=max_grad_norm, scaler=scaler)

    def result() -> StepResult:
        loss_value, grad_norm = numbers.tolist()
        is_skipped = not (math.isfinite(loss_value) and math.isfinite(grad_norm))
        return StepResult(loss_value / loss_weight, grad_norm, int(num_tokens), int(num_loss_tokens), is_skipped)

    return result


def passes(
    model: Any, batches: Sequence[PackedBatch], *, backward: bool
) -> Iterator[tuple[PackedBatch | None, contextlib.AbstractContextManager[None]]]:  # fmt: skip
    """Each batch, and what its pass is to be made within.

    Where the base is shared over the ranks they all make as many passes; None is one of other ranks' alone.
    """
    inner = model.model if isinstance(model, FusedModel) else model
    shards = shards_of(inner)
    for batch in ranks.in_turn(batches, together=shards is not None):
        yield batch, shards.one_pass(backward=backward) if shards else contextlib.nullcontext()


def update(
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    *,
    learning_rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler,
) -> torch.Tensor:
    """Clips the gradients that are there, and steps unless they or `loss`, a scalar, are not finite.

    Returns [2]: the loss and the norm before clipping, which a GPU may still be working on.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if loss.is_cuda and not scaler.is_enabled():
        numbers = _update_unseen(optimizer, parameters, max_grad_norm, loss)
    else:
        loss_value = float(loss)
        scaler.unscale_(optimizer)
        grad_norm = float(_with_room(optimizer, lambda: torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)))
        if math.isfinite(grad_norm) and math.isfinite(loss_value):
            _with_room(optimizer, lambda: scaler.step(optimizer))
        scaler.update()
        numbers = torch.tensor([loss_value, grad_norm], dtype=torch.float64)
    optimizer.zero_grad(set_to_none=True)
    return numbers


def _update_unseen(
    optimizer: Any, parameters: list[torch.Tensor], max_grad_norm: float, loss: torch.Tensor
) -> torch.Tensor:
    """Clips and updates without waiting for the numbers: the GPU itself leaves a step with NaN or inf out.

    That is what fused optimizers do for torch's loss scaler, which sets the same attribute. Returns loss and norm, [2].
    """
    norm = _with_room(optimizer, lambda: torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    numbers = torch.stack([loss.to(norm.dtype), norm])
    optimizer.grad_scale, optimizer.found_inf = None, (~numbers.isfinite()).any().to(torch.float32)
    try:
        _with_room(optimizer, optimizer.step)
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    return numbers


def _with_room(optimizer: torch.optim.Optimizer, act: Callable[[], T]) -> T:
    """`act()`, a part of an update, once more where memory ran out before it changed anything.

    Never the whole step: beside others' updates, or on another rank, it may be made already. Raises `RunError` where
    memory runs out again.
    """
    for is_last in (False, True):
        try:
            return act()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if is_last:
                raise RunError(
                    "out of memory in the optimizer's step, after the gradients were computed",
                    hint="a smaller `adapter.rank`, or fewer bits (`train.precision`); the last checkpoint is intact",
                ) from None
            error.__traceback__ = None
        # A parameter whose moments were not all made is one without moments.
        for parameter in [p for p, state in optimizer.state.items() if "exp_avg_sq" not in state]:
            del optimizer.state[parameter]
        torch.cuda.empty_cache()
    raise AssertionError("the last one returns or raises")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory ran out: torch raises a plain RuntimeError for the latter."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def accumulate(model: Any, batch: PackedBatch, weight: torch.Tensor) -> torch.Tensor:
    """The pass's `loss_sum`, detached, after adding its gradient times `weight` to the adapter's."""
    if isinstance(model, FusedModel):
        return model.accumulate(batch, weight)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.row_keys = batch.row_keys
    loss = loss_sum(model, batch)
    torch.autograd.backward(loss * weight)
    return loss.detach()


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[PackedBatch]) -> float:
    """Loss in nats a token over `batches` (of all ranks together), without dropout."""
    was_training = model.training
    model.eval()
    try:
        mine = 0.0
        for batch, this_pass in passes(model, batches, backward=False):
            with this_pass:
                mine += float(loss_sum(model, batch)) if batch is not None else 0.0
    finally:
        model.train(was_training)
    num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    total, of_all = ranks.totals(mine, num_loss_tokens)
    return total / of_all
