"""The evaluation stage: dataset + adapter + base -> evidence.

In: RUN/dataset and RUN/adapter, and the loaded model, base and adapter in one. Out: RUN/evidence with
evidence.json (verdict, metrics, controls, slices, costs, limits), items.parquet (every answer to a test
record) and probes.parquet (every answer to what else was asked). Both models answer the same; what is
compared is paired (compare.py). A killed evaluation goes on where it was.

The same inputs give the same bytes: no times of this stage are written here, and floats are rounded to 12 digits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import artifacts
from metier.errors import RecipeError, RunError
from metier.evaluation.ask import (
    AnswerCache,
    Progress,
    Questions,
    ask,
    ask_records,
    examples,
    leave_out,
    longest_answer,
)
from metier.evaluation.contenders import Contender, ask_contenders, num_seen
from metier.evaluation.extraction import SEARCHED, ask_removed, read_removed, still_holding
from metier.evaluation.items import Item, choose_items, draw, items_table, read_items
from metier.evaluation.judge import CANDIDATES, Asked, judge
from metier.evaluation.own_probes import COPY, read_own
from metier.evaluation.probes import ask_probes, load_probes
from metier.evaluation.tasks import CHOOSING, choose_tasks
from metier.recipe import EvaluateConfig

if TYPE_CHECKING:
    from metier.model.specialist import Specialist

# Not part of the result: what was answered so far, kept for a later evaluation of the same adapter.
ANSWERS = "checkpoints/answers.jsonl"


def evaluate(
    specialist: Specialist, *, dataset: Path, adapter: Path, config: EvaluateConfig, seed: int, out: Path, key: str,
    progress: Progress, contenders: Sequence[Contender] = (),
) -> dict[str, Any]:  # fmt: skip
    """Compares base and adapter on the test split and writes the artifact `out`; returns its manifest.

    `contenders` are other models to ask the same: the full fine-tuning, an earlier adapter.
    `progress(what, done, total)` is called as the work goes on. Raises `RunError` when a parent artifact
    is missing or the disk is full, `DataError` without test records, `RecipeError` for a task or a gate that
    the dataset cannot be asked and `ModelError` when a model gives no finite likelihoods.
    """
    started = time.time()
    data, training = _manifest(dataset, "dataset"), _manifest(adapter, "adapter")
    _refuse_gates_without_measure(config, dataset)
    own = read_own(Path(config.own_probes)) if config.own_probes else []
    removed = read_removed(dataset, needed="extracted" in config.gates)
    chosen = choose_items(read_items(dataset, "test"), max_items=config.max_items, seed=seed)
    train = read_items(dataset, "train")
    tasks = choose_tasks(config, data, chosen)
    max_new_tokens = longest_answer(specialist, chosen, config.max_new_tokens) if tasks != ["perplexity"] else 0
    items, left_out = leave_out(specialist, chosen, max_new_tokens)
    turns = (
        examples(specialist, train, items, count=config.few_shot, seed=seed, max_new_tokens=max_new_tokens)
        if config.few_shot and max_new_tokens
        else []
    )
    questions = Questions(
        labels=list(data["labels"]) if any(t in CHOOSING for t in tasks) else [],
        max_new_tokens=max_new_tokens,
        by_options="multiple_choice" in tasks,
        few_shot=turns,
    )
    work = artifacts.work_folder(out, key)
    _carry_answers(out, work, training["digest"])
    cache = AnswerCache(work / ANSWERS, model=[str(specialist.base.device), str(specialist.base.dtype)])
    sides, few_shot = ask(specialist, items, questions, cache=cache, progress=progress)
    rows = ask_probes(specialist, [*(load_probes() if config.forgetting else []), *own], cache, progress)
    rows += _members(specialist, draw(train, config.memorisation_items, seed), cache, progress)
    rows += _canaries(specialist, dataset, progress)
    if removed:
        holding = still_holding(draw(train, SEARCHED, seed), removed)
        rows += [{"kind": "holding", "probe_id": i.record_id, "language": i.language, "part": 0} for i in holding]
        touched = [i for i in train if i.record_id in removed.by_record and i not in holding]
        count = config.memorisation_items
        first = holding[: max(count // 2, count - len(touched))]
        begun = [*first, *draw(touched, count - len(first), seed)]
        rows += ask_removed(specialist, begun, removed, cache, progress)
    others = ask_contenders(contenders, items, replace(questions, few_shot=[]), cache, progress)
    _write(work / "items.parquet", items_table(items, sides | others, few_shot))
    if own:
        with artifacts.disk_errors(work):
            artifacts.write_atomic(work / COPY, Path(str(config.own_probes)).read_bytes())
    _write(work / "probes.parquet", probes_table(rows))
    progress("intervals", 0, 1)
    table, probes = read_tables(work)
    seen = {one.name: num_seen(one, items) for one in contenders if one.name == "earlier"}
    evidence = judge(
        dataset=dataset, data=data, training=training, table=table, probes=probes, own=own,
        full=next((one.manifest for one in contenders if one.name == "full"), None),
        asked=Asked(tasks, max_new_tokens, left_out, sum(m["role"] == "user" for m in turns), seen), config=config,
        seed=seed,
    )  # fmt: skip
    artifacts.write_json(work / "evidence.json", evidence)
    progress("intervals", 1, 1)
    return artifacts.complete(
        work, out, kind="evidence", key=key, config=config.model_dump(mode="json"),
        parents={"dataset": data["digest"], "adapter": training["digest"], **{c.name: c.digest for c in contenders}},
        started=started,
        details={"seed": seed, "n": len(items), "verdict": evidence["verdict"]},
    )  # fmt: skip


def probes_table(rows: list[dict[str, Any]]) -> Any:
    """The rows of probes.parquet, a polars DataFrame; what a kind does not have is null."""
    import polars as pl

    schema: dict[str, Any] = {"kind": pl.String, "probe_id": pl.String, "language": pl.String, "part": pl.Int64}
    schema |= {"num_tokens": pl.Int64, "num_bytes": pl.Int64, "repeats": pl.Int64}
    for side in ("base", "adapter"):
        schema |= {f"{side}_nll": pl.Float64, f"{side}_rank": pl.Int64}
        schema |= {f"{side}_completion": pl.String, f"{side}_stopped": pl.Boolean}
        schema |= {f"{side}_found": pl.List(pl.String)}
    return pl.DataFrame([{name: row.get(name) for name in schema} for row in rows], schema=schema)


def read_tables(folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """items.parquet as a DataFrame, and the rows of probes.parquet."""
    import polars as pl

    return pl.read_parquet(folder / "items.parquet"), pl.read_parquet(folder / "probes.parquet").to_dicts()


def _members(
    specialist: Specialist, chosen: list[Item], cache: AnswerCache, progress: Progress
) -> list[dict[str, Any]]:
    """How likely each of `chosen`, records that were trained on, is to base and adapter."""
    fitting = [i for i in chosen if not specialist.why_not(i.messages, 0)]
    if not fitting:
        return []
    what = "likelihood of training records"
    scores = ask_records(specialist, [i.messages for i in fitting], cache=cache, progress=progress, what=what)
    return [
        {
            "kind": "member", "probe_id": item.record_id, "language": item.language, "part": 0,
            "num_tokens": int(scores["base"][i][1]), "num_bytes": int(scores["base"][i][2]),
            "base_nll": scores["base"][i][0], "adapter_nll": scores["adapter"][i][0],
        }
        for i, item in enumerate(fitting)
    ]  # fmt: skip


def _canaries(specialist: Specialist, dataset: Path, progress: Progress) -> list[dict[str, Any]]:
    """The rank of each planted secret among all that it could have been, 1 the likeliest."""
    import polars as pl

    path = dataset / "canaries.parquet"
    if not path.exists():
        return []
    planted = pl.read_parquet(path).to_dicts()
    candidates = [f"{n:03d}" for n in range(CANDIDATES)]
    rows: list[dict[str, Any]] = [
        {"kind": "canary", "probe_id": c["canary_id"], "part": 0, "repeats": c["repeats"]} for c in planted
    ]
    for side in ("base", "adapter"):
        scores = specialist.score_choices(
            [c["prompt"] for c in planted], candidates, use_adapter=side == "adapter",
            done=lambda done: progress("canaries", done, len(planted)),
        )  # fmt: skip
        for row, canary, values in zip(rows, planted, scores, strict=True):
            row[f"{side}_rank"] = 1 + int((values > values[int(canary["secret"])]).sum())
    return rows


def _refuse_gates_without_measure(config: EvaluateConfig, dataset: Path) -> None:
    if "exposure_bits" in config.gates and not (dataset / "canaries.parquet").exists():
        raise RecipeError(
            "`evaluate.gates` limits exposure_bits, and no canary was planted in the training records",
            hint="set `data.canaries: 8`, so that there is something to measure",
        )
    if "membership_auc" in config.gates and not config.memorisation_items:
        raise RecipeError("`evaluate.gates` limits membership_auc, and `evaluate.memorisation_items` is 0")
    if "extracted" in config.gates and not config.memorisation_items:
        raise RecipeError("`evaluate.gates` limits extracted, and `evaluate.memorisation_items` is 0")
    if "forgetting" in config.gates and not config.forgetting:
        raise RecipeError("`evaluate.gates` limits forgetting, and `evaluate.forgetting` is false")


def _carry_answers(out: Path, work: Path, adapter: str) -> None:
    """Takes over what the same adapter answered in an earlier evaluation with other settings."""
    earlier = artifacts.read_manifest(out)
    if earlier and earlier["parents"].get("adapter") == adapter and not (work / ANSWERS).exists():
        with artifacts.disk_errors(work), contextlib.suppress(FileNotFoundError):
            data = (out / ANSWERS).read_bytes()
            (work / ANSWERS).parent.mkdir(exist_ok=True)
            artifacts.write_atomic(work / ANSWERS, data)


def _write(path: Path, table: Any) -> None:
    with artifacts.disk_errors(path):
        table.write_parquet(path)


def _manifest(folder: Path, kind: str) -> dict[str, Any]:
    manifest = artifacts.read_manifest(folder)
    if manifest is None or manifest.get("kind") != kind:
        stage = {"dataset": "prepare", "adapter": "train"}[kind]
        raise RunError(f"there is no complete {kind} at `{folder}`", hint=f"`metier {stage}` makes it")
    return manifest
