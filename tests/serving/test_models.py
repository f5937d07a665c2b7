"""Tries to serve what was not measured: another base, another template, a changed file, a name taken twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from metier.artifacts import digest_file
from metier.errors import ModelError, RunError
from metier.model.bank import AdapterBank
from metier.serving.export import export
from metier.serving.models import Models, open_models
from metier.serving.server import check_exposure, read_api_keys
from tests.model.tiny import save_tiny
from tests.serving.conftest import load_tiny


def opened(*runs: str) -> Models:
    return open_models(runs, device="cpu", precision="fp32")


@pytest.fixture
def adapter(adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters["red"], tmp_path / "mine"))


def test_names_come_from_the_folders_or_from_the_user(tiny_base: Path, adapter: Path) -> None:
    assert list(opened(f"small={tiny_base}", str(adapter), f"other={adapter}").by_name) == ["small", "mine", "other"]


def test_a_fingerprint_changes_with_the_weights_alone(adapter: Path, adapters: dict[str, Path]) -> None:
    models = opened(f"a={adapter}", f"b={adapters['red']}", f"c={adapters['blue']}").by_name
    assert models["a"].fingerprint == models["b"].fingerprint != models["c"].fingerprint != models["base"].fingerprint


def test_a_name_twice_and_a_second_base_are_refused(tiny_base: Path, adapter: Path) -> None:
    with pytest.raises(ModelError, match="two models would be called `mine`"):
        opened(str(adapter), str(adapter))
    with pytest.raises(ModelError, match="one base"):
        opened(str(adapter), str(tiny_base))


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    files = {"adapter_config.json": {"sha256": digest_file(adapter / "adapter_config.json")}}
    manifest = {"key": "k", "digest": "d", "files": files, "base": {"name": str(tmp_path / "b"), "digest": "0"}}
    save_tiny("smollm2", tmp_path / "b", seed=4)
    (adapter / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ModelError, match="another base"):
        opened(str(adapter))


def test_a_changed_adapter_or_template_is_refused(adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(ModelError, match="another chat template"):
        opened(str(adapter))
    files = {"adapter_model.safetensors": {"sha256": "0" * 64}}
    (adapter / "manifest.json").write_text(json.dumps({"key": "k", "digest": "d", "files": files}), encoding="utf-8")
    with pytest.raises(ModelError, match="digest differs"):
        opened(str(adapter))


def test_weights_that_are_no_numbers_are_refused(tiny_base: Path, adapter: Path) -> None:
    import safetensors.torch

    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ModelError, match="not finite"):
        AdapterBank(load_tiny(tiny_base)).add("x", adapter)


def test_only_loopback_needs_no_key_and_a_short_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(host, ())
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        with pytest.raises(RunError, match="no API key"):
            check_exposure(host, ())
        check_exposure(host, ("k" * 16,))
    with pytest.raises(RunError, match="shorter"):
        check_exposure("127.0.0.1", ("short",))
    monkeypatch.setenv("METIER_API_KEY", "a" * 16 + "," + "b" * 16)
    assert read_api_keys(None) == ("a" * 16, "b" * 16)
    (tmp_path / "keys").write_text("\n", encoding="utf-8")
    with pytest.raises(RunError, match="holds no API key"):
        read_api_keys(tmp_path / "keys")


def test_an_adapter_that_learned_from_a_forgotten_person_is_not_served(tiny_base: Path, adapter: Path) -> None:
    adapter = adapter.rename(adapter.parent / "adapter")
    (adapter / "revoked.json").write_text("[]")
    with pytest.raises(RunError, match="forgotten since"):
        opened(str(adapter))
    with pytest.raises(RunError, match="forgotten since"):
        export(adapter.parent)
