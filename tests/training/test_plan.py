"""Tries to make the plan differ from the tensors that autograd really keeps, or to choose what does not fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from click.testing import Result
from typer.testing import CliRunner

from metier.cli import app
from metier.errors import MetierError, RecipeError, RunError
from metier.kernels.frozen import DenseWeight
from metier.model.chat import Rendered
from metier.model.fused import FusedModel, fuse
from metier.model.load import empty_model, read_config
from metier.model.lora import attach
from metier.model.recompute import set_recompute
from metier.recipe import AdapterConfig, TrainConfig
from metier.training.cards import GIB, Card, card_here, card_named
from metier.training.fit import base_that_fits, fit
from metier.training.memory import LEAN_FP8, Shape, activation_bytes, kept_inputs_bytes, layer_bytes, shape_of
from metier.training.pack import collate
from metier.training.plan import RECOMPUTE, Job, best, choices, cost
from metier.training.step import loss_sum
from tests.model.tiny_gguf import save_tiny_gguf

WIDTHS = {"vocab_size": 250, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5,
          "num_attention_heads": 6, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
          "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "llama2": transformers.LlamaConfig(**WIDTHS | {"num_key_value_heads": 6}),
    "llama3": transformers.LlamaConfig(**WIDTHS),
    "mistral": transformers.MistralConfig(**WIDTHS),
    "qwen2": transformers.Qwen2Config(**WIDTHS),
    "qwen3": transformers.Qwen3Config(**WIDTHS, head_dim=32),
    "gemma3": transformers.Gemma3TextConfig(**WIDTHS, head_dim=32),
    "phi": transformers.PhiConfig(**WIDTHS),
    "phi3": transformers.Phi3Config(**WIDTHS),
    "smollm2-135m, 4 layers": transformers.LlamaConfig(
        **WIDTHS | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
                    "num_key_value_heads": 3}
    ),
}  # fmt: skip


TOKENS = 256


def record(length: int) -> Rendered:
    ids = [5 + i % 200 for i in range(length)]
    return Rendered(ids, [-100] * (length - 8) + ids[-8:])


def kept_bytes(config: Any, dtype: torch.dtype, adapter: AdapterConfig, path: str, recompute: str) -> int:
    """Bytes of all storages that autograd keeps for one pass of TOKENS, parameters aside, without the loss's own."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    attached = attach(model, adapter, seed=0)
    trained = fuse(model, attached) if path == "fused" else model
    assert trained
    trained.train()
    set_recompute(trained, recompute)
    batch = collate([record(TOKENS // 4)] * 4)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    if isinstance(trained, FusedModel):
        trained.refresh()
        parameters |= {image.untyped_storage().data_ptr() for image, *_ in trained.images}
        weights = [site.weight for layer in trained.layers for site in layer.sites]
        parameters |= {w.weight.untyped_storage().data_ptr() for w in weights if isinstance(w, DenseWeight)}
    # The tensor is held, so that no other is given its address.
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters and tensor.shape[-1:] != (config.vocab_size,):
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum(trained, batch)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def described(config: Any, dtype: torch.dtype, adapter: AdapterConfig, path: str) -> Shape:
    return dataclasses.replace(shape_of(empty_model(config, dtype), adapter), path=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["generic", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_activations_are_those_that_autograd_keeps(name: str, path: str, dtype: torch.dtype) -> None:
    adapter = AdapterConfig(rank=8)
    shape = shape_of(empty_model(CONFIGS[name], dtype), adapter)
    if path == "fused" and shape.path == "generic":
        assert fuse(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]), cast(Any, SimpleNamespace(
            config=adapter, biases={}))) is None  # fmt: skip
        return
    shape = dataclasses.replace(shape, path=path)
    for recompute in RECOMPUTE[path][:2]:
        if (recompute == "full") or (recompute == "mlp" and dtype == torch.float32):
            continue
        counted = kept_bytes(CONFIGS[name], dtype, adapter, path, recompute)
        predicted = activation_bytes(shape, dtype.itemsize, TOKENS, recompute=recompute)
        if recompute == "mlp":
            predicted -= 2 * shape.mlp * dtype.itemsize * TOKENS  # the one layer's, which come in backward
        assert predicted == pytest.approx(counted, rel=0.1), recompute


def test_dropout_s_masks_and_few_target_modules_are_counted() -> None:
    for adapter in (
        AdapterConfig(rank=8, dropout=0.1),
        AdapterConfig(rank=64, target_modules=["q_proj", "v_proj"]),
        AdapterConfig(rank=4, target_modules=["down_proj", "o_proj"]),
    ):
        shape = described(CONFIGS["llama3"], torch.bfloat16, adapter, "generic")
        counted = kept_bytes(CONFIGS["llama3"], torch.bfloat16, adapter, "generic", "none")
        predicted = activation_bytes(shape, 2, TOKENS, recompute="none", dropout=adapter.dropout > 0)
        assert predicted == pytest.approx(counted, rel=0.1), adapter


@pytest.mark.parametrize("path", ["generic", "fused"])
def test_recomputation_keeps_the_layers_inputs_alone(path: str) -> None:
    adapter = AdapterConfig(rank=8)
    config = CONFIGS["smollm2-135m, 4 layers"]
    shape = described(config, torch.bfloat16, adapter, path)
    counted = kept_bytes(config, torch.bfloat16, adapter, path, "full")
    # The one layer in full comes during backward.
    assert kept_inputs_bytes(shape, 2, TOKENS) == pytest.approx(counted, rel=0.1)
    assert counted < activation_bytes(shape, 2, TOKENS, recompute="full")


SEVEN_B = transformers.LlamaConfig()
SEVENTY_B = transformers.LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)


def sixteen_gb() -> Card:
    return dataclasses.replace(card_named("t4"), memory_bytes=16 * GIB, has_bf16=True)


def job(longest: int) -> Job:
    return Job(mean_tokens=longest / 2, longest=longest, loss_share=0.3, records_per_pass=16, dropout=False)


@pytest.mark.parametrize("path", ["generic", "fused"])
def test_7b_fits_into_16_gib_and_70b_in_nf4_into_80(path: str) -> None:
    config = TrainConfig()
    seven = described(SEVEN_B, torch.bfloat16, AdapterConfig(), path)
    assert seven.layer_weights + seven.other_weights == 6_738_415_616
    assert seven.adapter_weights == 39_976_960
    chosen = best(choices(seven, job(1024), sixteen_gb(), config, ["bf16"]), 16 * GIB)
    assert chosen
    assert chosen.recompute == "full"
    lean = best(choices(seven, job(1024), sixteen_gb(), config, ["nf4"]), 6 * GIB)
    assert lean or path == "generic"
    seventy = described(SEVENTY_B, torch.bfloat16, AdapterConfig(), path)
    one = Job(mean_tokens=2048, longest=2048, loss_share=0.3, records_per_pass=1, dropout=False)
    chosen = best(choices(seventy, one, card_named("h100"), config, ["nf4"]), card_named("h100").memory_bytes)
    assert chosen
    assert 36 * GIB < chosen.total_bytes < 79 * GIB
    assert best(choices(seventy, one, card_named("h100"), config, ["bf16"]), card_named("h100").memory_bytes) is None


def test_the_saved_bytes_of_a_7b_layer_are_those_of_the_paper_calculation() -> None:
    """2 d + 4 d + 2 f numbers of two bytes a token and layer: 93.3 kB for LLaMA-2-7B, and 0.26 MB recomputed."""
    shape = described(SEVEN_B, torch.bfloat16, AdapterConfig(), "fused")
    per_token = layer_bytes(shape, 2, 1000) / 1000
    assert per_token == pytest.approx(93_300, rel=0.02)
    assert kept_inputs_bytes(shape, 2, 1000) / 1000 == pytest.approx(262_000, rel=0.05)


def test_more_memory_is_never_slower_and_the_choice_always_fits() -> None:
    shape = shape_of(empty_model(SEVEN_B, torch.bfloat16), AdapterConfig())
    ways = choices(shape, job(512), card_named("h100"), TrainConfig(), ["bf16"])
    rates = []
    for gib in (12, 15, 16, 20, 24, 40, 80):
        chosen = best(ways, gib * GIB)
        assert chosen is None or chosen.total_bytes <= gib * GIB
        rates.append(chosen.tok_per_sec if chosen else 0.0)
    assert rates[0] == 0
    assert all(b >= 0.98 * a for a, b in zip(rates, rates[1:], strict=False))


def test_processes_share_a_base_only_where_it_fits_no_card_whole() -> None:
    seven, seventy = (described(config, torch.bfloat16, AdapterConfig(), "fused") for config in (SEVEN_B, SEVENTY_B))
    card, config = dataclasses.replace(card_named("rtx4090"), memory_bytes=24 * GIB), TrainConfig()
    for processes in (1, 8):
        chosen = fit(seven, job(512), card, config, processes=processes).chosen
        assert chosen
        assert (chosen.shared_by, chosen.precision) == (1, "bf16")
    assert fit(seventy, job(512), card, config).chosen is None
    found = fit(seventy, job(512), card, config, processes=8)
    assert found.chosen
    assert found.chosen.shared_by == 8
    assert found.chosen.total_bytes < card.memory_bytes
    # The second, transposed copy of e4m3 weights is not made.
    assert {way.precision for way in found.ways if way.shared_by == 8} == {"bf16", LEAN_FP8, "nf4"}
    assert base_that_fits(seventy, card, TrainConfig(precision="nf4"), processes=8) == ("nf4", True)
    bf16 = next(way for way in found.ways if way.shared_by == 8 and way.precision == "bf16")
    layers = 2 * seventy.layer_weights
    assert bf16.memory["frozen base"] == pytest.approx(layers / 8 + layers / 40 + 2 * seventy.other_weights, rel=1e-6)
    with pytest.raises(RunError, match=r"base in nf4 shared by 2 processes"):
        base_that_fits(seventy, dataclasses.replace(card, memory_bytes=12 * GIB), config, processes=2)


def test_what_the_recipe_states_is_kept() -> None:
    shape = shape_of(empty_model(SEVEN_B, torch.bfloat16), AdapterConfig())
    stated = TrainConfig(micro_batch_tokens=777, recompute="full")
    ways = choices(shape, job(512), card_named("h100"), stated, ["bf16"])
    assert [(way.micro_batch_tokens, way.recompute) for way in ways] == [(777, "full")]


def test_a_job_that_cannot_fit_is_a_sentence_that_says_what_would() -> None:
    shape = shape_of(empty_model(SEVENTY_B, torch.bfloat16), AdapterConfig())
    with pytest.raises(
        RunError, match=r"does not fit into 16.0 GiB.*needs 1..\.. GiB, 128\.. of it for the frozen base"
    ):
        base_that_fits(shape, sixteen_gb(), TrainConfig(precision="bf16"))
    big = dataclasses.replace(sixteen_gb(), memory_bytes=79 * GIB)
    assert base_that_fits(shape, big, TrainConfig()) == ("nf4", False)
    with pytest.raises(RecipeError, match="h1000.*did you mean `h100`"):
        card_named("h1000")


def test_the_cpu_at_hand_is_described_the_same_way_twice() -> None:
    here, again = card_here(torch.device("cpu")), card_here(torch.device("cpu"))
    assert here.is_cpu
    assert (here.half_tflops, here.fp32_tflops) == (again.half_tflops, again.fp32_tflops)
    assert cost(
        shape_of(empty_model(CONFIGS["llama3"], torch.float32), AdapterConfig()), job(64), here, precision="fp32",
        recompute="none", budget=256,
    ).total_bytes < 20_000_000  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_verb_prints_a_plan_without_weights_and_refuses_what_cannot_fit(tiny_base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_base / "config.json", bare)
    (tmp_path / "notes.csv").write_text("q,a\n" + "\n".join(f"question {i},answer {i % 3}" for i in range(60)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {bare}\nout: {tmp_path / 'run'}\ndata: {{sources: [notes.csv], val: 5, test: 5}}\n")
    done = run(str(recipe), "--shape", "model_type=llama", "--memory", "16")
    assert done.exit_code == 0, done.exception
    assert "6.74 B weights, 32 layers; fused path" in done.stdout
    assert "plan: base in bf16, recomputation: full" in done.stdout
    shared = ["--memory", "8", "--processes", "4", "--set", "train.precision=bf16"]
    done = run(str(recipe), "--shape", "model_type=llama", *shared)
    assert done.exit_code == 0, done.exception
    assert "plan: base in bf16, its layers shared by 4 processes, recomputation: full" in done.stdout
    assert "in all, each process" in done.stdout
    assert "bf16 / 4" in done.stdout
    done = run(str(recipe), "--set", "train.precision=fp32")
    assert done.exit_code == 0, done.exception
    assert "frozen base" in done.stdout
    done = run(str(recipe), "--set", f"base={tiny_base}")
    assert "50 training records" in done.stdout, done.exception
    for problem, wrong in {
        "does not fit into 8.0 GiB": ["--shape", "model_type=llama", "--memory", "8", "--set", "train.precision=bf16"],
        "`nonsense` has no configuration": ["--shape", "model_type=nonsense"],
        "expected key=value": ["--shape", "12"],
        "not in the table": ["--card", "h1000"],
    }.items():
        with pytest.raises(MetierError, match=problem):
            raise run(str(recipe), *wrong).exception or AssertionError(wrong)
    assert not (tmp_path / "run").exists()


def test_a_gguf_file_is_planned_from_its_header(tmp_path: Path) -> None:
    model = save_tiny_gguf(tmp_path / "tiny.gguf")
    config = read_config(str(tmp_path / "tiny.gguf"))
    want = shape_of(model, AdapterConfig(rank=2))
    assert shape_of(empty_model(config, torch.float32), AdapterConfig(rank=2)) == want
