"""Which configurations are tried, and which are given up: Optuna's samplers and its successive halving.

In: the recipe's `sweep`. Out: configurations, one at a time, and for each result the word whether to go on. The state
is the list of what happened (`events`): replayed into a new search it ends in the same state, so a killed sweep goes on
with the same decisions. A sampler is seeded anew for each configuration, so that what it proposes depends only on the
configuration's number and on what was known by then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from metier.errors import RunError
from metier.recipe.sweep import Range, SweepConfig
from metier.training.schedule import seed_of

MAX_GRID = 32


def optuna() -> Any:
    """The library, or a sentence on how to get it."""
    try:
        import optuna as library
    except ImportError:
        raise RunError("a sweep needs Optuna, which is not installed", hint="pip install 'metier[sweep]'") from None
    library.logging.set_verbosity(library.logging.ERROR)
    return library


@dataclass
class Search:
    """A search in progress. `rungs` are the shares of a configuration's steps after which it is compared."""

    config: SweepConfig
    seed: int
    events: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        library = optuna()
        self.method = method_of(self.config)
        self.grid = grid_of(self.config) if self.method == "grid" else []
        self.num_trials = len(self.grid) if self.method == "grid" else self.config.trials
        self.num_rungs = num_rungs(self.config.halving, self.num_trials)
        self._study = library.create_study(
            direction="minimize", pruner=library.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=max(2, self.config.halving)
            ),
        )  # fmt: skip
        self._trials: list[Any] = []
        told, self.events = self.events, []
        for kind, *arguments in told:
            self._replay(kind, arguments)

    @property
    def rungs(self) -> list[float]:
        return [float(self.config.halving) ** (rung - self.num_rungs) for rung in range(self.num_rungs)]

    def ask(self) -> tuple[int, dict[str, Any]] | None:
        """The next configuration's number and values by recipe key; None when all were given out."""
        number = len(self._trials)
        if number == self.num_trials:
            return None
        if self.grid:
            return self._asked(number, dict(self.grid[number]))
        self._study.sampler = self._sampler(number)
        return self._asked(number, None)

    def compare(self, rung: int, losses: dict[int, float]) -> set[int]:
        """Which of the configurations that stand at `rung`, with these losses on the val split, are to be given up.

        Optuna's rule takes them one by one and always lets the first go on. The best, then those beyond the best 1 /
        halving, then the rest: in this order it lets exactly the best 1 / halving of them go on.
        """
        order = sorted(losses, key=lambda number: (math.isnan(losses[number]), losses[number], number))
        num_finite = sum(not math.isnan(loss) for loss in losses.values())
        kept = max(1, num_finite // max(2, self.config.halving))
        return {n for n in [order[0], *order[kept:], *order[1:kept]] if self._report(n, rung, losses[n])}

    def _report(self, number: int, rung: int, loss: float) -> bool:
        self.events.append(["report", number, rung, loss])
        trial = self._trials[number]
        trial.report(loss, self.config.halving**rung)
        return bool(trial.should_prune())

    def tell(self, number: int, state: str, loss: float | None) -> None:
        """Configuration `number` ended: `complete`, `stopped` (given up) or `diverged`."""
        self.events.append(["tell", number, state, loss])
        states = optuna().trial.TrialState
        is_known = loss is not None and math.isfinite(loss)
        if state == "complete" and is_known:
            self._study.tell(self._trials[number], loss)
        else:
            self._study.tell(self._trials[number], state=states.FAIL if state == "diverged" else states.PRUNED)

    def _replay(self, kind: str, arguments: Sequence[Any]) -> None:
        if kind == "ask":
            self._asked(arguments[0], arguments[1])
        elif kind == "report":
            self._report(*arguments)
        else:
            self.tell(*arguments)

    def _asked(self, number: int, values: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Takes configuration `number` from the sampler, or gives it these values."""
        if values is not None:
            self._study.enqueue_trial({key: self._place(key, value) for key, value in values.items()})
        trial = self._study.ask({key: self._distribution(key) for key in self.config.ranges})
        self._trials.append(trial)
        found = {key: self._value(key, trial.params[key]) for key in self.config.ranges}
        self.events.append(["ask", number, found])
        return number, found

    def _sampler(self, number: int) -> Any:
        samplers, seed = optuna().samplers, seed_of("sampler", self.seed, number) % 2**32
        if self.method == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(4, self.num_trials // 3)))

    def _distribution(self, key: str) -> Any:
        values, distributions = self.config.ranges[key], optuna().distributions
        if not isinstance(values, Range):
            return distributions.CategoricalDistribution(tuple(range(len(values))))
        if isinstance(values.min, int) and isinstance(values.max, int):
            return distributions.IntDistribution(values.min, values.max, log=values.is_log)
        return distributions.FloatDistribution(values.min, values.max, log=values.is_log)

    def _value(self, key: str, drawn: Any) -> Any:
        """What the recipe says: of a list, Optuna knows the place alone."""
        values = self.config.ranges[key]
        if isinstance(values, Range):
            return drawn if isinstance(drawn, int) else float(f"{drawn:.4g}")
        return values[drawn]

    def _place(self, key: str, value: Any) -> Any:
        values = self.config.ranges[key]
        return value if isinstance(values, Range) else values.index(value)


def method_of(config: SweepConfig) -> str:
    """`grid`, `random` or `bayes`. Raises `RunError` for a grid over a range without steps."""
    open_ends = [key for key, values in config.ranges.items() if isinstance(values, Range)]
    if config.method == "grid" and open_ends:
        raise RunError(
            f"`sweep.method: grid` needs a list of values, and `{open_ends[0]}` has min and max",
            hint="name the values, or use `method: random` or `bayes`",
        )
    if config.method != "auto":
        return config.method
    return "grid" if not open_ends and len(grid_of(config)) <= MAX_GRID else "bayes"


def grid_of(config: SweepConfig) -> list[dict[str, Any]]:
    """Every combination, the last range varying fastest."""
    lists = [values if not isinstance(values, Range) else [] for values in config.ranges.values()]
    return [dict(zip(config.ranges, combination, strict=True)) for combination in itertools.product(*lists)]


def num_rungs(halving: int, num_trials: int) -> int:
    """How often configurations are compared: about down to a ninth of a run, and not more often than halving can."""
    if halving < 2:
        return 0
    return min(max(1, round(math.log(9, halving))), int(math.log(num_trials, halving) + 1e-9))
