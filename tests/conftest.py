"""What every test shares: the real embedded base, a tiny one, no network through the hub, two threads."""

from __future__ import annotations

import os

# Read once, when huggingface_hub is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    import torch

    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, in the user's cache; fetched by the first test that ever asks for it."""
    from metier.model.embedded import embedded_base

    return embedded_base()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with random weights (hidden 64, 2 layers, tied embeddings, GQA) and the ChatML template."""
    from tests.model.tiny import save_tiny

    return save_tiny("smollm2", tmp_path_factory.mktemp("tiny") / "base")
