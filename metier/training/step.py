"""One optimizer step. The step's loss is the sum over its unmasked tokens, divided by their number.

So a record weighs the same however the step is cut into micro-batches, or divided over processes: 1 x 8
equals 8 x 1. With weights w, of class-weighted records, it is sum(w * loss) / sum(w) over the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metier.kernels.reference import cross_entropy_sum
from metier.model.fused import FusedModel
from metier.training import ranks
from metier.training.pack import PackedBatch


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss` in nats a token (weighted), `grad_norm` before clipping; `is_skipped` when either was not finite."""

    loss: float
    grad_norm: float
    num_tokens: int
    num_loss_tokens: int
    is_skipped: bool


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


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    *,
    learning_rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler,
) -> StepResult:
    """Forward and backward over `batches`, clip, update. A step with NaN or inf leaves the weights as they were.

    With several ranks, `batches` are this rank's part of the step; the result is of all of them.
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
    for batch in batches:
        total += accumulate(model, batch, weight)
    ranks.sum_gradients(parameters)
    (loss_of_all,) = ranks.totals(float(total))
    counts = StepResult(loss_of_all / loss_weight, 0.0, int(num_tokens), int(num_loss_tokens), False)
    return update(optimizer, counts, learning_rate=learning_rate, max_grad_norm=max_grad_norm, scaler=scaler)


def update(
    optimizer: torch.optim.Optimizer,
    counts: StepResult,
    *,
    learning_rate: float,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler,
) -> StepResult:
    """Clips the gradients that are there, and steps; `counts` come back with the norm, and whether it was skipped."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    is_finite = bool(torch.isfinite(grad_norm)) and math.isfinite(counts.loss)
    if is_finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return replace(counts, grad_norm=float(grad_norm), is_skipped=not is_finite)


def accumulate(model: Any, batch: PackedBatch, weight: torch.Tensor) -> torch.Tensor:
    """The pass's `loss_sum`, detached, after adding its gradient times `weight` to the adapter's."""
    if isinstance(model, FusedModel):
        return model.accumulate(batch, weight)
    loss = loss_sum(model, batch)
    torch.autograd.backward(loss * weight)
    return loss.detach()


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[PackedBatch]) -> float:
    """Loss in nats a token over `batches` (of all ranks together), without dropout."""
    was_training = model.training
    model.eval()
    try:
        mine = sum(float(loss_sum(model, batch)) for batch in batches)
    finally:
        model.train(was_training)
    num_loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    total, of_all = ranks.totals(mine, num_loss_tokens)
    return total / of_all
