"""MedQuAD: what a split by rows leaks, and what a split by disease joined with near-duplicates does.

    python benchmarks/bench_leakage.py medquad.jsonl

`metier prepare` on recipes/medquad_smollm2-135m_gpu.yaml without augmentation; the figures are those of the leakage
certificate in the data set's manifest. The row split has the same sizes and is drawn by SHA-256(seed | row). The
near-duplicates between the splits are searched a second time, with other hashes than the groups were made with.
The five leakage experiments (labels without information must score at chance) are tests: tests/data/test_leakage.py.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
import time
from pathlib import Path

from metier.data.prepare import prepare
from metier.recipe import load_recipe

ROOT = Path(__file__).parents[1]


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
"""
    print(text)
    out = ROOT / "benchmarks" / "results" / f"leakage_cpu{os.cpu_count()}_{datetime.date.today():%Y%m}.md"
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
