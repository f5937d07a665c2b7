"""The whole recipe, and the tutorial's own as a preset."""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from metier.recipe.augment import NEED_DOMAIN, AugmentConfig
from metier.recipe.balance import BalanceConfig
from metier.recipe.clean import CleanConfig
from metier.recipe.data import DataConfig
from metier.recipe.dedup import DedupConfig
from metier.recipe.evaluate import EvaluateConfig
from metier.recipe.privacy import PrivacyConfig
from metier.recipe.scale import ScaleConfig
from metier.recipe.section import Section
from metier.recipe.serve import ServeConfig
from metier.recipe.sweep import SweepConfig
from metier.recipe.train import AdapterConfig, TrainConfig


class Recipe(Section):
    """A whole run. Only `base`, `out` and `data.sources` have no default."""

    base: str = Field(
        min_length=1,
        description="`smollm2-135m`, a local folder, a GGUF file, or a hub id such as meta-llama/Llama-2-7b-chat-hf.",
    )
    revision: str | None = Field(default=None, description="A hub model's commit, tag or branch.")
    out: str = Field(min_length=1, description="The run's folder, relative to where metier is called.")
    preset: Literal["default", "classic"] = Field(
        default="default", description="`classic`: the tutorial's own values; what the recipe states wins over either."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Of the split, the adapter's start, the data's order and dropout."
    )
    domain: str | None = Field(
        default=None,
        description="`finance`, `medicine`, `education`, `law`, or your own YAML file: wordings, terms, red lines.",
    )
    data: DataConfig
    clean: CleanConfig = CleanConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    dedup: DedupConfig = DedupConfig()
    balance: BalanceConfig = BalanceConfig()
    augment: AugmentConfig = AugmentConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sweep: SweepConfig = SweepConfig()
    serve: ServeConfig = ServeConfig()
    scale: ScaleConfig = ScaleConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        named = [n for n in ("messages", "text") if getattr(self.data, n)]
        if len(named) == 2 or (named and (self.data.prompt or self.data.answer)):
            raise ValueError("data: name either prompt and answer, or messages, or text, not several of them")
        peak = self.train.learning_rate
        if peak != "auto" and self.train.min_learning_rate > peak:
            raise ValueError("train.min_learning_rate is above train.learning_rate, where the cosine starts")
        needy = [method for method in self.augment.methods if method in NEED_DOMAIN]
        if needy and self.domain is None:
            raise ValueError(
                f"augment.methods: {needy[0]} takes its wordings, terms and units from a `domain`; name one"
            )
        return self

    def to_yaml(self) -> str:
        """The recipe with every value spelled out; reading it back gives an equal Recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# The tutorial's recipe, value for value. Its max length, 512, cuts the prompt there and never the answer here.
CLASSIC: dict[str, Any] = {
    "adapter": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"], "dropout": 0.05, "bias": "none"},
    "train": {
        "epochs": 3,
        "micro_batch_size": 4,
        "grad_accum_steps": 4,
        "learning_rate": 2e-4,
        "min_learning_rate": 0.0,
        "warmup_ratio": 0.0,
        "max_seq_len": 512,
        "over_length": "cut_prompt",
        "log_every": 50,
        "save_every": 500,
    },
}
