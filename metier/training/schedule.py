"""Cosine annealing with a linear warm-up (Loshchilov and Hutter, 2016, arXiv 1608.03983, equation 5)."""

from __future__ import annotations

import math

from metier.recipe import TrainConfig


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
