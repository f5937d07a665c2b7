"""Tries to make adapters that share passes on a GPU differ from their own runs there, or one's NaN reach another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.kernels.frozen import Storage
from metier.model.fused import fuse
from metier.model.load import load_base
from metier.model.lora import new_adapter
from metier.recipe import AdapterConfig, TrainConfig
from metier.training.loop import Trainer
from metier.training.schedule import make_plan
from metier.training.together import Together
from tests.training.test_pack import random_records

CUDA = torch.device("cuda")
RANKS = (4, 32, 16, 8, 1)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _same_order() -> Iterator[None]:
    """FlashAttention's backward adds in any order unless it is asked not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def company(folder: Path, storage: Storage, ranks: tuple[int, ...] = RANKS) -> Together:
    base = load_base(str(folder), dtype=torch.bfloat16, device=CUDA, storage=storage)
    fused = fuse(base.model)
    assert fused is not None
    trainers = []
    for number, rank in enumerate(ranks):
        config = TrainConfig(micro_batch_size=2 + number, learning_rate=1e-2, warmup_ratio=0.0)
        adapter = new_adapter(base.model, AdapterConfig(rank=rank), seed=number)
        records = random_records(24, base.model.config.vocab_size, seed=number)
        plan = make_plan(config, 24, base.config.hidden_size, base.device)
        trainers.append(Trainer(base, adapter, config, plan, number, records, [], Path("none"), print, fused))
    together = Together(base, fused, 10_000, print)
    together.hold(trainers)
    base.model.train()
    return together


def rounds(together: Together, count: int) -> list[list[float]]:
    """Every adapter's losses, step by step."""
    found = []
    for _ in range(count):
        results = together.round()
        for trainer, result in zip(together.trainers, results, strict=True):
            trainer.counted(result)
        found.append([result.loss for result in results])
    return [list(one) for one in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("storage", "ranks"), [("dense", RANKS), ("fp8", RANKS), ("dense", (4, 64)), ("dense", (4, 80))]
)
def test_each_adapter_follows_its_own_run(tiny_base: Path, storage: Storage, ranks: tuple[int, ...]) -> None:
    together = company(tiny_base, storage, ranks)
    shared = rounds(together, 6)
    assert together.fused is not None
    assert (together.fused.graphs is not None and bool(together.fused.graphs.recorded)) == (max(ranks) <= 64)
    for number in range(len(ranks)):
        alone = company(tiny_base, storage, ranks)
        alone.hold([alone.trainers[number]])
        assert rounds(alone, 6)[0] == pytest.approx(shared[number], rel=2e-2), number


@pytest.mark.parametrize("storage", ["dense", "fp8"])
@pytest.mark.parametrize("is_graphed", [True, False])
def test_a_nan_in_one_adapter_leaves_the_others_bit_identical(
    tiny_base: Path, storage: Storage, is_graphed: bool
) -> None:
    weights: list[list[dict[str, torch.Tensor]]] = []
    for planted in (False, True):
        together = company(tiny_base, storage)
        assert together.fused is not None
        if not is_graphed:
            together.fused.graphs = None
        for number in range(5):
            if planted and number == 2:
                layer: Any = next(iter(together.trainers[1].adapter.layers.values()))  # type: ignore[union-attr]
                layer.lora_a.data[0, 0] = torch.nan
            for trainer, result in zip(together.trainers, together.round(), strict=True):
                assert result.is_skipped == (planted and number >= 2 and trainer is together.trainers[1])
                trainer.progress.step += 1
        weights.append([trainer.adapter.tensors() for trainer in together.trainers])
    for number, (clean, beside) in enumerate(zip(*weights, strict=True)):
        assert number == 1 or all(torch.equal(clean[name], beside[name]) for name in clean)
