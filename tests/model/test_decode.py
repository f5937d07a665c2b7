"""Tries to make a padded or a recorded decoding pass say otherwise than a plain one, or harm a neighbour's row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metier.model.bank import AdapterBank
from metier.model.decode import Decoder
from metier.model.load import Base, load_base
from metier.model.lora import attach, save_adapter
from metier.model.slots import SlotCache, forward_rows
from metier.recipe import AdapterConfig
from tests.model.test_lora import randomised
from tests.model.tiny import save_tiny

PROMPTS = [[7, 8, 9], [11] * 20, [5, 6], list(range(5, 145)), [9] * 4]
ADAPTERS = ["one", None, "one", "one", None]


def filled(folder: Path, device: str) -> tuple[AdapterBank, SlotCache]:
    """A bank of one adapter, and five rows of which each holds its prompt; there is room for three more."""
    save_tiny("llama2", folder / "base")

    def load() -> Base:
        return load_base(folder / "base", dtype=torch.float32, device=torch.device(device), progress=lambda text: None)

    base = load()
    adapter = randomised(attach(base.model, AdapterConfig(rank=4, alpha=2), seed=0))
    (folder / "one").mkdir()
    save_adapter(folder / "one", adapter, adapter.tensors(), base=str(folder / "base"), revision=None)
    bank = AdapterBank(load())
    bank.add("one", folder / "one")
    cache = SlotCache()
    cache.reserve(8, 300)
    bank.select(ADAPTERS)
    forward_rows(bank, cache, first=0, tokens=PROMPTS, starts=[0] * 5, keep=[[0]] * 5)
    return bank, cache


def plain(bank: AdapterBank, cache: SlotCache, rows: int, step: int) -> torch.Tensor:
    bank.select(ADAPTERS[:rows])
    starts = [len(p) + step for p in PROMPTS[:rows]]
    return forward_rows(
        bank, cache, first=0, tokens=[[20 + step + i] for i in range(rows)], starts=starts, keep=[[0]] * rows
    )


def test_a_padded_pass_says_what_a_plain_one_says_and_leaves_the_prompt_behind_it_alone(tmp_path: Path) -> None:
    bank, cache = filled(tmp_path, "cpu")
    # Four rows are padded to four, three to four: the fourth is a prompt under way.
    for rows in (4, 3, 5, 1):
        want = plain(bank, cache, rows, step=0)
        before = [t[rows:, :, :140].clone() for t in cache._keys.values()]
        inputs, size = Decoder(bank, cache).padded(
            [20 + i for i in range(rows)], [len(p) for p in PROMPTS[:rows]], ADAPTERS[:rows]
        )
        got = Decoder(bank, cache).run(inputs, size)
        assert size[0] == {4: 4, 3: 4, 5: 8, 1: 1}[rows]
        torch.testing.assert_close(got[:rows], want, atol=1e-5, rtol=1e-5)
        after = [t[rows:, :, :140] for t in cache._keys.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_recorded_passes_say_what_plain_ones_say_also_when_the_rectangle_has_grown(tmp_path: Path) -> None:
    bank, cache = filled(tmp_path, "cuda")
    decoder = Decoder(bank, cache)
    for step in range(4):
        if step == 2:
            cache.reserve(16, 600)
        for rows in (5, 3, 5):
            want = plain(bank, cache, rows, step)
            starts = [len(p) + step for p in PROMPTS[:rows]]
            got = decoder.decode([20 + step + i for i in range(rows)], starts, ADAPTERS[:rows])
            assert decoder.records, "the pass could not be recorded"
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
