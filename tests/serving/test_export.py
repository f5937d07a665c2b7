"""Tries to get a form out that is not the model that was measured, or to leave something half-written behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from metier.errors import ModelError, RecipeError, RunError
from metier.model.specialist import load
from metier.serving.export import export
from tests.model.tiny import KINDS, Kind
from tests.serving.tiny_run import restate, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SmolLM2's run: read, never changed."""
    return tiny_run(tmp_path_factory.mktemp("export"))


def parity(folder: Path) -> dict[str, Any]:
    forms: dict[str, Any] = json.loads((folder / "PARITY.json").read_text(encoding="utf-8"))["forms"]
    return forms


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_every_architecture_is_the_model_that_was_measured(kind: Kind, tmp_path: Path) -> None:
    source = tiny_run(tmp_path, kind)
    for to, storage in (("adapter", []), ("merged", []), ("gguf", ["f16"])):
        forms = parity(export(source, to, storage=storage))
        assert all(entry["passed"] and entry["rendering"]["identical"] == 20 for entry in forms.values()), forms
    assert [*forms] == ["gguf-adapter", "gguf-f16"]


def test_the_adapter_folder_loads_in_peft_with_its_own_tokenizer(run: Path, tmp_path: Path) -> None:
    folder = export(run, "adapter", out=tmp_path / "adapter")
    ours = load(run, precision="fp32")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Note: a lung 心"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == ours.renderer.prompt(messages)
    assert torch.allclose(logits(theirs, ids), logits(ours.base.model, ids), atol=1e-5)


def test_the_merged_folder_loads_in_plain_transformers(run: Path, tmp_path: Path) -> None:
    folder = export(run, "merged", out=tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.float16
    ours = load(run, precision="fp32")
    ids = ours.renderer.prompt([{"role": "user", "content": "Note: skin"}])
    assert torch.allclose(logits(model.float(), ids), logits(ours.base.model, ids), atol=0.05)


def test_readers_of_the_old_names_find_the_rotary_base_too(tmp_path: Path) -> None:
    folder = export(tiny_run(tmp_path, "llama3", rank=4), "merged", out=tmp_path / "merged")
    entries = json.loads((folder / "config.json").read_text())
    assert entries["rope_theta"] == 500_000.0 and entries["rope_scaling"]["factor"] == 8.0
    both = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    assert both == entries["rope_parameters"]


def test_an_export_is_made_once(run: Path, tmp_path: Path) -> None:
    first = export(run, "adapter", out=tmp_path / "adapter")
    before = (first / "manifest.json").stat().st_mtime_ns
    assert export(run, "adapter", out=tmp_path / "adapter") == first
    assert (first / "manifest.json").stat().st_mtime_ns == before


def test_a_failing_form_is_not_given_out(tmp_path: Path) -> None:
    # bf16 keeps 8 bits: an update of a thousandth of the weights' norm is mostly rounded away.
    source = tiny_run(tmp_path, shrink=0.01)
    with pytest.raises(ModelError, match="not the model that was measured"):
        export(source, "merged", storage=["bf16"])
    assert [p.name for p in (source / "export").iterdir()] == ["merged.PARITY.json"]
    entry = json.loads((source / "export" / "merged.PARITY.json").read_text())["forms"]["merged"]
    assert not entry["passed"] and any("of the adapter's effect" in reason for reason in entry["failures"])
    export(source, "merged", storage=["f32"])
    assert [p.name for p in (source / "export").iterdir()] == ["merged"]


def test_what_passed_is_given_out_beside_what_failed(tmp_path: Path) -> None:
    source = tiny_run(tmp_path, shrink=0.02)
    with pytest.raises(ModelError, match="gguf-q4_0"):
        export(source, "gguf", storage=["f16", "q4_0"])
    assert sorted(p.name for p in (source / "export" / "gguf").iterdir()) == [
        "PARITY.json", "adapter.gguf", "manifest.json", "model-f16.gguf",
    ]  # fmt: skip


def test_parity_tells_no_record(run: Path, tmp_path: Path) -> None:
    text = (export(run, "adapter", out=tmp_path / "a") / "PARITY.json").read_text(encoding="utf-8")
    assert "finding" not in text and "心" not in text


def test_too_few_held_out_records_are_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    import polars as pl

    source = tmp_path / "run"
    shutil.copytree(run, source)
    records = source / "dataset" / "records.parquet"
    pl.read_parquet(records).filter(pl.col("split") != "val").tail(60).write_parquet(records)
    restate(source / "dataset")
    with pytest.raises(RunError, match="at least 64 records and 2,000 tokens"):
        export(source, "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("use_dora", True, "DoRA"), ("modules_to_save", ["lm_head"], "trained whole"),
        ("trainable_token_indices", [1], "trained embeddings"), ("rank_pattern", {"q_proj": 64}, "rank of its own"),
        ("r", 1024, "512 at most"), ("bias", "all", "bias terms"), ("target_modules", ["embed_tokens"], "embed_tokens"),
    ],
)  # fmt: skip
def test_what_vllm_cannot_take_is_refused_before_any_file(
    run: Path, tmp_path: Path, entry: str, value: Any, words: str
) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    path = source / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    restate(source / "adapter")
    with pytest.raises(ModelError, match=words):
        export(source, "bundle", targets=["vllm"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("to", "storage", "targets"),
    [("onnx", [], []), ("merged", ["q8_0"], []), ("merged", ["f16", "bf16"], []), ("gguf", ["q5_k"], []),
     ("gguf", ["f32"], []), ("gguf", [], ["vllm"]), ("bundle", [], ["tgi"])],
)  # fmt: skip
def test_an_unknown_choice_is_refused(run: Path, to: str, storage: list[str], targets: list[str]) -> None:
    with pytest.raises(RecipeError):
        export(run, to, storage=storage, targets=targets)


def test_a_folder_of_others_is_not_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="is no export"):
        export(run, "adapter", out=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "dataset/records.parquet"])
def test_a_file_that_was_altered_since_is_not_exported(run: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "run"
    shutil.copytree(run, source)
    data = bytearray((source / name).read_bytes())
    data[-8] ^= 1
    (source / name).write_bytes(bytes(data))
    with pytest.raises(RunError, match="altered"):
        export(source, "adapter", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapter", [{"bias": "all"}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}])
def test_an_adapter_of_another_make_is_exported_as_it_is(adapter: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_run(tmp_path, "qwen2", **adapter)
    for to in ("adapter", "merged") if "bias" in adapter else ("adapter", "merged", "gguf"):
        assert all(entry["passed"] for entry in parity(export(source, to)).values())
