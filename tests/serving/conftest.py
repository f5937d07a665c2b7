"""A tiny base with two random adapters, and a live server over them that all tests of this folder share."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metier.domains import load_domain
from metier.model.load import Base, load_base
from metier.model.lora import attach, save_adapter
from metier.model.template import TemplateProcess
from metier.recipe import AdapterConfig
from metier.serving.guard import Guard
from metier.serving.models import Models, open_models
from metier.serving.server import Server, ServerSettings

CPU = torch.device("cpu")
PACK = """
name: medicine
privacy_policy: none
notices: {en: "No medical advice.", zh: "不构成医疗建议。"}
red_lines: {en: ["\\\\bpoison\\\\b"], zh: ["下毒"]}
refusals: {en: "I cannot help with this.", zh: "我不能协助处理。"}
"""


def load_tiny(path: Path) -> Base:
    return load_base(path, dtype=torch.float32, device=CPU, progress=lambda text: None)


def save_random_adapter(base_path: Path, folder: Path, seed: int, targets: str | list[str] = "all-linear") -> Path:
    """An adapter whose update is large enough to change the answers."""
    base = load_tiny(base_path)
    adapter = attach(base.model, AdapterConfig(rank=4, alpha=8, target_modules=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.1)
    folder.mkdir(parents=True)
    save_adapter(folder, adapter, adapter.tensors(), base=str(base_path), revision=None)
    return folder


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with different ranks' worth of layers: one on all linear layers, one on two of them."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "red": save_random_adapter(tiny_base, folder / "red", 1),
        "blue": save_random_adapter(tiny_base, folder / "blue", 2, ["q_proj", "v_proj"]),
    }


@pytest.fixture(scope="session")
def models(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """The base, `red` without and `blue` with a guard: a domain's pack, and `7` counted as personal data."""
    pack = tmp_path_factory.mktemp("domains")
    (pack / "medicine.yaml").write_text(PACK, encoding="utf-8")
    templates = TemplateProcess()
    loaded = open_models(
        [f"{name}={path}" for name, path in adapters.items()], device="cpu", precision="fp32", render=templates.render
    )

    def redact(text: str) -> tuple[str, list[str]]:
        return text.replace("7", "[DIGIT]"), ["DIGIT"] * text.count("7")

    guarded = dict(loaded.by_name)
    old = guarded["blue"]
    guard = Guard(domain=load_domain(str(pack / "medicine.yaml")), redact=redact)
    guarded["blue"] = type(old)(old.name, old.adapter, old.root, old.parent, old.fingerprint, guard)
    yield Models(loaded.bank, loaded.renderer, guarded)
    templates.close()


@pytest.fixture(scope="session")
def server(models: Models) -> Iterator[Server]:
    running = Server(models, ServerSettings(port=0, max_batch=8, max_waiting=32, max_new_tokens=64)).start()
    yield running
    running.stop()
    running.wait()


class Client:
    """Raw HTTP: what goes over the wire is what the test says."""

    def __init__(self, url: str) -> None:
        self.host = url.removeprefix("http://")

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(method, path, data, {**sent, **(headers or {})})
        response = connection.getresponse()
        found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return found

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, _, data = self.call("POST", path, body)
        return status, json.loads(data)

    def chat(self, content: str = "Hello", **body: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", **{"model": "red", "messages": messages, "max_tokens": 8, **body})

    def stream(self, path: str, **body: Any) -> list[Any]:
        """The stream's events, `[DONE]` as a string."""
        status, headers, data = self.call("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        events = [part.removeprefix("data: ") for part in data.decode().split("\n\n") if part]
        return [event if event == "[DONE]" else json.loads(event) for event in events]


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return Client(server.url)
