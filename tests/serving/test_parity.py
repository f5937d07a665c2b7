"""Tries to get a faulty export past the gate: each fault is one that was met in the field, put into honest files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from metier.errors import ModelError
from metier.model.specialist import Specialist
from metier.serving import gguf_weights, parity
from metier.serving.export import export, open_reference, read_back
from metier.serving.merge import merged_weights
from metier.serving.targets import Form
from tests.model.tiny import LLAMA3_TEMPLATE
from tests.serving.tiny_run import tiny_run

FORMS = {
    "adapter": Form("adapter", "adapter", "f32", "adapter"),
    "merged": Form("merged", "merged", "f16", "merged"),
    "adapter.gguf": Form("gguf-adapter", "gguf-adapter", "f32", "adapter.gguf"),
    "model-f16.gguf": Form("gguf-f16", "gguf", "f16", "model-f16.gguf"),
}
Fault = Callable[[Path, Specialist], None]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Specialist, parity.Measured]:
    """Honest files of a tiny run, the adapter as measured, and what it and its base said."""
    root = tmp_path_factory.mktemp("parity")
    run = tiny_run(root)
    for to in ("adapter", "merged"):
        export(run, to, out=root / to)
    folder = export(run, "gguf", storage=["f16"], out=root / "gguf")
    for name in ("adapter.gguf", "model-f16.gguf"):
        shutil.copy(folder / name, root / name)
    reference = open_reference(run)
    probes = parity.choose_probes(run / "dataset", reference.renderer, reference.context)
    return root, reference, parity.measure_reference(reference, probes)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def zero(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: [t.zero_() for name, t in tensors.items() if part in name] and None


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    name = first(tensors, "lora_A")
    del tensors[name], tensors[name.replace("lora_A", "lora_B")]


def drop_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first(tensors, "lora_A")]


def widen_template(folder: Path, reference: Specialist) -> None:
    (folder / "chat_template.jinja").write_text(reference.renderer.template.replace("\n", " \n"), encoding="utf-8")


def swap_ids(folder: Path) -> None:
    """Two ordinary tokens exchange their ids."""
    path = folder / "tokenizer.json"
    pipeline = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = pipeline["model"]["vocab"]
    a, b = "n", "o"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(pipeline), encoding="utf-8")


def base_weights(reference: Specialist) -> dict[str, torch.Tensor]:
    return {w.name: w.value - (0 if w.update is None else w.update) for w in merged_weights(reference)}


def serve_base(folder: Path, reference: Specialist) -> None:
    base = base_weights(reference)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({n: base[n].half() for n in tensors}))


def lose_one_update(folder: Path, reference: Specialist) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    base = base_weights(reference)[name].half()
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({name: base}))


def scale_updates(folder: Path, reference: Specialist) -> None:
    scaled = {w.name: w.value if w.update is None else w.value + 0.1 * w.update for w in merged_weights(reference)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update({n: scaled[n].half() for n in tensors}))


def write_gguf(path: Path, reference: Specialist, change: Callable[[Any], None]) -> None:
    path.unlink()
    weights = list(merged_weights(reference))
    change(weights)
    gguf_weights.write_model(path, weights, reference, form="f16", name="x")


def unpermuted(path: Path, reference: Specialist) -> None:
    kept = gguf_weights.to_llama_cpp
    gguf_weights.to_llama_cpp = lambda name, array, config: array
    try:
        write_gguf(path, reference, lambda weights: None)
    finally:
        gguf_weights.to_llama_cpp = kept


def unpermuted_adapter(path: Path, reference: Specialist) -> None:
    kept = gguf_weights.to_llama_cpp
    gguf_weights.to_llama_cpp = lambda name, array, config: array
    path.unlink()
    try:
        assert reference.adapter is not None
        gguf_weights.write_adapter(path, reference.adapter, reference.base.config, name="x")
    finally:
        gguf_weights.to_llama_cpp = kept


def doubled_gguf_alpha(path: Path, reference: Specialist) -> None:
    adapter = copy.copy(reference.adapter)
    assert adapter is not None
    adapter.config = adapter.config.model_copy(update={"alpha": adapter.config.alpha * 2})
    path.unlink()
    gguf_weights.write_adapter(path, adapter, reference.base.config, name="x")


def other_gguf_template(path: Path, reference: Specialist) -> None:
    other = copy.copy(reference)
    other.renderer = copy.copy(reference.renderer)
    other.renderer.template = LLAMA3_TEMPLATE.replace("<|eot_id|>", "<|im_end|>")
    path.unlink()
    gguf_weights.write_model(path, merged_weights(reference), other, form="f16", name="x")


FAULTS: dict[str, tuple[str, Fault]] = {
    "wrong template": ("adapter", lambda f, r: (f / "chat_template.jinja").write_text(LLAMA3_TEMPLATE) and None),
    "a space more in the template": ("merged", widen_template),
    "swapped tokenizer": ("adapter", lambda f, r: swap_ids(f)),
    "swapped tokenizer in merged": ("merged", lambda f, r: swap_ids(f)),
    "lost adapter": ("adapter", lambda f, r: edit_tensors(f / "adapter_model.safetensors", zero("lora_B"))),
    "doubled alpha": ("adapter", lambda f, r: edit_json(f / "adapter_config.json", lora_alpha=16)),
    "alpha a tenth more": ("adapter", lambda f, r: edit_json(f / "adapter_config.json", lora_alpha=8.8)),
    "rsLoRA switched on": ("adapter", lambda f, r: edit_json(f / "adapter_config.json", use_rslora=True)),
    "dropped layer": ("adapter", lambda f, r: edit_tensors(f / "adapter_model.safetensors", drop_layer)),
    "dropped tensor": ("adapter", lambda f, r: edit_tensors(f / "adapter_model.safetensors", drop_tensor)),
    "base in place of the adapter": ("merged", serve_base),
    "one update lost": ("merged", lose_one_update),
    "updates a tenth larger": ("merged", scale_updates),
    "another rotary base": ("merged", lambda f, r: edit_json(
        f / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})),
    "rows not permuted": ("model-f16.gguf", unpermuted),
    "one tensor lost from GGUF": ("model-f16.gguf", lambda f, r: write_gguf(f, r, lambda w: w.pop(5) and None)),
    "template lost from GGUF": ("model-f16.gguf", other_gguf_template),
    "rows of the GGUF adapter not permuted": ("adapter.gguf", unpermuted_adapter),
    "doubled alpha in GGUF": ("adapter.gguf", doubled_gguf_alpha),
}  # fmt: skip


def check(path: Path, exported: tuple[Path, Specialist, parity.Measured], scratch: Path) -> dict[str, Any]:
    """The gate's word on the files at `path`; those that cannot be read have failed."""
    _, reference, measured = exported
    form = FORMS[path.name]
    try:
        return parity.measure(read_back(path, form, reference, scratch), reference, measured, form=form.storage)
    except ModelError as error:
        return {"passed": False, "failures": [error.message]}


@pytest.mark.parametrize("name", FORMS)
def test_honest_files_pass(name: str, exported: tuple[Path, Specialist, parity.Measured], tmp_path: Path) -> None:
    entry = check(exported[0] / name, exported, tmp_path / "scratch")
    assert entry["passed"], entry["failures"]
    assert entry["num_prompts"] >= 64 and entry["num_tokens"] >= 2_000 and entry["greedy_equal"] == 20


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(
    fault: str, exported: tuple[Path, Specialist, parity.Measured], tmp_path: Path
) -> None:
    name, spoil = FAULTS[fault]
    path = tmp_path / name
    (shutil.copytree if (exported[0] / name).is_dir() else shutil.copy)(exported[0] / name, path)
    spoil(path, exported[1])
    entry = check(path, exported, tmp_path / "scratch")
    assert not entry["passed"] and entry["failures"], fault


def test_a_bf16_merge_of_a_small_update_is_caught(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, shrink=0.01)
    with pytest.raises(ModelError, match="not the model that was measured"):
        export(run, "merged", storage=["bf16"])


def test_every_limit_is_held() -> None:
    honest: dict[str, Any] = {
        "storage": "f16", "kl_reference_base": 1.0, "kl_ratio": 0.001, "kl_ratio_answers": 0.001, "gain_kept": 0.99,
        "difference_from_base": 1.0, "rendering": {"conversations": 20, "identical": 20},
        "coverage": {"lora_layers": 2, "consumed": 2, "worst_layer": "a"}, "zeroed_adapter_difference": 0.0,
        "weights_rest": {"tensor": "a", "largest": 1e-4},
    }  # fmt: skip
    assert parity.failures(honest) == []
    spoiled: list[dict[str, Any]] = [
        {"kl_ratio": 0.011}, {"kl_ratio_answers": 0.011}, {"gain_kept": 0.949}, {"difference_from_base": 0.4},
        {"rendering": {"conversations": 20, "identical": 19}}, {"zeroed_adapter_difference": 1e-3},
        {"coverage": {"lora_layers": 2, "consumed": 1, "worst_layer": "a"}}, {"kl_ratio": None},
        {"weights_rest": {"tensor": "a", "largest": float("nan")}}, {"gain_kept": float("nan")},
        {"kl_reference_base": 0.0},
    ]  # fmt: skip
    for change in spoiled:
        assert len(parity.failures(honest | change)) == 1, change
    assert parity.failures(honest | {"storage": "q8_0", "kl_ratio": 0.09}) == []
