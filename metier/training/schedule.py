"""What each step does: which records, at which learning rate. All of it follows from (seed, step).

Cosine annealing with a linear warm-up (Loshchilov and Hutter, 2016, arXiv 1608.03983, equation 5).
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch

from metier.model.device import tokens_per_pass
from metier.recipe import TrainConfig


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
    recompute: str = "none"
    fp8_copies: int = 2


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
        recompute="none" if config.recompute == "auto" else config.recompute,
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


def learning_rate_at(step: int, total_steps: int, *, peak: float, minimum: float, warmup_steps: int) -> float:
    """eta_t = eta_min + (eta_max - eta_min) (1 + cos(pi t / T)) / 2, for step 0 .. total_steps - 1.

    t counts from the end of the warm-up and T is what is left of the run; during the warm-up the rate
    rises linearly to its peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    t, big_t = step - warmup_steps, total_steps - warmup_steps
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * t / big_t)) / 2


def peak_learning_rate(config: TrainConfig, hidden_size: int) -> float:
    """The recipe's rate, or for `auto` the one that LoRA wants at this width.

    5e-4 x (2000 / hidden_size) ^ 0.781: ten times full fine-tuning's rate, falling with the width as
    fitted over LLaMA models (Schulman et al., LoRA Without Regret, 2025).
    """
    if config.learning_rate != "auto":
        return config.learning_rate
    return float(f"{5e-4 * (2000 / hidden_size) ** 0.781:.3g}")
