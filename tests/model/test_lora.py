"""Tries to break the adapter's arithmetic and its file: against float64 autograd, and against transformers + PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from metier.errors import ModelError
from metier.kernels.reference import cross_entropy_sum, low_rank
from metier.model.lora import Adapter, attach, load_adapter, read_adapter_config, save_adapter, scaling_of, target_names
from metier.recipe import AdapterConfig
from tests.model.tiny import KINDS, Kind, tiny_model


def randomised(adapter: Adapter, seed: int = 1) -> Adapter:
    """B is zero at the start; random values make the adapter matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def ids_for(model: Any, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (2, length), generator=generator)


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(1, 1, 7, 5), (2, 13, 96, 33), (3, 1, 17, 129)])
def test_lora_linear_equals_float64_autograd(rank: int, shape: tuple[int, int, int, int]) -> None:
    batch, tokens, inputs, outputs = shape
    torch.manual_seed(rank)
    x, w = torch.randn(batch, tokens, inputs), torch.randn(outputs, inputs)
    bias, a, b = torch.randn(outputs), torch.randn(rank, inputs), torch.randn(outputs, rank)
    grad = torch.randn(batch, tokens, outputs)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    y = torch.nn.functional.linear(leaves[0], w, bias) + low_rank(*leaves, scaling=0.7)
    y.backward(grad)
    exact = [t.double().requires_grad_() for t in (x, a, b)]
    delta = torch.einsum("or,ri->oi", exact[2], exact[1]) * 0.7
    y64 = torch.einsum("bti,oi->bto", exact[0], w.double() + delta) + bias.double()
    y64.backward(grad.double())
    for got, want in [(y, y64), *((p.grad, q.grad) for p, q in zip(leaves, exact, strict=True))]:
        assert got is not None and want is not None
        assert (got.double() - want).norm() <= 3e-6 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_gradients_equal_float64_autograd_through_the_model(kind: Kind) -> None:
    grads = []
    for dtype in (torch.float32, torch.float64):
        model, _ = tiny_model(kind)
        adapter = randomised(attach(model.to(dtype), AdapterConfig(rank=4, alpha=8), seed=0))
        if dtype == torch.float64:
            for layer in adapter.layers.values():
                layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.double(), layer.lora_b.data.double()
        ids = ids_for(model)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
        grads.append({name: p.grad for name, p in adapter.parameters.items()})
    for name, want in grads[1].items():
        got = grads[0][name]
        assert got is not None and want is not None and want.norm() > 0
        assert (got.double() - want).norm() <= 2e-5 * want.norm(), name


def test_cross_entropy_sum_equals_float64() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(37, 101), torch.randint(0, 101, (37,))
    want = -logits.double().log_softmax(-1)[range(37), targets].sum()
    assert abs(float(cross_entropy_sum(logits, targets)) - float(want)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}], ids=str)
def test_peft_loads_the_saved_adapter_with_the_same_logits_and_loss(
    kind: Kind, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = AdapterConfig(rank=4, alpha=8, **settings)
    model, _ = tiny_model(kind)
    ids = ids_for(model)
    before = model(input_ids=ids).logits
    adapter = attach(model, config, seed=0)
    assert torch.equal(model(input_ids=ids).logits, before), "a fresh adapter must change nothing"
    randomised(adapter)
    mine = model(input_ids=ids, labels=ids)
    save_adapter(tmp_path, adapter, adapter.tensors(), base="somewhere", revision=None)
    other, _ = tiny_model(kind)
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path))(input_ids=ids, labels=ids)
    assert (mine.logits - before).abs().max() > 0.1
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    with adapter.off():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids, labels=ids).logits, mine.logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.1\..*o_proj"], ids=str)
def test_an_adapter_made_by_peft_loads_with_the_same_logits(targets: Any, tmp_path: Path) -> None:
    model, _ = tiny_model("qwen2")
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM")
    )
    torch.manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = ids_for(model)
    theirs.save_pretrained(str(tmp_path))
    mine, _ = tiny_model("qwen2")
    load_adapter(mine.double(), tmp_path)
    want = theirs.eval().double()(input_ids=ids).logits
    torch.testing.assert_close(mine(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_travel_to_peft_and_switch_off_with_the_adapter(bias: Any, tmp_path: Path) -> None:
    model, _ = tiny_model("qwen2")
    ids = ids_for(model)
    before = model(input_ids=ids).logits
    adapter = randomised(attach(model, AdapterConfig(rank=2, alpha=2, bias=bias, target_modules=["q_proj"]), seed=0))
    assert len(adapter.biases) == {"all": 6, "lora_only": 2}[bias]
    mine = model(input_ids=ids).logits
    save_adapter(tmp_path, adapter, adapter.tensors(), base="somewhere", revision=None)
    other, _ = tiny_model("qwen2")
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path))
    torch.testing.assert_close(mine, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    with adapter.off():
        assert torch.equal(model(input_ids=ids).logits, before)
    again, _ = tiny_model("qwen2")
    load_adapter(again, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, mine)


def test_real_weights_give_the_logits_of_transformers_and_peft(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 49152, (1, 40), generator=torch.Generator().manual_seed(0))
    mine = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    adapter = randomised(attach(mine, AdapterConfig(), seed=0))
    assert adapter.num_parameters == 4_884_480
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b *= 0.05
    save_adapter(tmp_path, adapter, adapter.tensors(), base=str(smollm2), revision=None)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))(input_ids=ids).logits
        torch.testing.assert_close(mine(input_ids=ids).logits, theirs, atol=1e-4, rtol=1e-4)


def test_scaling_is_alpha_over_rank_or_its_root() -> None:
    assert scaling_of(AdapterConfig(rank=16, alpha=32)) == 2
    assert scaling_of(AdapterConfig(rank=16, alpha=32, use_rslora=True)) == 8


def test_all_linear_leaves_the_output_head_out() -> None:
    model, _ = tiny_model("llama2")
    names = target_names(model, "all-linear")
    assert len(names) == 2 * 7 and "lm_head" not in names
    assert "lm_head" in target_names(model, ["lm_head"])


def test_layers_named_in_full_are_saved_so_that_peft_selects_no_others(tmp_path: Path) -> None:
    model, _ = tiny_model("llama2")
    adapter = randomised(attach(model, AdapterConfig(target_modules=["model.layers.1.self_attn.q_proj"]), seed=0))
    save_adapter(tmp_path, adapter, adapter.tensors(), base="somewhere", revision=None)
    other, _ = tiny_model("llama2")
    theirs = peft.PeftModel.from_pretrained(other, str(tmp_path))
    ids = ids_for(model)
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 1


def test_an_unknown_target_module_names_what_there_is() -> None:
    model, _ = tiny_model("llama2")
    with pytest.raises(ModelError, match="`q_porj`.*did you mean `q_proj`") as caught:
        attach(model, AdapterConfig(target_modules=["q_porj"]), seed=0)
    assert "down_proj" in str(caught.value)


def test_the_start_is_the_same_for_a_seed_and_differs_between_seeds() -> None:
    starts = [attach(tiny_model("llama2")[0], AdapterConfig(), seed=seed).tensors() for seed in (0, 0, 1)]
    key = next(iter(starts[0]))
    assert torch.equal(starts[0][key], starts[1][key]) and not torch.equal(starts[0][key], starts[2][key])


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_metier_does_not_have_is_refused_rather_than_dropped(tmp_path: Path) -> None:
    model, _ = tiny_model("llama2")
    adapter = attach(model, AdapterConfig(), seed=0)
    save_adapter(tmp_path, adapter, adapter.tensors(), base="somewhere", revision=None)
    for change in ({"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}):
        before = (tmp_path / "adapter_config.json").read_text()
        edit_config(tmp_path, **change)
        with pytest.raises(ModelError, match=next(iter(change))):
            read_adapter_config(tmp_path)
        (tmp_path / "adapter_config.json").write_text(before)
    edit_config(tmp_path, peft_type="IA3")
    with pytest.raises(ModelError, match="IA3"):
        read_adapter_config(tmp_path)


def test_damaged_or_foreign_adapter_files_are_sentences(tmp_path: Path) -> None:
    model, _ = tiny_model("llama2")
    adapter = attach(model, AdapterConfig(), seed=0)
    with pytest.raises(ModelError, match="no adapter_config.json"):
        load_adapter(tiny_model("llama2")[0], tmp_path)
    tensors = adapter.tensors()
    name = next(iter(tensors))
    save_adapter(tmp_path, adapter, {k: v for k, v in tensors.items() if k != name}, base="x", revision=None)
    with pytest.raises(ModelError, match="lacks tensor"):
        load_adapter(tiny_model("llama2")[0], tmp_path)
    save_adapter(tmp_path, adapter, tensors | {name: tensors[name][:, 1:]}, base="x", revision=None)
    with pytest.raises(ModelError, match="in the adapter's file and"):
        load_adapter(tiny_model("llama2")[0], tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(ModelError, match="damaged"):
        load_adapter(tiny_model("llama2")[0], tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors only"):
        load_adapter(tiny_model("llama2")[0], tmp_path)
