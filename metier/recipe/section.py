"""What every section of the recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
# A share of the records (0.1), or a number of them (200).
Size = Annotated[int, Field(ge=0)] | Fraction


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversion between types, no change after validation."""

    # Defaults are validated too: 3 and 3.0 would give a stage two keys.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)
