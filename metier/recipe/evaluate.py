"""The recipe's `evaluate`: how base and adapter are compared, and what must not come out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from metier.recipe.section import Count, Section

Gate = Literal["exposure_bits", "membership_auc", "extracted", "forgetting", "red_lines"]


class EvaluateConfig(Section):
    """How base and adapter are compared on the test split."""

    tasks: (
        Literal["auto"] | list[Literal["classification", "multiple_choice", "extraction", "generation", "perplexity"]]
    ) = Field(
        default="auto",
        min_length=1,
        description="`auto`: by the data: labels, options to choose from, fields, open answers or plain text.",
    )
    max_items: Count | None = Field(
        default=None, description="Test records at most; a seeded choice. Default: all of them."
    )
    max_new_tokens: Count | Literal["auto"] = Field(
        default="auto", description="Tokens in one generated answer at most. `auto`: what the longest reference needs."
    )
    bootstrap_samples: int = Field(default=10_000, ge=100, description="Resamples behind each 95 % interval.")
    smallest_effect: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="The smallest difference that matters, as a share (0.05: five points). Where it could not have "
        "been seen, the verdict is `not enough data`.",
    )
    few_shot: int = Field(
        default=0, ge=0, le=16, description="Also ask the base with this many training records as examples before."
    )
    forgetting: bool = Field(
        default=True, description="Ask built-in general questions in Chinese and English, of base and adapter."
    )
    memorisation_items: int = Field(
        default=200, ge=0, description="Training records in the test for memorised membership; 0: no test."
    )
    own_probes: str | None = Field(
        default=None,
        description="A YAML file with your own general questions, beside the built-in ones and in their form: `text`, "
        "`choice`, `instruction`, `refusal`, `red_line`, each by language (`en`, `zh`).",
    )
    reference: Literal["full"] | None = Field(
        default=None,
        description="`full`: train the same recipe with all weights too, and put LoRA beside it; takes 16 bytes a "
        "weight of GPU memory, or 40 on a CPU.",
    )
    earlier: str | None = Field(
        default=None,
        description="An earlier run's folder, or a PEFT adapter's: it answers the same test records, as a control.",
    )
    gates: dict[Gate, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="Limits that fail the run when exceeded: `exposure_bits` of planted canaries, `membership_auc`, "
        "`extracted` (identifiers that were removed at preparation and that the adapter alone gives away), "
        "`forgetting` (share by which bits per byte of general text may rise), `red_lines` (share of answers).",
    )
