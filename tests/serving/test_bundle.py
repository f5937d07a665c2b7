"""Tries to give out a bundle whose files do not parse, ask another prompt, or open a door."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from metier.errors import ModelError, RunError
from metier.model.chat import Renderer
from metier.serving.export import export
from metier.serving.ollama import ollama_template
from metier.serving.targets import choose_forms, vllm_rank, why_not
from tests.model.tiny import TEMPLATES, Format, tiny_tokenizer
from tests.serving.tiny_run import tiny_run

ENTRIES = {"r": 16, "bias": "none", "target_modules": ["q_proj"]}
LLAMA = {"model_type": "llama"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("bundle"), rank=24)


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return export(run)


def test_a_bundle_holds_what_its_manifest_says(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    assert manifest["parity"] == dict.fromkeys(("adapter", "merged", "gguf-adapter", "gguf-q8_0"), True)
    assert (
        "Export parity" in (bundle / "MODEL_CARD.md").read_text()
        and "导出一致性" in (bundle / "MODEL_CARD.md").read_text()
    )


def test_smoke_finds_an_altered_file(bundle: Path) -> None:
    smoke = [sys.executable, "-I", bundle / "smoke.py"]
    assert subprocess.run(smoke, capture_output=True).returncode == 0
    path = bundle / "serve" / "vllm.sh"
    text = path.read_text()
    path.write_text(text + "#")
    done = subprocess.run(smoke, capture_output=True, text=True)
    path.write_text(text)
    assert done.returncode == 1 and "serve/vllm.sh" in done.stdout


@pytest.mark.parametrize("name", ["vllm.sh", "llama-server.sh", "mlx.sh"])
def test_a_script_parses_and_listens_on_loopback(bundle: Path, name: str) -> None:
    path = bundle / "serve" / name
    assert subprocess.run(["sh", "-n", path], capture_output=True).returncode == 0
    assert "--host 127.0.0.1" in path.read_text() and path.stat().st_mode & 0o100


def test_vllm_gets_the_rank_the_template_and_a_key(bundle: Path) -> None:
    text = (bundle / "serve" / "vllm.sh").read_text()
    for words in ("0.32.0", "--max-lora-rank 32", "--chat-template adapter/chat_template.jinja", "${VLLM_API_KEY:?"):
        assert words in text
    assert "unset VLLM_ALLOW_RUNTIME_LORA_UPDATING" in text
    proxy = (bundle / "serve" / "proxy.conf").read_text()
    assert "location / { return 404; }" in proxy and "/load_lora" not in proxy


def test_the_yaml_files_name_what_the_engines_need(bundle: Path) -> None:
    kserve = yaml.safe_load((bundle / "serve" / "kserve.yaml").read_text())
    assert kserve["spec"]["model"]["lora"]["maxRank"] == 32
    [ray] = yaml.safe_load((bundle / "serve" / "ray_serve.yaml").read_text())["applications"]
    [config] = ray["args"]["llm_configs"]
    assert Path(config["model_loading_config"]["model_source"]) == bundle / "merged"


def test_only_the_forms_of_the_named_engines_are_made(run: Path, tmp_path: Path) -> None:
    folder = export(run, targets=["vllm"], out=tmp_path / "b")
    assert not (folder / "gguf").exists() and not (folder / "merged").exists()
    assert sorted(p.name for p in (folder / "serve").iterdir()) == ["README.md", "proxy.conf", "vllm.sh"]


def test_a_bundle_without_a_card_is_refused(run: Path, tmp_path: Path) -> None:
    card = run / "MODEL_CARD.md"
    text = card.read_text()
    card.unlink()
    try:
        with pytest.raises(RunError, match="carries one"):
            export(run, out=tmp_path / "b")
    finally:
        card.write_text(text)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_modelfile_asks_the_same_prompt(kind: Format) -> None:
    template = ollama_template(Renderer(tiny_tokenizer(kind)))
    assert template is not None and "{{ .Content }}" in template


def test_smollm2s_own_template_with_its_default_system_line(smollm2: Path) -> None:
    from metier.model.load import load_tokenizer

    template = ollama_template(Renderer(load_tokenizer(smollm2)))
    assert template is not None
    assert "{{ else }}<|im_start|>system\nYou are a helpful AI assistant named SmolLM" in template


def test_a_template_that_go_cannot_write_is_left_out() -> None:
    tokenizer = tiny_tokenizer("chatml")
    # It says how many messages there are: no piece around a message can.
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATES["chatml"]
    assert ollama_template(Renderer(tokenizer)) is None


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (4, 8), (16, 16), (24, 32), (257, 320), (512, 512)])
def test_the_next_allowed_rank(rank: int, allowed: int) -> None:
    assert vllm_rank(rank) == allowed


@pytest.mark.parametrize(
    ("target", "entries", "config"),
    [
        ("vllm", {"r": 513}, {}), ("kserve", {"bias": "all"}, {}), ("ray", {"use_dora": True}, {}),
        ("mlx", {"modules_to_save": ["x"]}, {}), ("llama.cpp", {}, {"model_type": "gpt_neox"}),
        ("ollama", {"bias": "lora_only"}, {}),
        ("llama.cpp", {"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}),
        ("ray", {}, {"quantization_config": {"bits": 4}}), ("vllm", {"trainable_token_indices": [5]}, {}),
    ],
)  # fmt: skip
def test_an_engine_refuses_what_it_would_serve_wrongly(
    target: str, entries: dict[str, Any], config: dict[str, Any]
) -> None:
    assert why_not(target, ENTRIES, LLAMA) is None
    assert why_not(target, ENTRIES | entries, LLAMA | config)
    with pytest.raises(ModelError, match=target):
        choose_forms("bundle", [], [target], entries=ENTRIES | entries, config=LLAMA | config)


def test_engines_that_cannot_are_left_out_of_a_bundle_for_all() -> None:
    forms, served = choose_forms("bundle", [], [], entries=ENTRIES, config={"model_type": "gpt_neox"})
    assert served == ["vllm", "kserve", "ray", "mlx"] and [f.kind for f in forms] == ["adapter", "merged"]
