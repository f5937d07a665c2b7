"""Activation recomputation: backward computes a decoder layer's forward once more instead of keeping it.

It is torch's own `checkpoint` round each decoder layer (Chen et al., 2016, arXiv 1604.06174), which transformers'
layers know how to use; dropout's random state is kept, so gradients are equal bit for bit. What is kept is each
layer's input; the price is one more forward pass.
"""

from __future__ import annotations

from typing import Any


def set_recompute(model: Any, is_on: bool) -> None:
    """Switches recomputation of `model`, a transformers model, on or off; it works in training mode alone."""
    if is_on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif model.is_gradient_checkpointing:
        model.gradient_checkpointing_disable()


def can_recompute(model: Any) -> bool:
    """Whether the architecture's layers can be recomputed."""
    return bool(model.supports_gradient_checkpointing)
