"""The Recipe: one YAML file that says what goes in, how it is trained and how it is judged.

Every field is documented here once; `docs/recipe.md` is generated from it. Unknown keys and wrong
values are refused with the line they stand on. `--set a.b=c` overrides one value, and the recipe as
resolved is stored with the run.
"""

from __future__ import annotations

from metier.recipe.augment import AugmentConfig
from metier.recipe.balance import BalanceConfig
from metier.recipe.clean import CleanConfig
from metier.recipe.data import DataConfig
from metier.recipe.dedup import DedupConfig
from metier.recipe.evaluate import EvaluateConfig
from metier.recipe.privacy import PrivacyConfig
from metier.recipe.read import load_recipe, parse_recipe
from metier.recipe.recipe import CLASSIC, Recipe
from metier.recipe.section import Section
from metier.recipe.serve import ServeConfig
from metier.recipe.sweep import SweepConfig
from metier.recipe.train import AdapterConfig, TrainConfig
from metier.recipe.variant import variant

__all__ = [
    "CLASSIC",
    "AdapterConfig",
    "CleanConfig",
    "AugmentConfig",
    "BalanceConfig",
    "DataConfig",
    "DedupConfig",
    "EvaluateConfig",
    "PrivacyConfig",
    "Recipe",
    "Section",
    "ServeConfig",
    "SweepConfig",
    "TrainConfig",
    "load_recipe",
    "parse_recipe",
    "variant",
]
