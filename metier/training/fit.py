"""From a recipe to the way it will be trained: which precisions are open, what the records are like, what fits.

Used before anything is loaded (`metier plan`, and a check before training) and again by training itself, once the
records are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from metier.errors import RecipeError, RunError
from metier.model.chat import Rendered
from metier.model.device import Precision
from metier.recipe import AdapterConfig, TrainConfig
from metier.training.cards import GIB, Card
from metier.training.memory import LEAN_FP8, Shape
from metier.training.plan import Choice, Job, best, choices


def precisions_for(config: TrainConfig, card: Card) -> list[str]:
    """The precisions of the frozen base that the recipe leaves open on `card`, the most exact first.

    Raises `RecipeError` for one that the card has no units for.
    """
    half = "bf16" if card.has_bf16 else "fp16"
    asked = config.precision
    if asked != "auto":
        if asked == "fp8" and not card.fp8_tflops:
            raise RecipeError(
                f"`train.precision: fp8` needs a card of compute capability 8.9 or newer; this is {card.name}",
                hint=f"`train.precision: auto` takes what fits, {half} first",
            )
        return [asked, LEAN_FP8] if asked == "fp8" else [asked]
    if card.is_cpu:
        return ["bf16" if card.has_bf16 else "fp32"]
    return [half, *(["fp8", LEAN_FP8] if card.fp8_tflops else []), "nf4"]


def job_of(records: Sequence[Rendered], adapter: AdapterConfig, config: TrainConfig) -> Job:
    """What the records, or a sample of them, are like."""
    tokens = sum(record.num_tokens for record in records)
    return Job(
        mean_tokens=tokens / len(records),
        longest=max(record.num_tokens for record in records),
        loss_share=sum(record.num_loss_tokens for record in records) / tokens,
        records_per_pass=config.micro_batch_size,
        dropout=adapter.dropout > 0,
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """`chosen` of all the `ways`, fitting or not; None where none fits."""

    chosen: Choice | None
    ways: list[Choice]

    @property
    def leanest(self) -> Choice:
        return min(self.ways, key=lambda way: way.total_bytes)


def fit(shape: Shape, job: Job, card: Card, config: TrainConfig, *, processes: int = 1) -> Fit:
    """The first precision that fits, as fast as it can be trained: fewer bits only where they are needed.

    Several `processes` share the base only where it fits none of their cards in any precision that is open.
    """
    ways = []
    chosen = None
    for shared_by in (1, processes) if processes > 1 else (1,):
        for precision in precisions_for(config, card):
            ways += (some := choices(shape, job, card, config, [precision], shared_by=shared_by))
            chosen = chosen or best(some, card.memory_bytes)
    return Fit(chosen, ways)


def base_that_fits(shape: Shape, card: Card, config: TrainConfig, *, processes: int = 1) -> tuple[Precision, bool]:
    """What `train.precision` means on `card`, and whether the processes share the base.

    It is the most exact that leaves room for training on one short record. Raises `RunError` where none does: before
    any weight is loaded.
    """
    least = fit(shape, Job(64, 64, 0.5, 1, dropout=False), card, config, processes=processes)
    if least.chosen is None:
        raise cannot_fit(least.leanest, card, config)
    return cast(Precision, least.chosen.precision.partition(",")[0]), least.chosen.shared_by > 1


def cannot_fit(leanest: Choice, card: Card, config: TrainConfig) -> RunError:
    """The error for a job that no way of training fits: how much it misses, and what would fit."""
    needed, held = leanest.total_bytes / GIB, card.memory_bytes / GIB
    shared = f" shared by {leanest.shared_by} processes" if leanest.shared_by > 1 else ""
    part, size = max(leanest.memory.items(), key=lambda item: item[1])
    ideas = [f"a card of {needed:.1f} GiB", "a smaller base"]
    if config.precision not in ("auto", "nf4") and not card.is_cpu:
        ideas.append("`train.precision: nf4`")
    if part == "frozen base":
        ideas.append("more cards under torchrun, which share the base")
    if part in ("activations", "loss"):
        ideas.insert(0, "a smaller `train.max_seq_len`")
        if leanest.recompute != "full":
            ideas.insert(0, "`train.recompute: full`")
    return RunError(
        f"this training does not fit into {held:.1f} GiB: the leanest way (base in {leanest.precision}{shared}, "
        f"recomputation: {leanest.recompute}, passes of {leanest.micro_batch_tokens} tokens) "
        f"needs {needed:.1f} GiB, {size / GIB:.1f} of it for the {part}",
        hint=f"what would fit: {', '.join(ideas)}",
    )
