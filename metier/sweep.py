"""A sweep on one page: data sets -> configurations side by side -> the best one's run, as if it had been trained alone.

The best is chosen on the validation split; the test split is asked once, of the best alone.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from metier import pipeline
from metier.artifacts import append_audit, audit_artifacts, digest_json, is_current, lock_run, work_folder
from metier.errors import RecipeError
from metier.pipeline import NO_EFFECT, Silent, Ui, adapter_key, base_of, is_follower, num_processes
from metier.recipe import Recipe, variant


def sweep(recipe: Recipe, ui: Ui | None = None) -> Path:
    """Tries the configurations of `recipe.sweep`, makes the run of the best one, and returns the report's path.

    Raises the errors of `metier.errors`; called again after a kill, it goes on and ends with the same table.
    """
    from metier.model.load import read_config
    from metier.model.resolve import resolve_base
    from metier.training.sweep import with_ranges

    out, ui = Path(recipe.out), ui or Silent()
    if is_follower():
        _follow(recipe)
        return out / "report.html"
    path = resolve_base(recipe.base, recipe.revision, progress=ui.say)
    recipe = with_ranges(recipe, read_config(str(path)).get_text_config().hidden_size)
    recipes = _data_recipes(recipe)
    if len(recipes) == 1:
        pipeline.prepare(recipe, ui)
    with lock_run(out):
        key = _key(recipe, recipes, path)
        best = _made(recipe, out, key)
        if best is not None:
            ui.say("sweep: up to date")
        datasets, work, found = (None, None, None) if best else _try(recipe, recipes, out, key=key, ui=ui)
        if num_processes() > 1 and best:
            _tell_followers(recipe, None)
    if found is not None and work is not None and datasets is not None:
        best = variant(recipe, found["trials"][0]["values"])
        pipeline.prepare(best, ui)
        with lock_run(out):
            _complete(recipe, best, found, work=work, key=key, ui=ui)
            for folder in set(datasets.values()) - {out / "dataset"}:
                shutil.rmtree(folder)
    assert best is not None
    pipeline.evaluate(best, ui)
    return out / "report.html"


def _made(recipe: Recipe, out: Path, key: str) -> Recipe | None:
    """The best configuration's recipe, where this sweep was completed already and its adapter is there."""
    if not is_current(out / "sweep", key) or not (out / "adapter" / "manifest.json").exists():
        return None
    found = json.loads((out / "sweep" / "trials.json").read_text(encoding="utf-8"))
    return variant(recipe, found["trials"][0]["values"])


def _key(recipe: Recipe, recipes: dict[str, Recipe], path: Path) -> str:
    """What the sweep is made of: sources and their treatment, base, seed, ranges, and what is not varied."""
    from metier.data.prepare import dataset_key
    from metier.model.resolve import base_digest
    from metier.training.sweep import extremes

    extremes(recipe)  # refuses what cannot be tried, before anything is done
    swept = {key.partition(".")[2] for key in recipe.sweep.ranges}
    return digest_json(
        {
            "stage": "sweep", "data": [dataset_key(each, Path(recipe.out) / "dataset")[0] for each in recipes.values()],
            "base": base_digest(path), "seed": recipe.seed,
            "sweep": recipe.sweep.model_dump(mode="json", exclude={"at_once"}),
            "adapter": recipe.adapter.model_dump(exclude=swept),
            "train": recipe.train.model_dump(exclude={*NO_EFFECT, *swept}),
        }
    )  # fmt: skip


def _try(
    recipe: Recipe, recipes: dict[str, Recipe], out: Path, *, key: str, ui: Ui
) -> tuple[dict[str, Path], Path, dict[str, Any]]:  # fmt: skip
    """Trains the configurations; their data sets, the work folder, and the outcome."""
    from metier.training.sweep import sweep as sweep_stage

    datasets = _datasets(recipes, out, ui)
    for dataset in datasets.values():
        pipeline.check_test_split(dataset)
    work = work_folder(out / "sweep", key)
    if recipe.scale.ray:
        return datasets, work, _on_ray(recipe, datasets, work, ui)
    _tell_followers(recipe, (recipe, datasets, work))
    found = sweep_stage(base_of(recipe, ui), recipe, datasets=datasets, work=work, report=ui.progress, say=ui.say)
    if num_processes() > 1:
        from metier.training import ranks

        ranks.stop()
    return datasets, work, found


def _on_ray(recipe: Recipe, datasets: dict[str, Path], work: Path, ui: Ui) -> dict[str, Any]:
    """Trains the configurations on the cluster of `scale.ray`, whose machines load the base themselves."""
    from metier.training.tune import sweep_on_ray

    if num_processes() > 1:
        raise RecipeError("a sweep is spread by torchrun or by `scale.ray`, not by both", hint="leave one of them out")
    if Path(recipe.base).exists():  # workers have a folder of their own
        recipe = recipe.model_copy(update={"base": str(Path(recipe.base).absolute())})
    found = {key: folder.absolute() for key, folder in datasets.items()}
    load = partial(base_of, recipe, Silent())
    return sweep_on_ray(load, recipe, datasets=found, work=work, report=ui.progress, say=ui.say)


def _complete(recipe: Recipe, best: Recipe, found: dict[str, Any], *, work: Path, key: str, ui: Ui) -> None:
    """Makes the best configuration's adapter the run's, and the sweep an artifact beside it."""
    from metier.training.sweep import complete_sweep, complete_winner

    out = Path(recipe.out)
    own_key = adapter_key(best, out, ui)
    complete_winner(work, found, recipe=best, dataset=out / "dataset", out=out / "adapter", key=own_key)
    audit_artifacts(out)
    manifest = complete_sweep(work, found, recipe=recipe, out=out / "sweep", key=key)
    append_audit(out, "sweep", digest=manifest["digest"], key=key)


def _data_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes whose data sets differ, by `trials.data_key`."""
    from metier.recipe.sweep import Range
    from metier.training.search import grid_of
    from metier.training.trials import data_key

    ranges = {key: values for key, values in recipe.sweep.ranges.items() if key.startswith("balance.")}
    for key, values in ranges.items():
        if isinstance(values, Range):
            raise RecipeError(f"`sweep.ranges`: `{key}` has min and max, and each data mix is a data set of its own",
                              hint=f"list the values to try: `{key}: [0.05, 0.2]`")  # fmt: skip
    if not ranges:
        return {data_key(recipe): recipe}
    some = recipe.sweep.model_copy(update={"ranges": ranges})
    return {data_key(each): each for each in (variant(recipe, values) for values in grid_of(some))}


def _datasets(recipes: dict[str, Recipe], out: Path, ui: Ui) -> dict[str, Path]:
    """A data set for each data mix that is tried; one alone is the run's own."""
    from metier.data.prepare import dataset_key, prepare

    if len(recipes) == 1:
        return dict.fromkeys(recipes, out / "dataset")
    folders = {}
    for key, recipe in recipes.items():
        # In the run's folder, where what was forgotten is known.
        folders[key] = out / f".sweep-{digest_json(key)[:8]}.partial"
        asked = dataset_key(recipe, out / "dataset")
        if not is_current(folders[key], asked[0]):
            prepare(recipe, out=folders[key], progress=ui.say, asked=asked)
    return folders


def _tell_followers(recipe: Recipe, told: Any) -> None:
    """Under torchrun: what the other processes train along; None when there is nothing to do."""
    if num_processes() == 1:
        return
    from metier.training import ranks

    ranks.start(recipe.train.device)
    ranks.from_first(told)
    if told is None:
        ranks.stop()


def _follow(recipe: Recipe) -> None:
    """Waits for the first process's word, and trains its part of the configurations, if there are any."""
    from metier.training import ranks
    from metier.training.sweep import sweep as sweep_stage

    ranks.start(recipe.train.device)
    told = ranks.from_first(None)
    if told is not None:
        recipe, datasets, work = told
        silent = Silent()
        sweep_stage(base_of(recipe, silent), recipe, datasets=datasets, work=work, report=silent.progress,
                    say=silent.say)  # fmt: skip
    ranks.stop()
