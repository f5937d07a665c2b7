"""Other models that answer the same test records: all weights trained by the same recipe, and an earlier adapter.

In: what to load them from, and what base and adapter were asked. Out: their `Answers`, and what the evidence says of
each beside the controls. They are loaded one at a time, after base and adapter have answered.

Limits: an earlier adapter must be of the same base; what it was trained on is known only where its run is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import artifacts
from metier.errors import RunError
from metier.evaluation.ask import AnswerCache, Progress, Questions, ask_alone
from metier.evaluation.compare import Design, compare
from metier.evaluation.items import Answers, Item, read_items
from metier.evaluation.metrics import Metric, normalise

if TYPE_CHECKING:
    from metier.model.specialist import Specialist

# What of a training the evidence puts side by side.
TRAINING = (
    "trainable_parameters", "total_parameters", "steps", "peak_learning_rate", "val_loss", "train_seconds",
    "peak_memory_bytes", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """`name` (full, earlier), the digest of what it is, how to load it, and its manifest, if it has one."""

    name: str
    digest: str
    load: Callable[[], Specialist]
    manifest: dict[str, Any] = field(default_factory=dict)
    # What its folder says of its training records; None where they are not at hand.
    dataset: Path | None = None


def earlier_of(folder: Path, load: Callable[[], Specialist], *, base_digest: str) -> Contender:
    """The adapter in `folder`, a run's or PEFT's. Raises `RunError` where there is none, or it is of another base."""
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise RunError(
            f"evaluate.earlier: there is no adapter in `{folder}`", hint="name a run's folder or a PEFT adapter's"
        )
    artifacts.refuse_revoked(adapter)
    manifest = artifacts.read_manifest(adapter) or {}
    known = (manifest.get("parents") or {}).get("base")
    if known not in (None, base_digest):
        raise RunError(
            f"evaluate.earlier: the adapter in `{folder}` is of another base", hint="compare it with `metier compare`"
        )
    records = folder / "dataset" / "records.parquet"
    return Contender(
        "earlier", artifacts.digest_file(weights), load, manifest, records.parent if records.is_file() else None
    )


def ask_contenders(
    contenders: Sequence[Contender], items: list[Item], questions: Questions, cache: AnswerCache, progress: Progress
) -> dict[str, Answers]:
    """The answers of each, by name."""
    found = {}
    for one in contenders:
        specialist = one.load()
        side = f"{one.name} {one.digest}"
        found[one.name] = ask_alone(specialist, items, questions, side, cache=cache, progress=progress)
        del specialist  # before the next one is loaded
    return found


def num_seen(contender: Contender, items: Sequence[Item]) -> int | None:
    """How many of `items` stand, by their prompt, in what the contender was trained on; None where nobody knows."""
    if contender.dataset is None:
        return None
    seen = {normalise(i.prompt_text) for i in read_items(contender.dataset, "train")}
    return sum(normalise(i.prompt_text) in seen for i in items)


def beside_full(
    measured: Sequence[Metric], groups: list[str], design: Design, *, full: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    """LoRA beside full fine-tuning. In `measured` all weights stand where the base does: `delta` is LoRA minus full."""
    results = {
        name: {"full": r.pop("base"), "full_ci95": r.pop("base_ci95"), **r}
        for name, r in compare(measured, groups, design).items()
    }
    return {
        "metrics": results,
        "training": {
            side: {k: m[k] for k in TRAINING if k in m} for side, m in (("full", full), ("adapter", training))
        },
        "trials": full.get("trials", []),
    }
