"""RUN -> an adapter folder, merged safetensors, GGUF files or a bundle, each checked against what was measured.

Every form is written aside, read back from its files as others will read it, and asked the held-out records
(parity.py). A form that fails is deleted; what passed becomes visible in one rename, with PARITY.json and a
manifest. Where nothing passed, no folder appears, and `<folder>.PARITY.json` beside its place says why.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metier import artifacts
from metier.errors import ModelError, RunError
from metier.model.load import convert_gguf, load_base, others_tokenizer, save_weights
from metier.model.lora import attach, load_adapter, read_adapter_config, save_adapter
from metier.model.resolve import read_json, resolve_base
from metier.model.specialist import Specialist, load
from metier.serving import gguf_weights, parity
from metier.serving.bundle import require_card, write_bundle
from metier.serving.merge import fits_fp16, merged_weights
from metier.serving.targets import Form, Plan, Source, choose_forms

Say = Callable[[str], None]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Raised when what is written, or how it is checked, changes: exports made before are then made anew.
EXPORT = 2


def _quiet(text: str) -> None:
    pass


def export(
    run: str | Path, to: str = "bundle", *, out: str | Path | None = None, storage: Sequence[str] = (),
    targets: Sequence[str] = (), say: Say = _quiet,
) -> Path:  # fmt: skip
    """Exports a run's adapter `to` adapter, merged, gguf or bundle; returns the folder, RUN/export/<to> by default.

    `storage` says how weights are stored: f16, bf16 or f32 for merged (fp16 where it fits, else bf16), and f16, bf16,
    q8_0, q4_0 or q4_1 for GGUF (q8_0). `targets` are those of a bundle (all that can take the adapter). Raises
    `RunError` when the run is not complete or holds out too few records, `ModelError` for what a form or a target
    cannot take, before any file is written, and when a form fails the parity gate.
    """
    artifacts.refuse_revoked(Path(run) / "adapter")
    source = _read_run(Path(run), say)
    forms, served = choose_forms(to, storage, targets, entries=source.entries, config=source.config)
    final = Path(out) if out is not None else source.run / "export" / to
    if to == "bundle":
        require_card(source.run)
    if final.exists() and artifacts.read_manifest(final) is None:
        raise RunError(f"`{final}` is in use and is no export of metier", hint="choose another folder with `--out`")
    key = artifacts.digest_json(
        {
            "stage": "export", "version": EXPORT, "adapter": source.adapter["digest"], "to": to,
            "dataset": source.dataset["digest"], "forms": [[f.name, f.storage] for f in forms], "targets": served,
        }
    )  # fmt: skip
    if artifacts.is_current(final, key):
        say("export: up to date")
        return final
    with artifacts.lock_run(source.run):
        _make(source, Plan(forms, served, final), key=key, say=say)
    return final


def open_reference(run: Path, say: Say = _quiet) -> Specialist:
    """The adapter as measured, in fp32 arithmetic: its base's weights rounded to the precision of the evaluation."""
    specialist = load(run, precision="fp32", say=say)
    if specialist.adapter is None:
        raise RunError(f"the run in `{run}` has no adapter yet", hint="run `metier train` first")
    precision = (artifacts.read_manifest(run / "adapter") or {}).get("precision", "float32")
    _round(specialist.base.model, getattr(torch, precision))
    return specialist


def read_back(path: Path, form: Form, reference: Specialist, scratch: Path) -> Specialist:
    """A written form as others read it, in fp32; `scratch` is an empty folder for GGUF's way through safetensors.

    Raises `ModelError` when it cannot be read.
    """
    device = reference.base.device
    if form.kind == "merged":
        base = load_base(path, dtype=torch.float32, device=device, progress=_quiet)
        return Specialist(replace(base, tokenizer=others_tokenizer(path)))
    if form.kind == "gguf":
        convert_gguf(path, scratch)
        _restore_rotary_scaling(scratch, path, reference.base.config)
        return Specialist(load_base(scratch, dtype=torch.float32, device=device, progress=_quiet))
    base = load_base(reference.base.path, dtype=torch.float32, device=device, progress=_quiet)
    with torch.no_grad():
        for mine, measured in zip(base.model.parameters(), _base_parameters(reference), strict=True):
            mine.copy_(measured)
    if form.kind == "adapter":
        return Specialist(replace(base, tokenizer=others_tokenizer(path)), load_adapter(base.model, path))
    tensors, scaling = gguf_weights.read_adapter(path, base.config)
    names = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors})
    rank = next(iter(tensors.values())).shape[0]
    assert reference.adapter is not None
    config = reference.adapter.config.model_copy(
        update={"target_modules": names, "rank": rank, "alpha": scaling * rank, "use_rslora": False, "bias": "none"}
    )
    adapter = attach(base.model, config, seed=0)
    adapter.load(tensors)
    return Specialist(base, adapter)


def write_form(folder: Path, form: Form, reference: Specialist, source: Source) -> Path:
    """Writes one form below `folder` and returns its path. Raises `ModelError` and `RunError`."""
    path = folder / form.path
    (path if form.is_folder else path.parent).mkdir(parents=True, exist_ok=True)
    adapter, name = reference.adapter, source.run.resolve().name
    assert adapter is not None
    with artifacts.disk_errors(path):
        if form.kind == "adapter":
            base = source.entries["base_model_name_or_path"]
            save_adapter(path, adapter, adapter.tensors(), base=base, revision=source.entries.get("revision"))
            _save_tokenizer(path, reference)
        elif form.kind == "merged":
            dtype = DTYPES[form.storage]
            state = {weight.name: weight.value.to(dtype) for weight in merged_weights(reference)}
            save_weights(reference.base.model, state, path)
            _state_rotary_base_twice(path)
            _save_tokenizer(path, reference)
        elif form.kind == "gguf":
            gguf_weights.write_model(path, merged_weights(reference), reference, form=form.storage, name=name)
        else:
            gguf_weights.write_adapter(path, adapter, reference.base.config, name=name)
    return path


def _read_run(run: Path, say: Say) -> Source:
    manifests = {}
    for stage, verb in (("dataset", "prepare"), ("adapter", "train")):
        manifest = artifacts.read_manifest(run / stage)
        if manifest is None or not artifacts.is_whole(run / stage, manifest):
            raise RunError(
                f"`{run / stage}` is not there or not complete",
                hint=f"`metier {verb}` makes it; an export is checked on the held-out records of its run",
            )
        for name, entry in manifest["files"].items():
            if name not in artifacts.LOGS and artifacts.digest_file(run / stage / name) != entry.get("sha256"):
                raise RunError(
                    f"`{run / stage / name}` was altered after it was made: its digest is not the manifest's",
                    hint=f"`metier {verb}` makes it anew once you remove `{run / stage}`",
                )
        manifests[stage] = manifest
    if manifests["adapter"].get("parents", {}).get("dataset") != manifests["dataset"]["digest"]:
        raise RunError(
            f"`{run / 'adapter'}` was trained on another data set than the one in `{run / 'dataset'}`",
            hint="run `metier train` first, or `metier run`",
        )
    entries = read_json(run / "adapter" / "adapter_config.json")
    name = manifests["adapter"].get("base", {}).get("name") or str(entries.get("base_model_name_or_path"))
    config = read_json(resolve_base(name, entries.get("revision"), progress=say) / "config.json")
    return Source(run, manifests["dataset"], manifests["adapter"], entries, config)


def _make(source: Source, plan: Plan, *, key: str, say: Say) -> None:
    """Writes, checks and publishes. Leaves nothing behind but the failed forms' PARITY.json when it raises."""
    started = time.time()
    read_adapter_config(source.run / "adapter")
    reference = open_reference(source.run, say)
    best = "f16" if any(f.storage == "auto" for f in plan.forms) and fits_fp16(reference) else "bf16"
    forms = [replace(form, storage=best) if form.storage == "auto" else form for form in plan.forms]
    probes = parity.choose_probes(source.run / "dataset", reference.renderer, reference.context)
    say(f"asking the adapter and its base {len(probes)} held-out records")
    measured = parity.measure_reference(reference, probes)
    # What a killed export left is not built upon.
    shutil.rmtree(plan.final.with_name(f".{plan.final.name}.partial"), ignore_errors=True)
    work = artifacts.work_folder(plan.final, key)
    try:
        entries = {form.name: _write_and_check(work, form, reference, measured, source, say) for form in forms}
        passed = [form for form in forms if entries[form.name]["passed"]]
        record = {"schema": 1, "adapter_digest": source.adapter["digest"], "forms": entries}
        beside = plan.final.with_name(f"{plan.final.name}.PARITY.json")
        if len(passed) < len(forms):
            artifacts.write_json(beside, record)
        else:
            beside.unlink(missing_ok=True)
        if passed:
            artifacts.write_json(work / "PARITY.json", record)
            kept = replace(plan, forms=passed)
            if plan.served:
                write_bundle(work, kept, reference=reference, source=source, parity=record)
            artifacts.complete(
                work, plan.final, kind="export", key=key if len(passed) == len(forms) else f"{key}-partial",
                config={"forms": [[f.name, f.storage] for f in passed], "targets": plan.served},
                parents={"adapter": source.adapter["digest"], "dataset": source.dataset["digest"]}, started=started,
                details={"parity": {name: entry["passed"] for name, entry in entries.items()}},
            )  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    failed = {name: entry["failures"] for name, entry in entries.items() if not entry["passed"]}
    facts = {"folder": str(plan.final), "passed": [f.name for f in passed], "failed": [*failed]}
    artifacts.append_audit(source.run, "export", **facts)
    if failed:
        _refuse(failed, passed, plan.final)


def _write_and_check(
    work: Path, form: Form, reference: Specialist, measured: parity.Measured, source: Source, say: Say
) -> dict[str, Any]:
    """The form's entry of PARITY.json; where it fails, its files are gone again."""
    say(f"{form.name}: writing and reading back")
    path = write_form(work, form, reference, source)
    scratch = work / ".scratch"
    try:
        export = read_back(path, form, reference, scratch)
        entry = parity.measure(export, reference, measured, form=form.storage)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if entry["passed"]:
        say(
            f"{form.name}: passed; error {100 * entry['kl_ratio']:.4f} % of the adapter's effect, "
            f"{entry['greedy_equal']} of {len(entry['greedy'])} greedy answers equal"
        )
        return entry
    for file in sorted(work.rglob("*")) if form.path == "." else [path]:
        if file.name != "key":
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    return entry


def _refuse(failed: dict[str, list[str]], passed: list[Form], final: Path) -> None:
    reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in failed.items())
    kept = "nothing was exported"
    if passed:
        kept = f"`{final}` holds {', '.join(form.name for form in passed)}"
    elif final.exists():
        kept = f"`{final}` is an earlier export and stays as it was"
    raise ModelError(
        f"the export is not the model that was measured, and is not given out. {reasons}. {kept[0].upper()}{kept[1:]}",
        hint=f"`{final.name}.PARITY.json` beside it has the numbers; a finer `--storage` (f16, or f32) loses less",
    )


def _save_tokenizer(folder: Path, reference: Specialist) -> None:
    """The tokenizer with the chat template that was trained with: pinned, whatever the hub's copy becomes."""
    tokenizer = copy.deepcopy(reference.base.tokenizer)
    tokenizer.chat_template = reference.renderer.template
    tokenizer.save_pretrained(folder)


def _round(model: Any, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith((".lora_a", ".lora_b")):
                parameter.copy_(parameter.to(dtype))


def _base_parameters(reference: Specialist) -> list[torch.Tensor]:
    """The base's own parameters in its order, trained bias terms as the base has them."""
    trained = {id(p): base for p, base in (reference.adapter.biases.values() if reference.adapter else ())}
    named = reference.base.model.named_parameters()
    return [trained.get(id(p), p) for name, p in named if not name.endswith((".lora_a", ".lora_b"))]


def _state_rotary_base_twice(folder: Path) -> None:
    """Writes `rope_theta` and `rope_scaling` beside `rope_parameters`, the name since transformers 5.

    Other readers (mlx-lm 0.32) know the old names alone, and take a base of 10,000 where they find none: the model
    loads, answers, and is not the one that was measured.
    """
    entries = read_json(folder / "config.json")
    rope = dict(entries.get("rope_parameters") or {})
    if theta := rope.pop("rope_theta", None):
        scaling = rope if rope.get("rope_type", "default") != "default" else None
        artifacts.write_json(folder / "config.json", {**entries, "rope_theta": theta, "rope_scaling": scaling})


def _restore_rotary_scaling(folder: Path, path: Path, config: Any) -> None:
    """transformers drops GGUF's rotary scaling; where the file carries the base's, the copy to be measured gets it."""
    import gguf
    import numpy as np

    rope = dict(config.rope_parameters or {})
    reader = gguf.GGUFReader(path)
    factors = gguf_weights.rope_factors(config)
    stored = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    same = factors is not None and stored is not None and np.array_equal(factors, stored)
    linear = next((f.contents() for n, f in reader.fields.items() if n.endswith(".rope.scaling.factor")), None)
    if same or (rope.get("rope_type") == "linear" and linear == np.float32(rope["factor"])):
        entries = read_json(folder / "config.json")
        artifacts.write_json(folder / "config.json", {**entries, "rope_parameters": rope})
