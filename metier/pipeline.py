"""The whole of metier on one page: raw records -> dataset -> adapter -> evidence -> report.

Each stage makes one artifact in the run's folder and is skipped when that artifact was already made
from the same parents with the same settings. Stages know nothing of each other; they meet on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from metier.artifacts import (
    MANIFEST,
    STAGES,
    append_audit,
    audit_artifacts,
    damaged_file,
    digest_file,
    digest_json,
    is_current,
    is_whole,
    lock_run,
    read_manifest,
    write_atomic,
)
from metier.errors import RunError
from metier.recipe import Recipe

if TYPE_CHECKING:
    from metier.evaluation.contenders import Contender
    from metier.model.load import Base

# How often to write down what happened cannot change what happens.
NO_EFFECT = {"log_every", "save_every", "report_to"}


class Ui(Protocol):
    """Where the stages tell what they do. `metier.terminal` has one for people; the default is silent."""

    def say(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int, **numbers: float) -> None: ...


class Silent:
    """Tells nothing."""

    def say(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int, **numbers: float) -> None: ...


def run(recipe: Recipe, ui: Ui | None = None) -> Path:
    """Makes everything that `recipe` asks for and that is not there yet; returns the report's path.

    Raises the errors of `metier.errors`; what was complete before stays complete.
    """
    if is_follower():
        return _follow(recipe) / "report.html"
    with _run_folder(recipe, ui) as (out, ui):
        _prepare(recipe, out, ui)
        check_test_split(out / "dataset")
        _train(recipe, out, ui)
        _dismiss(out, unless_shared=True)
        _evaluate(recipe, out, ui)
        _dismiss(out)
    return out / "report.html"


def prepare(recipe: Recipe, ui: Ui | None = None) -> Path:
    """Makes the data set alone and returns its folder."""
    with _run_folder(recipe, ui) as (out, ui):
        _prepare(recipe, out, ui)
    return out / "dataset"


def train(recipe: Recipe, ui: Ui | None = None) -> Path:
    """Trains on the run's data set, which is there already or was carried here, and returns the adapter's folder."""
    if is_follower():
        return _follow(recipe) / "adapter"
    with _run_folder(recipe, ui) as (out, ui):
        _train(recipe, out, ui)
        _dismiss(out)
    return out / "adapter"


def evaluate(recipe: Recipe, ui: Ui | None = None) -> Path:
    """Compares the run's adapter with its base, writes the report, and returns the evidence's folder."""
    with _run_folder(recipe, ui) as (out, ui):
        _evaluate(recipe, out, ui)
    return out / "evidence"


def export(
    run: str | Path, to: str = "bundle", *, out: str | Path | None = None, storage: Sequence[str] = (),
    targets: Sequence[str] = (), say: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Writes the run's adapter in a form that others serve, and its parity into the report; returns the folder.

    Raises `RunError` for a form that is not what was measured; those that are stay.
    """
    from metier.serving.export import export as export_run

    try:
        return export_run(run, to, out=out, storage=storage, targets=targets, say=say)
    finally:
        folder = Path(run)
        if read_manifest(folder / "evidence") and any(folder.glob("export/*/PARITY.json")):
            _report(folder)


def is_follower() -> bool:
    """Whether `torchrun` started this process as any but the first: it trains along, and writes and says nothing."""
    return int(os.environ.get("RANK", "0")) > 0 and num_processes() > 1


def num_processes() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _follow(recipe: Recipe) -> Path:
    """Waits for the first process's word, and trains and holds its part of a shared base; returns the run's folder."""
    from metier.training import ranks, shared

    ranks.start(recipe.train.device)
    key = ranks.from_first(None)
    if key is not None:
        _train_adapter(recipe, Path(recipe.out), key, Silent())
    shared.follow(Path(recipe.out), recipe.train.device)
    return Path(recipe.out)


def _dismiss(out: Path, *, unless_shared: bool = False) -> None:
    """Lets the other processes go, where there are some; with `unless_shared` only where each had the whole base."""
    if num_processes() > 1:
        from metier.training import shared

        if not (unless_shared and shared.is_shared(out)):
            shared.dismiss()


@contextlib.contextmanager
def _run_folder(recipe: Recipe, ui: Ui | None) -> Iterator[tuple[Path, Ui]]:
    out = Path(recipe.out)
    with lock_run(out):
        audit_artifacts(out, recovered=True)  # of what was completed just before a kill
        yield out, ui or Silent()
        _store(recipe, out)


def _prepare(recipe: Recipe, out: Path, ui: Ui) -> None:
    from metier.data.prepare import dataset_key, prepare

    asked = dataset_key(recipe, out / "dataset")
    if is_current(out / "dataset", asked[0]):
        ui.say("dataset: up to date")
        return
    prepare(recipe, out=out / "dataset", progress=ui.say, asked=asked)
    _store(recipe, out)
    audit_artifacts(out)


def check_test_split(dataset: Path) -> None:
    """Raises `DataError` before anything is trained that could not be judged afterwards."""
    from metier.evaluation.items import refuse_no_test

    refuse_no_test(_parent(dataset, "prepare")["splits"]["test"])


def _train(recipe: Recipe, out: Path, ui: Ui) -> None:
    key = adapter_key(recipe, out, ui)
    is_made = is_current(out / "adapter", key)
    if num_processes() > 1:
        from metier.training import ranks

        ranks.start(recipe.train.device)
        ranks.from_first(None if is_made else key)
    if is_made:
        ui.say("adapter: up to date")
    else:
        _train_adapter(recipe, out, key, ui)
        _store(recipe, out)
        audit_artifacts(out)


def adapter_key(recipe: Recipe, out: Path, ui: Ui) -> str:
    """What the adapter in `out` is made of: data set, base, seed and settings. Raises `RunError` without a data set."""
    from metier.model.resolve import base_digest, resolve_base

    dataset = _parent(out / "dataset", "prepare")
    path = resolve_base(recipe.base, recipe.revision, progress=ui.say)
    return digest_json(
        {
            "stage": "adapter", "dataset": dataset["digest"], "base": base_digest(path), "seed": recipe.seed,
            "adapter": recipe.adapter.model_dump(), "train": recipe.train.model_dump(exclude=NO_EFFECT),
        }
    )  # fmt: skip


def _train_adapter(recipe: Recipe, out: Path, key: str, ui: Ui) -> None:
    from metier.training.train import train

    train(
        base_of(recipe, ui, may_share=True), recipe.adapter, recipe.train, dataset=out / "dataset", out=out / "adapter",
        seed=recipe.seed, key=key, report=ui.progress, say=ui.say,
    )  # fmt: skip


def base_of(recipe: Recipe, ui: Ui, *, may_share: bool = False) -> Base:
    """The base to train on, in the precision that fits; with `may_share` over the processes where none fits one.

    Under torchrun all processes call it, and do as the first one finds.
    """
    from metier.model.device import resolve_device, resolve_precision, storage_of
    from metier.model.load import empty_model, load_base, read_config
    from metier.model.resolve import resolve_base
    from metier.training import ranks
    from metier.training.cards import card_here
    from metier.training.fit import base_that_fits
    from metier.training.memory import shape_of

    path = resolve_base(recipe.base, recipe.revision, progress=ui.say)
    device = resolve_device(recipe.train.device)
    dtype = resolve_precision(recipe.train.precision, device)
    # Before any weight is loaded: what is misspelt, and what can never fit.
    shape = shape_of(empty_model(read_config(str(path)), dtype), recipe.adapter)
    # Trained biases are the base's own tensors, which then cannot be shared.
    processes = num_processes() if may_share and recipe.adapter.bias == "none" else 1
    precision, shared = base_that_fits(shape, card_here(device), recipe.train, processes=processes)
    precision, shared = ranks.from_first((precision, shared))
    storage = storage_of(precision)
    kept = "" if storage == "dense" else f", the base's weights in {storage}"
    kept += f", the base's layers shared by {processes} processes" if shared else ""
    ui.say(f"training on {device.type} in {str(dtype).removeprefix('torch.')}{kept}")
    return load_base(
        recipe.base, revision=recipe.revision, dtype=dtype, device=device, storage=storage, shared=shared,
        progress=ui.say,
    )  # fmt: skip


def _full(recipe: Recipe, out: Path, ui: Ui) -> dict[str, Any]:
    """Trains all weights of the base by the same recipe, where that is not done yet; returns the manifest."""
    from metier.model.device import resolve_device, resolve_precision
    from metier.model.load import empty_model, load_base, read_config
    from metier.model.resolve import base_digest, resolve_base
    from metier.training.full import refuse_too_large, train_full

    dataset = _parent(out / "dataset", "prepare")
    path = resolve_base(recipe.base, recipe.revision, progress=ui.say)
    key = digest_json(
        {
            "stage": "full", "dataset": dataset["digest"], "base": base_digest(path), "seed": recipe.seed,
            "train": recipe.train.model_dump(exclude=NO_EFFECT),
        }
    )  # fmt: skip
    if is_current(out / "full", key):
        ui.say("full fine-tuning: up to date")
        return _parent(out / "full", "evaluate --reference full")
    device = resolve_device(recipe.train.device)
    precision = resolve_precision(recipe.train.precision, device)
    refuse_too_large(sum(p.numel() for p in empty_model(read_config(str(path)), precision).parameters()), device)
    base = load_base(
        recipe.base, revision=recipe.revision, dtype=resolve_precision("fp32", device), device=device, progress=ui.say
    )
    return train_full(
        base, recipe.train, precision=precision, dataset=out / "dataset", out=out / "full", seed=recipe.seed, key=key,
        report=ui.progress, say=ui.say,
    )  # fmt: skip


def _contenders(recipe: Recipe, out: Path, ui: Ui) -> list[Contender]:
    """The other models that the recipe puts beside the adapter; what is to be trained for that is trained."""
    if not recipe.evaluate.reference and not recipe.evaluate.earlier:
        return []
    from metier.evaluation.contenders import Contender, earlier_of
    from metier.model.resolve import base_digest, resolve_base
    from metier.model.specialist import Specialist, load, precision_of

    def loaded(folder: Path) -> Callable[[], Specialist]:
        device = recipe.train.device
        return lambda: load(folder, device=device, precision=precision_of(out / "adapter"), say=ui.say)

    found = []
    if recipe.evaluate.reference == "full":
        from metier.training import ranks

        with ranks.alone():  # others may be waiting for the evaluation
            manifest = _full(recipe, out, ui)
        found.append(Contender("full", manifest["digest"], loaded(out / "full"), manifest))
    if recipe.evaluate.earlier:
        folder = Path(recipe.evaluate.earlier)
        digest = base_digest(resolve_base(recipe.base, recipe.revision, progress=ui.say))
        found.append(earlier_of(folder, loaded(folder), base_digest=digest))
    return found


def _digest_of(path: str | None) -> str | None:
    return digest_file(Path(path)) if path and Path(path).is_file() else None


def _evaluate(recipe: Recipe, out: Path, ui: Ui) -> None:
    dataset, adapter = _parent(out / "dataset", "prepare"), _parent(out / "adapter", "train")
    if adapter.get("parents", {}).get("dataset") != dataset["digest"]:
        # What is test now may have been trained on.
        raise RunError(
            f"`{out / 'adapter'}` was trained on another data set than the one in `{out / 'dataset'}`",
            hint="run `metier train` first, or `metier run`",
        )
    contenders = _contenders(recipe, out, ui)
    key = digest_json(
        {
            "stage": "evidence", "dataset": dataset["digest"], "adapter": adapter["digest"], "seed": recipe.seed,
            "evaluate": recipe.evaluate.model_dump(), "contenders": {one.name: one.digest for one in contenders},
            "own_probes": _digest_of(recipe.evaluate.own_probes),
        }
    )  # fmt: skip
    is_judged = is_current(out / "evidence", key)
    if is_judged and _is_reported(out):
        ui.say("evidence: up to date")
        _enforce_gates(out)
        return
    if not is_judged:
        from metier.evaluation.evaluate import evaluate
        from metier.training.shared import specialist_of

        with specialist_of(out, recipe.train.device, ui.say) as specialist:
            evaluate(
                specialist, dataset=out / "dataset", adapter=out / "adapter", config=recipe.evaluate, seed=recipe.seed,
                out=out / "evidence", key=key, progress=ui.progress, contenders=contenders,
            )  # fmt: skip
        audit_artifacts(out)
    _store(recipe, out)
    _report(out)
    _enforce_gates(out)


def _report(out: Path) -> None:
    """Writes report and card from what the run's folder holds."""
    from metier.evaluation.card import write_card
    from metier.evaluation.report import write_report

    write_card(out)
    names = [*write_report(out), "MODEL_CARD.md", *(f"{stage}/{MANIFEST}" for stage in STAGES)]
    append_audit(out, "report", files=_digests(out, names))


def _digests(out: Path, names: list[str]) -> dict[str, str]:
    return {name: digest_file(out / name) for name in names}


def _enforce_gates(out: Path) -> None:
    """Raises `RunError` when a limit of `evaluate.gates` was exceeded; evidence and report are there to read."""
    evidence = json.loads((out / "evidence" / "evidence.json").read_text(encoding="utf-8"))
    failed = [gate for gate in evidence["gates"] if not gate["passed"]]
    if failed:
        words = "; ".join(
            f"{g['name']} " + ("was not measured" if g["value"] is None else f"is {g['value']:.4g}")
            + f", the limit is {g['limit']:g}" for g in failed
        )  # fmt: skip
        raise RunError(f"the adapter does not pass the recipe's gates: {words}", hint=f"`{out / 'report.html'}` tells")


def _is_reported(out: Path) -> bool:
    """Whether card and report are there and no older than the evidence they tell of."""
    pages = [out / "MODEL_CARD.md", out / "report.html"]
    told = (out / "evidence" / MANIFEST).stat().st_mtime_ns
    return all(page.exists() and page.stat().st_mtime_ns >= told for page in pages)


def _parent(folder: Path, verb: str) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest is None or not is_whole(folder, manifest):
        raise RunError(f"`{folder}` is not there or not complete", hint=f"run `metier {verb}` first, or `metier run`")
    if damaged := damaged_file(folder, manifest):
        raise RunError(
            f"`{folder / damaged}` is damaged: it is not the file that was made",
            hint=f"remove `{folder}` and run `metier {verb}` again",
        )
    return manifest


def _store(recipe: Recipe, out: Path) -> None:
    """Keeps the recipe as resolved beside what it made; one that failed leaves the earlier one there."""
    path, text = out / "recipe.yaml", recipe.to_yaml().encode()
    if not path.exists() or path.read_bytes() != text:
        write_atomic(path, text)
        append_audit(out, "recipe", files=_digests(out, ["recipe.yaml"]))
