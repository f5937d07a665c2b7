"""metier: an organisation's own records become a LoRA adapter, with the proof that it works."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Recipe", "deidentify", "evaluate", "export", "load", "prepare", "run", "serve", "train"]

_HOMES = {
    "Recipe": "metier.recipe",
    "deidentify": "metier.data.deidentify.rewrite",
    "evaluate": "metier.pipeline",
    "export": "metier.pipeline",
    "load": "metier.model.specialist",
    "prepare": "metier.pipeline",
    "run": "metier.pipeline",
    "serve": "metier.serving.server",
    "train": "metier.pipeline",
}


def __getattr__(name: str) -> Any:
    # Importing metier must not import torch: a public name is fetched when it is first used.
    if name not in _HOMES:
        raise AttributeError(f"module 'metier' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
