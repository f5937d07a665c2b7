"""What a server serves: one base and any number of adapters, each by a name, as it was measured.

In: runs, adapter folders or a base, as `metier serve` names them. Out: the models in memory with their fingerprints
and guards. An adapter of another base, of another precision or with another chat template is refused, since it
would answer otherwise than it was measured.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metier.artifacts import digest_file, digest_json, read_manifest, refuse_revoked
from metier.domains import load_domain
from metier.errors import ModelError
from metier.model.bank import AdapterBank
from metier.model.chat import CappedRender, Renderer, eos_token_ids
from metier.model.device import Device, Precision, resolve_device, resolve_precision
from metier.model.load import Base, load_base
from metier.model.lora import read_adapter_config
from metier.recipe import ServeConfig, load_recipe
from metier.serving.guard import Guard, RedactBy

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Model:
    """A model by name. `adapter` is its name in the bank, None for the base; `parent` the base's name."""

    name: str
    adapter: str | None
    root: str
    parent: str | None
    fingerprint: str
    guard: Guard


@dataclass(frozen=True)
class Models:
    """All that is served: the adapters in one bank over one base, and one renderer for all."""

    bank: AdapterBank
    renderer: Renderer
    by_name: dict[str, Model]

    @property
    def base(self) -> Model:
        return next(iter(self.by_name.values()))


@dataclass(frozen=True, slots=True)
class _Source:
    """What one argument names: an adapter's folder with its base's name and revision, or a base alone."""

    name: str
    base: str
    revision: str | None
    adapter: Path | None
    run: Path

    @property
    def root(self) -> str:
        """The folder's name alone: where it lies is nobody's business."""
        return _plain_name(str(self.run.absolute()))


def open_models(
    runs: Sequence[str],
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    render: CappedRender | None = None,
    redact_by: RedactBy | None = None,
    guarded: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Models:
    """Loads `runs`: each a run's folder, an adapter's folder or a base, or NAME=one of these.

    Raises `ModelError` when they do not fit together, and what loading a model raises.
    """
    sources = [_source(run) for run in runs]
    where = resolve_device(device)
    dtype = resolve_precision(_precision(sources, precision, where.type), where)
    first = sources[0]
    base = load_base(first.base, revision=first.revision, dtype=dtype, device=where, progress=say)
    renderer = Renderer(base.tokenizer, eos_token_ids(base.path), render=render)
    bank = AdapterBank(base)
    base_name = next((s.name for s in sources if s.adapter is None), _plain_name(base.name))
    guards = {s.name: _guard(s.run, redact_by) if guarded else Guard(ServeConfig(redact=False)) for s in sources}
    # The base is there to be compared, so what guards the first adapter of a domain guards it too.
    guard = next((g for g in guards.values() if g.domain), next(iter(guards.values())))
    models = {
        base_name: Model(
            base_name, None, _plain_name(base.name), None, _fingerprint(base, renderer, None, guard), guard
        )
    }
    for source in sources:
        if source.adapter is None:
            if source is not first or len([s for s in sources if s.adapter is None]) > 1:
                raise ModelError(f"`{source.run}` is a base model, and a server has one base", hint="name it first")
            continue
        if source.name in models:
            raise ModelError(f"two models would be called `{source.name}`", hint="name them: NAME=RUN")
        refuse_revoked(source.adapter)
        _check_fits(source, base, renderer)
        bank.add(source.name, source.adapter)
        own = guards[source.name]
        print_ = _fingerprint(base, renderer, source.adapter, own)
        models[source.name] = Model(source.name, source.name, source.root, base_name, print_, own)
    return Models(bank, renderer, models)


def _source(run: str) -> _Source:
    name, sign, path = run.partition("=")
    if not sign or not _NAME.fullmatch(name):
        name, path = "", run
    folder = Path(path)
    adapter = next((f for f in (folder / "adapter", folder) if (f / "adapter_config.json").is_file()), None)
    if adapter is None:
        if (folder / "recipe.yaml").exists():
            raise ModelError(f"the run in `{folder}` has no adapter yet", hint=f"metier run {folder / 'recipe.yaml'}")
        return _Source(name or _plain_name(path), path, None, None, folder)
    _, entries = read_adapter_config(adapter)
    base = (read_manifest(adapter) or {}).get("base", {}).get("name") or entries["base_model_name_or_path"]
    run_folder = adapter.parent if (adapter.parent / "recipe.yaml").exists() else adapter
    name = name or _plain_name(str((run_folder if run_folder != adapter else folder).absolute()))
    return _Source(name, base, entries.get("revision"), adapter, run_folder)


def _plain_name(path: str) -> str:
    """A model's name from a path or hub id: its last part, with dashes where a name may not have a character."""
    last = Path(path).name if Path(path).suffix != ".gguf" else Path(path).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:64] or "model"


def _precision(sources: Sequence[_Source], asked: Precision, device: str) -> Precision:
    """The precision that the adapters were trained and measured in, when it is one and was measured on this device."""
    if asked != "auto":
        return asked
    names: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    manifests = [read_manifest(s.adapter) or {} for s in sources if s.adapter]
    found = {m["precision"] for m in manifests if m.get("precision") in names and m.get("device") == device}
    if len(found) > 1:
        raise ModelError(
            f"the adapters were measured in {' and '.join(sorted(found))}, and one base has one precision",
            hint="serve them apart, or say which with --precision",
        )
    return names[found.pop()] if found else "auto"


def _check_fits(source: _Source, base: Base, renderer: Renderer) -> None:
    assert source.adapter is not None
    manifest = read_manifest(source.adapter) or {}
    for name in ADAPTER_FILES:
        measured = manifest.get("files", {}).get(name, {}).get("sha256")
        if measured is not None and digest_file(source.adapter / name) != measured:
            raise ModelError(
                f"`{source.adapter / name}` is not the file that was trained and measured: its digest differs",
                hint="restore it, or train again; to serve something else, give its folder without manifest.json",
            )
    stated = manifest.get("base", {}).get("digest")
    if stated is not None and stated != base.digest:
        raise ModelError(
            f"`{source.adapter}` was trained on another base than the one in `{base.path}`",
            hint="a server has one base; serve the adapters of another in a server of their own",
        )
    template = source.adapter / "chat_template.jinja"
    if template.is_file() and template.read_text(encoding="utf-8") != renderer.template:
        raise ModelError(
            f"`{source.adapter}` was trained with another chat template than that of `{base.path}`",
            hint="name the base that it was trained on, unchanged",
        )


def _guard(run: Path, redact_by: RedactBy | None) -> Guard:
    """As the run's recipe says; its data's privacy policy, or else its domain's, says what is personal data."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return Guard()
    recipe = load_recipe(path)
    domain = load_domain(recipe.domain) if recipe.domain else None
    policy = recipe.privacy.policy
    if policy == "auto":
        policy = domain.privacy_policy if domain else "none"
    return Guard(recipe.serve, domain, redact_by(policy) if redact_by and policy != "none" else None)


def _fingerprint(base: Base, renderer: Renderer, adapter: Path | None, guard: Guard) -> str:
    """Changes with whatever could change an answer: weights, template, guard, precision and the versions at work."""
    libraries = ("metier", "torch", "transformers", "tokenizers")
    what = {
        "base": base.digest, "adapter": {f: digest_file(adapter / f) for f in ADAPTER_FILES} if adapter else None,
        "template": renderer.template, "guard": guard.as_json(), "dtype": str(base.dtype),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }  # fmt: skip
    return f"fp_{digest_json(what)[:16]}"
