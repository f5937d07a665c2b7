"""Tries to load what is no model, half a model or somebody's code, and to make the same model come out differently."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from metier.errors import ModelError
from metier.model.device import resolve_device, resolve_precision
from metier.model.load import load_base, load_tokenizer
from metier.model.resolve import base_digest, resolve_base
from tests.model.hub import COMMIT, Hub, serve_hub
from tests.model.tiny import KINDS, Kind, save_tiny, tiny_model

CPU = torch.device("cpu")
MESSAGES = [{"role": "user", "content": "hi 中文"}, {"role": "assistant", "content": "yo"}]


def _load(path: Path | str, said: list[str] | None = None) -> Any:
    said = [] if said is None else said
    return load_base(path, dtype=torch.float32, device=CPU, progress=said.append)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to be damaged."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


# What comes out


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_logits(kind: Kind, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(kind)
    base = _load(save_tiny(kind, tmp_path / kind))
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert base.tokenizer.apply_chat_template(MESSAGES, tokenize=False) == text
    ids = torch.tensor([base.tokenizer(text, add_special_tokens=False).input_ids])
    assert ids.tolist() == [tokenizer(text, add_special_tokens=False).input_ids]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, model(ids).logits)


def test_a_base_is_frozen_and_says_where_it_came_from(tiny_base: Path) -> None:
    base = _load(tiny_base)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config._attn_implementation == "sdpa"
    assert base.model.config.use_cache is True
    assert (base.name, base.path, base.revision) == (str(tiny_base), tiny_base, None)
    assert (base.dtype, base.device, base.digest) == (torch.float32, CPU, base_digest(tiny_base))


def test_the_weights_take_the_dtype_asked_for(tiny_base: Path) -> None:
    base = load_base(tiny_base, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_sharded_weights_load(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama2")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = _load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_loading_is_silent_and_leaves_the_settings(tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = transformers.utils.logging
    before = settings.get_verbosity(), settings.is_progress_bar_enabled()
    _load(tiny_base)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled()) == before


def test_the_tokenizer_is_what_its_file_says(folder: Path) -> None:
    """A class named in tokenizer_config.json must not rebuild the pipeline of tokenizer.json."""
    exact = load_tokenizer(folder)("a  b 中").input_ids
    _edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert load_tokenizer(folder)("a  b 中").input_ids == exact


def test_the_real_model_knows_the_capital_of_france(smollm2: Path) -> None:
    base = _load("smollm2-135m")
    assert base.path == smollm2
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert base.tokenizer.decode(base.model(ids).logits[0, -1].argmax()) == " Paris"


# Digests


def test_the_digest_sees_a_changed_weight(folder: Path) -> None:
    before = base_digest(folder)
    assert base_digest(folder) == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert base_digest(folder) != before


def test_the_digest_sees_a_changed_template(folder: Path) -> None:
    before = base_digest(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert base_digest(folder) != before


def test_the_digest_does_not_see_notes(folder: Path) -> None:
    before = base_digest(folder)
    (folder / "README.md").write_text("a note", encoding="utf-8")
    assert base_digest(folder) == before


def test_a_large_file_that_changed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    big = folder / "big.safetensors"
    big.write_bytes(b"a" * 2_000_000)
    before = base_digest(folder)
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 1
    stamp = big.stat().st_mtime_ns
    big.write_bytes(b"b" * 2_000_000)
    os.utime(big, ns=(stamp + 1, stamp + 1))
    assert base_digest(folder) != before


# What is refused

BAD_NAMES = {
    "smollm2-135": ("did you mean `smollm2-135m`?", "a local folder, a GGUF file or a hub id"),
    "no/such/folder": ("there is no base model at `no/such/folder`",),
    "./nowhere": ("there is no base model at `./nowhere`",),
    "missing.gguf": ("there is no base model at `missing.gguf`",),
    "acme/never-fetched": ("HF_HUB_OFFLINE is set", "local folder"),
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_nowhere_is_a_sentence(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_base(name, progress=lambda line: None)
    assert all(part in str(caught.value) for part in BAD_NAMES[name])


@pytest.mark.parametrize("name", ["smollm2-135m", "here"])
def test_a_revision_belongs_to_the_hub(name: str, tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="has no revision `main`"):
        resolve_base(str(tiny_base) if name == "here" else name, "main")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match="is a file, and no GGUF file"):
        resolve_base(str(path))


def test_a_damaged_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 4)
    with pytest.raises(ModelError, match="is damaged"):
        resolve_base(str(path), progress=lambda line: None)
    assert not (tmp_path / "cache").exists()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _weightless(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _configless(folder: Path) -> None:
    (folder / "config.json").unlink()


def _an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def _garbled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 5000)


def _half_sharded(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",', encoding="utf-8")


def _remote_code(folder: Path) -> None:
    _edit(folder / "config.json", model_type="acme", auto_map={"AutoModelForCausalLM": "modeling_acme.Acme"})
    (folder / "modeling_acme.py").write_text("raise SystemExit('the checkpoint was run')", encoding="utf-8")


def _unknown_architecture(folder: Path) -> None:
    _edit(folder / "config.json", model_type="acme")


def _classifier(folder: Path) -> None:
    _edit(folder / "config.json", architectures=["LlamaForSequenceClassification"])


def _encoder(folder: Path) -> None:
    _edit(folder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])


def _quantised(folder: Path) -> None:
    _edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}', encoding="utf-8")


def _missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder: Path) -> None:
    _edit(folder / "config.json", intermediate_size=256)


def _more_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)


DAMAGE = {
    _pickled: "pickled weights only; metier loads safetensors only",
    _weightless: r"no \*.safetensors weights",
    _configless: "has no config.json",
    _an_adapter: "holds an adapter",
    _truncated: "model.safetensors` is damaged",
    _garbled: "model.safetensors` is damaged",
    _half_sharded: "lacks 1 of its 2 weight files, model-00002-of-00002.safetensors first",
    _broken_config: "config.json` is not valid JSON",
    _remote_code: "needs Python code from the checkpoint",
    _unknown_architecture: "architecture `acme`",
    _classifier: "is a LlamaForSequenceClassification, not a model that writes text",
    _encoder: "is a BertForMaskedLM, not a model that writes text",
    _quantised: r"is quantised \(`gptq`\)",
    _without_tokenizer: "has weights but no tokenizer",
    _broken_tokenizer: "the tokenizer in .* cannot be read",
    _missing_tensor: "1 of the model's weights .* model.layers.1.mlp.up_proj.weight first",
    _other_shape: "of the model's weights are not in .* or of another shape",
    _more_tokens: "ids up to 385, and the model has embeddings for 384 tokens only",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__.strip("_"))
def test_a_folder_that_is_no_whole_model_is_refused(damage: Any, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=DAMAGE[damage]):
        _load(folder)


def test_code_of_the_checkpoint_is_not_run_when_transformers_has_the_class(folder: Path) -> None:
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_acme.Acme"})
    (folder / "modeling_acme.py").write_text("raise SystemExit('the checkpoint was run')", encoding="utf-8")
    said: list[str] = []
    assert type(_load(folder, said).model).__name__ == "LlamaForCausalLM"
    assert any("is not run" in line for line in said)


# The hub, with its real client and a server on this machine


@pytest.fixture(scope="module")
def hub(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = Path(shutil.copytree(tiny_base, tmp_path_factory.mktemp("hub") / "open"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with serve_hub(folder) as server:
        yield server


def _resolve(name: str, revision: str | None, home: Path, **environment: str) -> str:
    """What `resolve_base` gives or says in a new process: the client reads its settings when imported."""
    code = (
        "import sys\nfrom metier.errors import ModelError\nfrom metier.model.resolve import resolve_base\n"
        "try:\n    print(resolve_base(sys.argv[1], sys.argv[2] or None, progress=lambda line: None))\n"
        "except ModelError as error:\n    print(error)"
    )
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    command = [sys.executable, "-c", code, name, revision or ""]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return done.stdout


HUB_ERRORS = {
    ("acme/gated", None): ("is gated", "accept it at", "hf auth login"),
    ("acme/missing", None): ("neither a folder here nor a model on the hub", "check the spelling"),
    ("acme/private", None): ("that this account can see", "HF_TOKEN"),
    ("acme/open", "v9"): ("`acme/open` has no revision `v9`",),
    ("acme/broken", None): ("the hub does not answer",),
}


@pytest.mark.parametrize(("name", "revision"), HUB_ERRORS)
def test_a_refusal_of_the_hub_is_a_sentence(name: str, revision: str | None, hub: Hub, tmp_path: Path) -> None:
    said = _resolve(name, revision, tmp_path, HF_ENDPOINT=hub.url)
    assert all(part in said for part in HUB_ERRORS[name, revision])


def test_a_hub_model_is_fetched_once_without_pickles(hub: Hub, tmp_path: Path) -> None:
    hub.fetched.clear()
    path = Path(_resolve("acme/open", None, tmp_path, HF_ENDPOINT=hub.url).strip())
    assert path.name == COMMIT
    assert "pytorch_model.bin" not in hub.fetched
    assert _load(path).revision == COMMIT
    count = len(hub.fetched)
    assert count > 0
    assert _resolve("acme/open", COMMIT, tmp_path, HF_HUB_OFFLINE="1").strip() == str(path)
    # The hub is gone, the model is still here.
    assert _resolve("acme/open", None, tmp_path, HF_ENDPOINT="http://127.0.0.1:9").strip() == str(path)
    assert len(hub.fetched) == count


def test_a_hub_that_cannot_be_reached_is_a_sentence(tmp_path: Path) -> None:
    said = _resolve("acme/open", None, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub does not answer" in said
    assert "hint: " in said


# Device and precision


def test_auto_takes_what_the_machine_has() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ModelError, match="`device: cuda` was asked for"):
        resolve_device("cuda")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ModelError, match="needs a GPU"):
        resolve_precision("fp16", CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is the independent witness")
def test_a_cpu_gets_bf16_only_with_units_for_it() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    has_units = bool(flags & {"avx512_bf16", "amx_bf16"}) and hasattr(torch.cpu, "get_capabilities")
    said: list[str] = []
    assert resolve_precision("auto", CPU) == (torch.bfloat16 if has_units else torch.float32)
    assert resolve_precision("bf16", CPU, progress=said.append) == torch.bfloat16
    assert bool(said) != has_units


@pytest.mark.gpu
def test_a_gpu_gets_bf16_from_compute_capability_8() -> None:
    device = resolve_device("cuda")
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    assert resolve_precision("auto", device) == (torch.bfloat16 if modern else torch.float16)


@pytest.mark.gpu
def test_a_model_goes_straight_to_the_gpu(tiny_base: Path) -> None:
    base = load_base(tiny_base, dtype=torch.bfloat16, device=resolve_device("cuda"))
    assert {parameter.device.type for parameter in base.model.parameters()} == {"cuda"}
