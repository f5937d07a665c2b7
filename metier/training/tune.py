"""A sweep on many machines: groups of configurations as Ray Tune's trials, compared as on one.

The cluster's GPUs, or where it has none its machines, each take a group, whose adapters are trained side by side up to
their next comparison or their end; their states lie in the run's folder. Then the search decides as it does on one
machine, and the next generation goes on from those states. Ray Tune places the trials and starts one again whose
machine was lost; a sweep that is killed goes on from its last generation.

The table is that of one machine where all configurations are trained at a time there and have equally many steps; else
more of them are compared with each other here. Limits: the run's folder and the base must be reachable by all machines
under the same path, and the base is loaded anew for each generation.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.artifacts import write_json
from metier.errors import MetierError, RunError
from metier.model.load import Base
from metier.recipe import Recipe
from metier.training.checkpoint import load_checkpoint, save_checkpoint
from metier.training.loop import Report
from metier.training.search import Search
from metier.training.sweep import Sweep, decide, extremes, outcome
from metier.training.trials import MOST_AT_ONCE, Ground, Member

Found = dict[str, Any]
ATTEMPTS = 3


@dataclass(frozen=True)
class Generation:
    """What a machine is told: `groups` of (number, values, steps done)."""

    load: Callable[[], Base]
    recipe: Recipe
    datasets: Mapping[str, Path]
    work: Path
    groups: list[list[tuple[int, dict[str, Any], int]]]

    def train(self, given: dict[str, Any]) -> dict[str, Any]:
        """Ray Tune's trial: trains the group given["group"]; its events as JSON, or the error's sentence."""
        try:
            group = self.groups[given["group"]]
            ground = Ground(self.load(), self.recipe, self.datasets, self.work, _say_nothing)
            ground.open(extremes(self.recipe), len(group))
            events: list[Found] = []
            for start in range(0, len(group), ground.at_once):
                events += self._side_by_side(ground, group[start : start + ground.at_once])
            return {"events": json.dumps(events)}
        except MetierError as error:
            return {"error": str(error)}

    def _side_by_side(self, ground: Ground, some: list[tuple[int, dict[str, Any], int]]) -> list[Found]:
        running = Sweep(ground, Search(self.recipe.sweep, self.recipe.seed), (0, 1))
        running.members = [self._member(running, *one) for one in some]
        ground.base.model.train()
        events: list[Found] = []
        while running.members:
            running.together.hold([member.trainer for member in running.members])
            news: list[Found] = []
            while not news:
                news = running.advance()
            events += news
            for member in [m for m in running.members if m.number in {event["number"] for event in news}]:
                tensors, state = member.state()
                folder = self._folder(member.number)
                folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(folder, member.trainer.progress, tensors, state)
                member.metrics.close()
                running.members.remove(member)
        return events

    def _member(self, running: Sweep, number: int, values: dict[str, Any], steps: int) -> Member:
        found = load_checkpoint(self._folder(number), _say_nothing, last=steps) if steps else None
        if steps and (found is None or found[0].step != steps):
            raise RunError(f"the state of configuration {number + 1} after {steps} steps is not in the run's folder",
                           hint="the folder must be the same on all machines of the cluster")  # fmt: skip
        state = None if found is None else (found[2], found[1])
        return Member.start(running.ground, number, values, rungs=running.search.rungs, found=state)

    def _folder(self, number: int) -> Path:
        return self.work / "states" / f"trial-{number:02d}"


def sweep_on_ray(
    load: Callable[[], Base], recipe: Recipe, *, datasets: Mapping[str, Path], work: Path, report: Report,
    say: Callable[[str], None],
) -> Found:  # fmt: skip
    """`metier.training.sweep.sweep` on the cluster of `recipe.scale`; `load` loads the base on a machine of it.

    Raises `RunError` where the cluster fails, and what training raises on it.
    """
    ray = recipe.scale.connect()
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        places = gpus or sum(node["Alive"] for node in ray.nodes())
        each = MOST_AT_ONCE if recipe.sweep.at_once == "auto" else recipe.sweep.at_once
        path = work / "generations.json"
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        search = Search(recipe.sweep, recipe.seed, saved.get("events", []))
        rows = {row["number"]: row for row in saved.get("rows", [])}
        running: dict[int, tuple[dict[str, Any], int]] = {n: (values, at) for n, values, at in saved.get("running", [])}
        seconds = saved.get("seconds", 0.0)
        say(f"{search.num_trials} configurations ({search.method}) on {places} {'GPUs' if gpus else 'machines'} of a "
            "Ray cluster")  # fmt: skip
        while True:
            tick = time.perf_counter()
            while len(running) < each * places and (asked := search.ask()):
                running[asked[0]] = (asked[1], 0)
            if not running:
                break
            some = [(number, *running[number]) for number in sorted(running)]
            groups = [some[start::places] for start in range(min(places, len(some)))]
            events = _on_cluster(Generation(load, recipe, datasets, work.absolute(), groups), bool(gpus))
            ended = decide(search, rows, events, say)
            for event in events:
                running[event["number"]] = (event["row"]["values"], event["row"]["steps"])
            running = {number: one for number, one in running.items() if number not in ended}
            seconds += time.perf_counter() - tick
            write_json(path, {"events": search.events, "rows": [*rows.values()], "seconds": seconds,
                              "running": [(number, *one) for number, one in running.items()]})  # fmt: skip
            report(f"sweep ({len(running)} going on)", len(rows), search.num_trials)
    finally:
        ray.shutdown()
    return outcome(search, rows, seed=recipe.seed, seconds=seconds)


def _on_cluster(generation: Generation, on_gpus: bool) -> list[Found]:
    """The events of all groups. Raises `RunError` for a group that failed `ATTEMPTS` times."""
    from ray import tune

    folder = generation.work / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(generation.train, {"cpu": 1, "gpu": int(on_gpus)}),
        param_space={"group": tune.grid_search(list(range(len(generation.groups))))},
        run_config=tune.RunConfig(
            name="generation", storage_path=str(folder), verbose=0,
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
        ),
    )  # fmt: skip
    events: list[Found] = []
    with contextlib.redirect_stdout(io.StringIO()):  # Tune's own table
        results = tuner.fit()
    for result in results:
        if result.error is not None:
            raise RunError(f"a machine of the Ray cluster failed: {type(result.error).__name__}",
                           hint="`ray status` shows the cluster; run again to go on")  # fmt: skip
        if "error" in result.metrics:
            raise RunError(result.metrics["error"])
        events += json.loads(result.metrics["events"])
    return events


def _say_nothing(text: str) -> None: ...
