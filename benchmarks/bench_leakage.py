"""What leaks: MedQuAD split by rows and by disease joined with near-duplicates; experiments whose labels tell nothing.

    python benchmarks/bench_leakage.py medquad.jsonl

`metier prepare` on recipes/medquad_smollm2-135m_gpu.yaml without augmentation; the figures are those of the leakage
certificate in the data set's manifest. The row split has the same sizes and is drawn by SHA-256(seed | row). The
near-duplicates between the splits are searched a second time, with other hashes than the groups were made with.
The experiments are those of tests/data/test_leakage.py, over fifty seeds: the label has nothing to do with the text, so
that a balanced accuracy other than 0.5 is leaked. One neighbour or logistic regression on TF-IDF of the prompts.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from metier.data.prepare import prepare
from metier.recipe import load_recipe
from tests.data import test_leakage as experiments

ROOT = Path(__file__).parents[1]
SEEDS = range(50)
BY_PATIENT, BY_ROW = {"group_id": "patient"}, {"group_id": "none"}


EXPERIMENTS = (
    "rare labels oversampled, then split; split, then oversampled (1,200 records)",
    "one in two has a near-duplicate; split by row; by groups (1,200 records)",
    "the label is the patient's; split by row; by patient (60 patients, 900 records)",
)


def at_chance() -> str:
    """Rows of a table: what each experiment scores as usually done, and with metier's split."""
    from sklearn.linear_model import LogisticRegression

    models = (experiments.nearest, experiments.nearest, LogisticRegression)
    leaky: list[list[float]] = [[] for _ in EXPERIMENTS]
    ours: list[list[float]] = [[] for _ in EXPERIMENTS]
    for seed in SEEDS:
        noise = experiments.noise(1200, seed, share=0.2)
        near, notes = experiments.with_near_duplicates(seed), experiments.of_patients(seed)
        tables = [_made(noise, balance={"classes": "oversample"}), _made(near), _made(notes, data=BY_PATIENT)]
        for scores, table, model in zip(ours, tables, models, strict=True):
            scores.append(experiments.score(table, model()))
        tables = [
            experiments.oversampled_first(noise),
            _made(near, dedup={"near": "ignore"}),
            _made(notes, data=BY_ROW),
        ]
        for scores, table, model in zip(leaky, tables, models, strict=True):
            scores.append(experiments.score(table, model()))
    found = zip(EXPERIMENTS, leaky, ours, strict=True)
    return "\n".join(f"| {what} | {_mean(usual)} | {_mean(own)} |" for what, usual, own in found)


def _made(rows: list[dict[str, str]], **sections: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return experiments.make(Path(folder), rows, **sections)[1]


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="MedQuAD as JSON Lines: question, answer, focus, qtype")
    arguments = parser.parse_args()
    overrides = [f"data.sources=[{arguments.data.resolve()}]", "augment.methods=[]"]
    recipe = load_recipe(ROOT / "recipes" / "medquad_smollm2-135m_gpu.yaml", overrides)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        manifest = prepare(recipe, out=Path(folder) / "dataset", progress=print)
        cpu = time.process_time() - began
    found = manifest["leakage"]
    rows = "\n".join(
        f"| {what} | {found['if_split_by_row'][kind]} | {found['shared_with_train'][kind]} |"
        for kind, what in (("prompt", "question"), ("group_id", "focus"), ("near_duplicate", "near-duplicate"))
    )
    shown = ", ".join(f"{what} {count:,}" for what, count in manifest["counts"].items())
    splits = ", ".join(f"{name} {count:,}" for name, count in manifest["splits"].items())
    similar = f"Jaccard similarity of 5-character shingles at least {found['threshold']}"
    text = f"""# MedQuAD: what the held-out records share with training

{datetime.date.today()}. `python benchmarks/bench_leakage.py medquad.jsonl`; {platform.system()} {platform.machine()}, \
{os.cpu_count()} cores, Python {platform.python_version()}.
Data: MedQuAD, Ben Abacha and Demner-Fushman 2019, CC BY 4.0.

{shown}; splits: {splits};
{manifest["near_duplicate_pairs"]:,} near-duplicate pairs ({similar},
template text aside).

Of {found["held_out_records"]} held-out records (val and test) so many have their like in train (or in val, for test):

| the same ... | split by row | this split |
|---|---:|---:|
{rows}

A last search with other hashes found {found["found_late"]} more records on the wrong side.
Test records that quote 50 characters in a row of a training record, template text aside, and stay:
{found["test_records_with_a_passage_of_train"]}.
The whole of `prepare` took {cpu:.1f} CPU seconds.

# Where labels tell nothing

Balanced accuracy on test, mean and standard error over {len(SEEDS)} seeds; chance is 0.50.

| experiment | as usually done | metier |
|---|---:|---:|
{at_chance()}
"""
    print(text)
    out = ROOT / "benchmarks" / "results" / f"leakage_cpu{os.cpu_count()}_{datetime.date.today():%Y%m}.md"
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
