"""The recipe's `scale`: who does the work of `prepare` and of `sweep`. What comes out is the same, whoever does."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from metier.errors import RunError
from metier.recipe.section import Count, Section


class ScaleConfig(Section):
    """Processes of this machine, or a Ray cluster. What comes out does not depend on it."""

    workers: Count | Literal["auto"] = Field(
        default="auto",
        description="Processes that work on parts of the records: `auto` is one for each core, at most 16, and for "
        "fewer than 20,000 rows none beside metier's own; 1 keeps everything in one process.",
    )
    ray: str | None = Field(
        default=None,
        description="A Ray cluster instead: `auto` for the one that this machine belongs to, or an address such as "
        "`ray://head:10001`. metier must be installed on its machines; the files are read here. `metier sweep` "
        "spreads its configurations over the cluster's GPUs, or machines; there the run's folder and the base must be "
        "reachable under the same path. Needs `pip install metier[ray]`.",
    )

    def connect(self) -> Any:
        """The module `ray`, connected to the cluster. Raises `RunError` without the package, or without a cluster."""
        try:
            import ray
        except ImportError:
            raise RunError("`scale.ray` needs the package ray", hint="pip install 'metier[ray]'") from None
        try:
            ray.init(address=self.ray, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, TimeoutError):
            raise RunError(
                f"`scale.ray`: no Ray cluster answers at `{self.ray}`",
                hint="start one with `ray start --head`, or leave `scale.ray` out",
            ) from None
        return ray
