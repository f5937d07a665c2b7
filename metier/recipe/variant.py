"""A recipe with some of its values replaced: one configuration of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from metier.errors import RecipeError
from metier.recipe.recipe import Recipe


def variant(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`recipe` with `values` by key (`train.learning_rate`). Raises `RecipeError` for a value that the key refuses."""
    changed = recipe.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        place = changed
        for section in sections:
            place = place[section]
        place[last] = value
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = ", ".join(f"{key} {value}" for key, value in values.items())
        raise RecipeError(f"`sweep.ranges` gives {told}: {where}: {first['msg']}") from None
