"""Tries to make a base in NF4 depend on more than its checkpoint, or lie further from the model than rounding would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from metier.kernels.frozen import Nf4Weight
from metier.model import load
from metier.model.load import load_base
from metier.model.quantise import FrozenLinear, quantise_model
from metier.model.rounding import RANDOM_ROWS, ROW, rounding_ids
from tests.model.tiny import FORMATS, KINDS, Kind, save_tiny, tiny_config, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "check_storage", lambda storage, device: None)


def _loaded(folder: Path, storage: Any = "nf4") -> Any:
    return load_base(folder, dtype=torch.float32, device=CPU, storage=storage, progress=pytest.fail)


def _codes(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            assert isinstance(module.frozen, Nf4Weight)
            found[name] = module.frozen.parts[0].packed
    return found


def _save_wide(kind: Kind, folder: Path) -> Path:
    """A tiny model whose layers have several groups of 64 columns, and inputs that are correlated, as real ones."""
    tokenizer = tiny_tokenizer(FORMATS[kind])
    tiny = tiny_config(kind, tokenizer)
    config = type(tiny)(**tiny.to_dict() | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
        embeddings = model.get_input_embeddings().weight
        embeddings.data = torch.randn(len(embeddings), 16) @ torch.randn(16, 128)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_rounded_and_its_outputs_lie_nearer(kind: Kind, tmp_path: Path) -> None:
    base, dense = _loaded(_save_wide(kind, tmp_path)), _loaded(tmp_path, "dense")
    ids = rounding_ids(base.tokenizer, base.config.vocab_size)[::2, :64]
    with torch.no_grad():
        want, fed = dense.model(ids).logits, base.model(ids).logits
        quantise_model(dense.model, "nf4")
        nearest = dense.model(ids).logits
    first, second = _codes(base.model), _codes(dense.model)
    assert first.keys() == second.keys() and len(first) == 14
    assert all(bool((first[name] != second[name]).any()) for name in first)
    assert float((fed - want).norm()) < 0.9 * float((nearest - want).norm())


def test_two_loads_and_any_cut_into_files_give_the_same_codes(tmp_path: Path) -> None:
    one, many = _save_wide("llama3", tmp_path / "one"), tmp_path / "many"
    dense = _loaded(one, "dense")
    dense.model.save_pretrained(many, max_shard_size="50KB")
    dense.tokenizer.save_pretrained(many)
    assert len(list(many.glob("*.safetensors"))) > 2
    first = _codes(_loaded(one).model)
    for folder in (one, many):
        again = _codes(_loaded(folder).model)
        assert all(torch.equal(code, again[name]) for name, code in first.items())


def test_the_text_is_cut_to_full_rows_below_the_number_of_embeddings(tmp_path: Path) -> None:
    tokenizer = _loaded(save_tiny("qwen2", tmp_path), "dense").tokenizer
    ids = rounding_ids(tokenizer, 40)
    assert ids.shape[1] == ROW and len(ids) > RANDOM_ROWS and int(ids.min()) >= 0 and int(ids.max()) == 39
    assert len(ids[-RANDOM_ROWS:].unique()) == 40
