"""The recipe's `sweep`: which configurations `metier sweep` tries, and when it gives one up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from metier.errors import did_you_mean
from metier.recipe.section import Count, Section

# What differs between the configurations of a sweep: nothing that would change the validation split.
SWEPT = (
    "adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.target_modules", "adapter.use_rslora",
    "train.learning_rate", "train.min_learning_rate", "train.warmup_ratio", "train.weight_decay",
    "train.max_grad_norm", "train.epochs", "train.micro_batch_size", "train.grad_accum_steps",
    "balance.classes", "balance.limit", "balance.sources", "balance.general_share", "seed",
)  # fmt: skip


class Range(Section):
    """Numbers from `min` to `max`; whole numbers when both are."""

    min: int | float
    max: int | float
    log: bool | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.min >= self.max:
            raise ValueError(f"sweep.ranges: min {self.min} is not below max {self.max}")
        if self.log and self.min <= 0:
            raise ValueError("sweep.ranges: a logarithmic range begins above 0")
        return self

    @property
    def is_log(self) -> bool:
        return self.min > 0 if self.log is None else self.log


Choice = bool | int | float | str | list[str] | dict[str, float]


class SweepConfig(Section):
    """Configurations that `metier sweep` trains side by side on one base, and the rule that stops the bad ones."""

    ranges: dict[str, list[Choice] | Range] = Field(
        default={},
        description="What is varied, by its recipe key: a list of values, or `{min: 1e-4, max: 3e-3}`, drawn evenly on "
        "a logarithmic scale where min is above 0 (`log: false`: on a plain one). The keys: "
        + ", ".join(SWEPT) + ". Empty: ranks 8 and 32, each with a third, one and three times the learning rate.",
    )  # fmt: skip
    method: Literal["auto", "grid", "random", "bayes"] = Field(
        default="auto",
        description="`grid`: every combination of the lists; `random`; `bayes` learns from what was tried (Optuna's "
        "TPE). `auto`: a grid where all ranges are lists of at most 32 combinations, else bayes.",
    )
    trials: Count = Field(default=16, description="Configurations that random and bayes try.")
    halving: Count = Field(
        default=3,
        description="After a ninth and a third of its steps a configuration goes on only if it is among the best third "
        "so far (Optuna's successive halving); 2: the best half, earlier and more often; 1: all train to the end.",
    )
    at_once: Count | Literal["auto"] = Field(
        default="auto", description="Adapters that are trained at a time. `auto`: as many as fit, 16 at most."
    )

    @field_validator("ranges")
    @classmethod
    def _known(cls, ranges: dict[str, list[Choice] | Range]) -> dict[str, list[Choice] | Range]:
        for key, values in ranges.items():
            if key not in SWEPT:
                raise ValueError(
                    f"sweep.ranges: `{key}` cannot be varied{did_you_mean(key, list(SWEPT))}; these can: "
                    + ", ".join(SWEPT)
                )
            if isinstance(values, list) and not values:
                raise ValueError(f"sweep.ranges: `{key}` has no value to try")
        return ranges
