"""RUN/dataset + a base model -> RUN/sweep and the best configuration's RUN/adapter.

Many configurations are trained side by side on one base, compared on the validation split, and the bad ones given up;
the test split is not looked at. What happens is a function of the recipe and the seed: a sweep that is killed at any
moment and started again ends with the same table.

Under torchrun each process has the base and a part of the configurations. All of them go from step to step together and
hear of each other's results, so that they decide alike.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metier.artifacts import complete, read_manifest, work_folder, write_atomic, write_json
from metier.errors import Interrupted, RunError
from metier.model.load import Base
from metier.recipe import Recipe, variant
from metier.recipe.sweep import Range
from metier.training import ranks
from metier.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from metier.training.loop import Report
from metier.training.schedule import peak_learning_rate
from metier.training.search import Search
from metier.training.stop import StopRequest
from metier.training.together import Together
from metier.training.train import write_files
from metier.training.trials import Ground, Member, data_key, label

ENDED = {"complete": "complete", "rung": "stopped", "diverged": "diverged"}


def with_ranges(recipe: Recipe, hidden_size: int) -> Recipe:
    """`recipe` with the ranges that are tried where it names none: two ranks, three learning rates."""
    if recipe.sweep.ranges:
        return recipe
    rate = peak_learning_rate(recipe.train, hidden_size)
    ranges = {"adapter.rank": [8, 32], "train.learning_rate": [float(f"{rate * f:.2g}") for f in (1 / 3, 1, 3)]}
    return recipe.model_copy(update={"sweep": recipe.sweep.model_copy(update={"ranges": ranges})})


def extremes(recipe: Recipe) -> list[Recipe]:
    """Configurations that stand for all: each value of each list, and the ends of each range, one at a time.

    Raises `RecipeError` for a value that its key refuses.
    """
    found = []
    for key, values in recipe.sweep.ranges.items():
        for value in [values.min, values.max] if isinstance(values, Range) else values:
            found.append(variant(recipe, {key: value}))
    return found


@dataclass
class Sweep:
    """A sweep in progress. `place` is this process's number, and how many there are."""

    ground: Ground
    search: Search
    place: tuple[int, int]
    members: list[Member] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    round: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        ground = self.ground
        self.together = Together(ground.base, ground.fused, ground.budget, ground.say)

    def run(self, report: Report, stop: StopRequest) -> bool:
        """Trains until every configuration has ended, or `stop` is asked for; returns whether it was stopped."""
        started, before = time.perf_counter(), self.seconds
        self.ground.base.model.train()
        self._fill()
        while self.running:
            events = self.advance()
            self._apply([event for each in ranks.from_everyone(events) for event in each])
            self._fill()
            self.seconds = before + time.perf_counter() - started
            self._tell(report)
            is_stopping = any(ranks.from_everyone(stop.signal_number is not None))
            if self.round % self.ground.recipe.train.save_every == 0 or is_stopping:
                self.save()
            if is_stopping:
                return True
        return False

    def advance(self) -> list[dict[str, Any]]:
        """One step of every member here; what is to be told of it."""
        events = []
        rates = [member.trainer.learning_rate for member in self.members]
        for member, rate, result in zip(self.members, rates, self.together.round(), strict=True):
            with self.together.alone(member.trainer) if self._validates(member) else contextlib.nullcontext():
                what = member.after(result, learning_rate=rate, validate=member.trainer.validate)
            if what is None:
                continue
            if what != "rung":
                self._keep(member)
            rung = member.rungs.index(member.trainer.progress.step) if what == "rung" else 0
            events.append({"number": member.number, "what": what, "rung": rung, "loss": member.loss,
                           "row": member.row(ENDED[what])})  # fmt: skip
        self.round += 1
        return events

    def _validates(self, member: Member) -> bool:
        step, plan = member.trainer.progress.step + 1, member.trainer.plan
        return step % plan.eval_every == 0 or step == plan.total_steps

    def _apply(self, events: list[dict[str, Any]]) -> None:
        """What every process decides alike, in the order of the configurations' numbers."""
        ended = decide(self.search, self.rows, events, self.ground.say)
        for number in ended:
            del self.running[number]
        for member in [m for m in self.members if m.number in ended]:
            member.metrics.close()
            self.members.remove(member)
        if ended:
            self.together.hold([member.trainer for member in self.members])

    def _fill(self) -> None:
        """Gives free places, of any process, to the configurations that come next."""
        mine, size = self.place
        begun = []
        while len(self.running) < self.ground.at_once * size and (asked := self.search.ask()):
            number, values = asked
            loads = [list(self.running.values()).count(process) for process in range(size)]
            self.running[number] = loads.index(min(loads))
            if self.running[number] == mine:
                begun.append(Member.start(self.ground, number, values, rungs=self.search.rungs))
        if begun:
            self.members += begun
            self.together.hold([member.trainer for member in self.members])

    def _keep(self, member: Member) -> None:
        """Writes the adapter of a configuration that has ended, with what its manifest would say of it."""
        folder, key = self.ground.work / "trials" / f"trial-{member.number:02d}", data_key(member.recipe)
        folder.mkdir(parents=True, exist_ok=True)
        member.trainer.progress.seconds = self.seconds
        facts = write_files(folder, member.trainer, self.ground.renderer, self.ground.labels[key])
        write_json(folder / "facts.json", facts)

    def _tell(self, report: Report) -> None:
        """Steps done of all that there can be; those of a configuration that was given up count as done."""
        known = [*self.rows.values(), *(member.row("running") for member in self.members)]
        losses = [row["val_loss"] for row in known if row["val_loss"] is not None]
        mean = sum(row["total_steps"] for row in known) / max(1, len(known))
        total = round(mean * self.search.num_trials)
        done = round(mean * len(self.rows)) + sum(m.trainer.progress.step for m in self.members) * self.place[1]
        best = {"val_loss": min(losses)} if losses else {}
        report(f"sweep ({len(self.running)} at a time)", total if not self.running else min(done, total - 1), total,
               **best)  # fmt: skip

    def save(self) -> None:
        """A checkpoint of all that this process trains, at one and the same step."""
        tensors: dict[str, torch.Tensor] = {}
        members = []
        for member in self.members:
            own, state = member.state()
            tensors |= {f"{member.number}/{name}": tensor for name, tensor in own.items()}
            members.append(state)
        extra = {"events": self.search.events, "members": members, "rows": [*self.rows.values()],
                 "running": [*self.running.items()], "budget": self.together.budget}  # fmt: skip
        progress = Progress(step=self.round, seconds=self.seconds)
        save_checkpoint(self._checkpoints, progress, tensors or {"none": torch.zeros(1)}, json.loads(json.dumps(extra)))
        ranks.from_everyone(self.round)

    @property
    def _checkpoints(self) -> Path:
        return self.ground.work / f"checkpoints-{self.place[0]}-of-{self.place[1]}"

    def resume(self) -> bool:
        """Goes on from the newest checkpoint that every process has, if there is one."""
        say = self.ground.say
        found = load_checkpoint(self._checkpoints, say)
        last = min(ranks.from_everyone(found[0].step if found else -1))
        found = load_checkpoint(self._checkpoints, say, last=last) if last >= 0 else None
        if not all(ranks.from_everyone(found is not None and found[0].step == last)):
            return False
        assert found is not None
        progress, tensors, extra = found
        self.round, self.seconds = progress.step, progress.seconds
        self.search = Search(self.search.config, self.search.seed, extra["events"])
        self.rows = {row["number"]: row for row in extra["rows"]}
        self.running = dict(extra["running"])
        for state in extra["members"]:
            prefix = f"{state['number']}/"
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.members.append(Member.start(
                self.ground, state["number"], state["values"], rungs=self.search.rungs, found=(state, own)
            ))  # fmt: skip
        self.together.budget = extra["budget"]
        self.together.hold([member.trainer for member in self.members])
        return True


def decide(
    search: Search, rows: dict[int, dict[str, Any]], events: list[dict[str, Any]], say: Callable[[str], None]
) -> set[int]:  # fmt: skip
    """Tells `search` of `events`, in the order of the configurations' numbers; which have ended, now with their rows.

    Those that stand at the same rung in `events` are compared with each other.
    """
    events.sort(key=lambda event: int(event["number"]))
    stopped = set()
    for rung in range(search.num_rungs):
        here = {e["number"]: e["loss"] for e in events if e["what"] == "rung" and e["rung"] == rung}
        stopped |= search.compare(rung, here) if here else set()
    ended = set()
    for event in events:
        number, what, row = event["number"], event["what"], event["row"]
        if what == "rung" and number not in stopped:
            continue
        search.tell(number, row["state"], row["val_loss"])
        rows[number] = row
        ended.add(number)
        loss = "-" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        say(
            f"{label(number, row['values'])}: {row['state']} after {row['steps']} of {row['total_steps']} steps, "
            f"loss on the val split {loss}"
        )
    return ended


def sweep(
    base: Base, recipe: Recipe, *, datasets: Mapping[str, Path], work: Path, report: Report,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Tries the configurations of `recipe.sweep` in the folder `work`; returns their table and how it came about.

    `datasets` are the data sets' folders by `trials.data_key`. Raises `RunError` where no configuration ended with a
    finite loss, `Interrupted` after a signal, with a checkpoint saved, and the errors of training.
    """
    with ranks.alone() as place:
        search, ground = Search(recipe.sweep, recipe.seed), Ground(base, recipe, datasets, work, say)
        ground.open(extremes(recipe), math.ceil(search.num_trials / place[1]))
        ground.at_once = min(ranks.from_everyone(ground.at_once))  # the processes' free memory may differ
        running = Sweep(ground, search, place)
        if running.resume():
            say(f"resuming after round {running.round}; {len(running.rows)} configurations have ended")
        rungs = ", ".join(f"{100 * share:.0f} %" for share in search.rungs)
        most = min(search.num_trials, ground.at_once * place[1])
        say(
            f"{search.num_trials} configurations ({search.method}), {most} at a time"
            + (f", compared after {rungs} of their steps" if rungs else "")
        )
        with StopRequest() as stop:
            is_stopped = running.run(report, stop)
        for member in running.members:
            member.metrics.close()
        if is_stopped:
            number = stop.signal_number or signal.SIGTERM
            raise Interrupted(number, f"stopped after round {running.round}, which is saved; run again to go on")
        running.save()
    return outcome(running.search, running.rows, seed=recipe.seed, seconds=running.seconds)


def outcome(search: Search, found: dict[int, dict[str, Any]], *, seed: int, seconds: float) -> dict[str, Any]:
    """The table, best first, and how it came about. Raises `RunError` where nothing can be chosen."""
    rows = sorted(found.values(), key=lambda row: (row["state"] != "complete", row["val_loss"] is None,
                                                   row["val_loss"] or 0.0, row["number"]))  # fmt: skip
    if not rows or rows[0]["state"] != "complete":
        raise RunError(
            f"none of {len(rows)} configurations ended with a finite loss on the val split",
            hint="lower the learning rates in `sweep.ranges`",
        )
    return {
        "method": search.method, "num_trials": search.num_trials, "halving": search.config.halving,
        "rungs": search.rungs, "winner": rows[0]["number"], "trials": rows, "seed": seed,
        "seconds": round(seconds, 3),
    }  # fmt: skip


def write_table(work: Path, found: dict[str, Any]) -> None:
    """trials.json and trials.csv: one row a configuration, the best first."""
    write_json(work / "trials.json", {key: value for key, value in found.items() if key != "seconds"})
    keys = list(found["trials"][0]["values"])
    rest = [key for key in found["trials"][0] if key != "values"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*rest, *keys])
    for row in found["trials"]:
        writer.writerow([*(row[key] for key in rest), *(json.dumps(row["values"][key]) for key in keys)])
    write_atomic(work / "trials.csv", text.getvalue().encode())


def complete_winner(
    work: Path, found: dict[str, Any], *, recipe: Recipe, dataset: Path, out: Path, key: str
) -> dict[str, Any]:  # fmt: skip
    """Makes the winner's adapter the artifact `out`, as if it had been trained alone; `work` is the sweep's folder."""
    started, row = time.time(), found["trials"][0]
    folder, made = work / "trials" / f"trial-{row['number']:02d}", work_folder(out, key)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    for path in folder.iterdir():
        if path.name != "facts.json":
            write_atomic(made / path.name, path.read_bytes())
    metrics = work / "metrics" / f"trial-{row['number']:02d}.jsonl"
    write_atomic(made / "metrics.jsonl", metrics.read_bytes())
    parent = read_manifest(dataset)
    assert parent is not None
    told = {name: found[name] for name in ("method", "num_trials", "winner")} | {"val_loss": row["val_loss"]}
    return complete(
        made, out, kind="adapter", key=key, started=started,
        parents={"dataset": parent["digest"], "base": facts["base"]["digest"]},
        config={"adapter": recipe.adapter.model_dump(), "train": recipe.train.model_dump()},
        details={**facts, "sweep": told},
    )  # fmt: skip


def complete_sweep(work: Path, found: dict[str, Any], *, recipe: Recipe, out: Path, key: str) -> dict[str, Any]:
    """Makes `work` the artifact `out`: the table and every configuration's metrics, without weights and data."""
    write_table(work, found)
    for path in work.iterdir():
        if path.is_dir() and path.name != "metrics":
            shutil.rmtree(path)
    (work / "generations.json").unlink(missing_ok=True)  # of a sweep on a cluster
    details = {name: value for name, value in found.items() if name != "trials"}
    return complete(
        work, out, kind="sweep", key=key, started=time.time() - found["seconds"], parents={},
        config=recipe.sweep.model_dump(mode="json"), details=details,
    )  # fmt: skip
