"""Tries to run code, hang, fill memory or get a traceback by what metier loads: runs, adapters, bases, GGUF files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from metier import artifacts, cli
from metier.model import template_check
from metier.serving.export import export
from tests.model.tiny_gguf import save_tiny_gguf
from tests.serving.tiny_run import restate, tiny_run

HUGE = 10**9
Spoil = Callable[[Path], Any]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, its run, and the base as a GGUF file: copied, never changed."""
    root = tmp_path_factory.mktemp("hostile")
    tiny_run(root)
    save_tiny_gguf(root / "model.gguf")
    return root


@pytest.fixture
def here(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the base and its run, in the current folder; the cache is empty."""
    for name in ("base", "run"):
        shutil.copytree(honest / name, tmp_path / name)
    shutil.copy(honest / "model.gguf", tmp_path / "model.gguf")
    adapter = tmp_path / "run" / "adapter"
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    restate(adapter, base={"name": str(tmp_path / "base")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[0]
    safetensors.torch.save_file(tensors | {name: change(tensors[name]).contiguous()}, path, metadata={"format": "pt"})


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def header(path: Path, text: str, length: int | None = None) -> None:
    data = text.encode()
    path.write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + b"\0" * 64)


def overlapping(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header(path, json.dumps({"a": entry, "b": entry}))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def archive(path: Path) -> None:
    """A zip whose member climbs out of the folder."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../executed", "x")


def tarball(path: Path) -> None:
    info = tarfile.TarInfo("../executed")
    with tarfile.open(path, "w") as file:
        file.addfile(info, io.BytesIO())


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin")


def sharded(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NESTED = "[" * 200_000
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
CYCLER = "{{ cycler.__init__.__globals__.os.system('touch executed') }}"
LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
GROWTH = "{% set n = namespace(t='aaaa') %}{% for a in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}"
DEEP = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"

BASES: dict[str, Spoil] = {
    "pickle alone": only_pickle,
    "pickle named safetensors": lambda f: pickled(f / "model.safetensors"),
    "pickle as config": lambda f: pickled(f / "config.json"),
    "pickle as tokenizer": lambda f: pickled(f / "tokenizer.json"),
    "zip named safetensors": lambda f: archive(f / "model.safetensors"),
    "header of an exabyte": lambda f: header(f / "model.safetensors", "{}", 2**60),
    "header longer than the file": lambda f: header(f / "model.safetensors", "{}", 2**26),
    "header nested without end": lambda f: header(f / "model.safetensors", NESTED),
    "overlapping tensors": lambda f: overlapping(f / "model.safetensors"),
    "tensors of the wrong shape": lambda f: edit_tensors(f / "model.safetensors", lambda t: t[:1].clone()),
    "integer weights": lambda f: edit_tensors(f / "model.safetensors", lambda t: t.to(torch.int8)),
    "8-bit float weights": lambda f: edit_tensors(f / "model.safetensors", lambda t: t.to(torch.float8_e4m3fn)),
    "NaN weights": lambda f: edit_tensors(f / "model.safetensors", lambda t: t * float("nan")),
    "infinite weights": lambda f: edit_tensors(f / "model.safetensors", lambda t: t + float("inf")),
    "weights that are a pipe": lambda f: pipe(f / "model.safetensors"),
    "weights that are a device": lambda f: link(f / "model.safetensors", "/dev/zero"),
    "weights linked to another file": lambda f: link(f / "model.safetensors", "/etc/passwd"),
    "index that climbs out": lambda f: sharded(f, {"a": "../../../../etc/passwd"}),
    "index that is no index": lambda f: sharded(f, ["a"]),
    "code of its own": lambda f: edit(f / "config.json", model_type="evil", auto_map={"AutoModel": "evil.Model"}),
    "line break in the model type": lambda f: edit(f / "config.json", model_type="llama\nimport os; os.system('x')"),
    "model type with a path": lambda f: edit(f / "config.json", model_type="../../evil"),
    "a billion layers": lambda f: edit(f / "config.json", num_hidden_layers=HUGE),
    "a billion columns": lambda f: edit(f / "config.json", hidden_size=HUGE),
    "a billion tokens": lambda f: edit(f / "config.json", vocab_size=HUGE),
    "negative layers": lambda f: edit(f / "config.json", num_hidden_layers=-1),
    "layers in words": lambda f: edit(f / "config.json", num_hidden_layers="2; import os"),
    "config nested without end": lambda f: (f / "config.json").write_text(NESTED),
    "config with a number of 5,000 digits": lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5_000 + "}"),
    "config that is a list": lambda f: (f / "config.json").write_text("[1]"),
    "stop tokens that are no ids": lambda f: edit(f / "generation_config.json", eos_token_id={"a": 1}),
    "template that climbs the classes": lambda f: template(f, ESCAPE),
    "template that calls the shell": lambda f: template(f, CYCLER),
    "template without an end": lambda f: template(f, LOOPS),
    "template that grows": lambda f: template(f, GROWTH),
    "template that calls itself": lambda f: template(f, DEEP),
    "template that divides by zero": lambda f: template(f, "{{ 1 / 0 }}"),
    "template that includes a file": lambda f: template(f, "{% include '/etc/passwd' %}"),
}  # fmt: skip

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, Spoil] = {
    "pickle alone": lambda f: ((f / WEIGHTS).unlink(), pickled(f / "adapter_model.bin")),
    "pickle named safetensors": lambda f: pickled(f / WEIGHTS),
    "pickle as config": lambda f: pickled(f / CONFIG),
    "config nested without end": lambda f: (f / CONFIG).write_text(NESTED),
    "rank in words": lambda f: edit(f / CONFIG, r="__import__('os').system('touch executed')"),
    "rank of a billion": lambda f: edit(f / CONFIG, r=HUGE),
    "rank that is not the tensors'": lambda f: edit(f / CONFIG, r=4_096),
    "infinite alpha": lambda f: edit(f / CONFIG, lora_alpha=float("inf")),
    "alpha in a list": lambda f: edit(f / CONFIG, lora_alpha=[1]),
    "targets that are a number": lambda f: edit(f / CONFIG, target_modules=7),
    "another kind": lambda f: edit(f / CONFIG, peft_type="EVIL"),
    "base that climbs out": lambda f: edit(f / CONFIG, base_model_name_or_path="../../../../../../etc/passwd"),
    "base that is a command": lambda f: edit(f / CONFIG, base_model_name_or_path="$(touch executed)"),
    "base that is an address": lambda f: edit(f / CONFIG, base_model_name_or_path="http://127.0.0.1:9/x"),
    "base that is no text": lambda f: edit(f / CONFIG, base_model_name_or_path={"a": 1}),
    "revision that is no text": lambda f: edit(f / CONFIG, revision=["main"]),
    "integers": lambda f: edit_tensors(f / WEIGHTS, lambda t: t.to(torch.int32)),
    "NaN": lambda f: edit_tensors(f / WEIGHTS, lambda t: t * float("nan")),
    "another shape": lambda f: edit_tensors(f / WEIGHTS, lambda t: t[:, :1].clone()),
    "header of an exabyte": lambda f: header(f / WEIGHTS, "{}", 2**60),
    "a pipe": lambda f: pipe(f / WEIGHTS),
    "a device": lambda f: link(f / WEIGHTS, "/dev/zero"),
}  # fmt: skip


def gguf(fields: bytes = b"", *, version: int = 3, tensors: int = 0, count: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + fields


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def patched(path: Path, key: str, value: int) -> None:
    """The honest file with another number under a key."""
    data = bytearray(path.read_bytes())
    at = data.index(text(key)) + len(text(key))
    struct.pack_into("<I", data, at + 4, value)
    path.write_bytes(bytes(data))


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
FILES: dict[str, Spoil] = {
    "pickle": pickled,
    "zip that climbs out": archive,
    "tar that climbs out": tarball,
    "magic alone": lambda f: f.write_bytes(b"GGUF"),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:3_000]),
    "cut in its weights": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "version 99": lambda f: f.write_bytes(gguf(version=99)),
    "big-endian": lambda f: f.write_bytes(gguf(version=0x03000000)),
    "2^60 fields": lambda f: f.write_bytes(gguf(count=2**60)),
    "2^60 tensors": lambda f: f.write_bytes(gguf(ARCHITECTURE, tensors=2**60)),
    "a text of an exabyte": lambda f: f.write_bytes(gguf(struct.pack("<Q", 2**60))),
    "an array of an exabyte": lambda f: f.write_bytes(gguf(text("a") + struct.pack("<IIQ", 9, 0, 2**60))),
    "arrays of arrays": lambda f: f.write_bytes(gguf(text("a") + struct.pack("<IIQ", 9, 9, 1) * 1_000)),
    "a field of an unknown type": lambda f: f.write_bytes(gguf(text("a") + struct.pack("<I", 99))),
    "no architecture": lambda f: f.write_bytes(gguf(text("a") + struct.pack("<II", 4, 1))),
    "a tensor of 2^62 numbers": lambda f: f.write_bytes(
        gguf(ARCHITECTURE + text("t") + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0), tensors=1)),
    "a billion layers": lambda f: patched(f, "llama.block_count", HUGE),
    "a billion columns": lambda f: patched(f, "llama.embedding_length", HUGE),
    "a billion heads": lambda f: patched(f, "llama.attention.head_count", HUGE),
}  # fmt: skip


def refused(*argv: str | Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`metier ARGV` ends with 2 and a sentence, and nothing that the files say was executed."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended, signals():
        patch.setattr(sys, "argv", ["metier", *map(str, argv)])
        patch.setenv("HF_HUB_OFFLINE", "1")
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2, said
    assert said.err.count("error: ") == 1 and "Traceback" not in said.err, said.err
    assert not list(Path.cwd().rglob("executed"))


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """The command line takes over two signals; the test run needs them back."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@pytest.mark.parametrize("name", BASES)
def test_a_hostile_base_is_a_sentence(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BASES[name](here / "base")
    refused("generate", "base", "--prompt", "x", "--max-new-tokens", "1", capsys=capsys)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_a_sentence(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "run" / "adapter"
    (folder / "manifest.json").unlink()
    ADAPTERS[name](folder)
    refused("generate", "run", "--prompt", "x", "--max-new-tokens", "1", capsys=capsys)


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_a_sentence(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FILES[name](here / "model.gguf")
    refused("generate", "model.gguf", "--prompt", "x", "--max-new-tokens", "1", capsys=capsys)


RUNS: dict[str, Spoil] = {
    "manifest nested without end": lambda f: (f / "adapter" / "manifest.json").write_text(NESTED),
    "manifest that is a pickle": lambda f: pickled(f / "adapter" / "manifest.json"),
    "files that are no entries": lambda f: edit(f / "adapter" / "manifest.json", files={"a": 1}),
    "files that climb out": lambda f: edit(f / "adapter" / "manifest.json", files={"../../x": {"bytes": 1}}),
    "base that climbs out": lambda f: edit(f / "adapter" / "manifest.json", base={"name": "../../etc/passwd"}),
    "records that are a pickle": lambda f: pickled(f / "dataset" / "records.parquet"),
    "records that are gone": lambda f: (f / "dataset" / "records.parquet").unlink(),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_hostile_run_is_not_exported(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RUNS[name](here / "run")
    refused("export", "run", "--to", "adapter", capsys=capsys)
    assert not (here / "run" / "export" / "adapter").exists()


def test_records_that_are_a_pickle_are_not_loaded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Even where the manifest vouches for them.
    pickled(here / "run" / "dataset" / "records.parquet")
    manifest = json.loads((here / "run" / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    restate(here / "run" / "dataset")
    assert manifest["digest"] == artifacts.read_manifest(here / "run" / "dataset")["digest"]  # type: ignore[index]
    refused("export", "run", "--to", "adapter", capsys=capsys)


def test_the_honest_files_are_taken(here: Path) -> None:
    # The control: the same commands on unspoiled files succeed, so it is the fault that was refused.
    for source in ("base", "run", "model.gguf"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended, signals():
            patch.setattr(sys, "argv", ["metier", "generate", source, "--prompt", "x", "--max-new-tokens", "1"])
            cli.main()
        assert not ended.value.code, source
    assert export(here / "run", "adapter").is_dir()


def test_a_template_that_marks_answers_is_taken() -> None:
    template_check.check_template("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}")


def test_there_are_forty() -> None:
    assert len(BASES) + len(ADAPTERS) + len(FILES) + len(RUNS) >= 40
