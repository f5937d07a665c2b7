"""`metier prepare` on mixed records: seconds, memory, and the same bytes whatever stops it and however it is started.

    python benchmarks/bench_prepare.py --records 100000 [--kills 5]

Records: half English (60 words from the bundled ICD-10-CM terms), half Chinese (106 characters from the bundled
articles of law), in a CSV and a JSONL file, with a label, a person and 5 % near-duplicates; 1 % of the rows are broken
and 1 % are exact copies. Every step is on: near-duplicates, groups by person, stratified split, oversampling, variants
of two methods, domain terms, certificate. Each measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_dedup

ROOT = Path(__file__).parents[1]
FILES = ("records.parquet", "rejected.parquet", "merged.parquet", "conflicts.parquet", "DATA_CARD.md", "croissant.json")


def write_sources(folder: Path, number: int) -> Path:
    """The two files and the recipe."""
    rng = random.Random(0)
    for language, name in (("en", "en.csv"), ("zh", "zh.jsonl")):
        texts, _ = bench_dedup.corpus(f"{language} clean", number // 2)
        with (folder / name).open("w", encoding="utf-8") as file:
            if name.endswith(".csv"):
                file.write("text,label,person\n")
            for position, text in enumerate(texts):
                label, person = f"label {rng.choice('aaaaabbbc')}", f"p{rng.randrange(number // 4)}"
                is_broken, is_copied = position % 100 == 7, position % 100 == 31
                if name.endswith(".csv"):
                    line = f'"{text}",{label},{person}' if not is_broken else f'"{text}",{label}'
                else:
                    line = json.dumps({"text": text, "label": "" if is_broken else label, "person": person})
                file.write((line + "\n") * (2 if is_copied else 1))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "base: none\nout: run\ndomain: medicine\n"
        "data: {sources: [en.csv, zh.jsonl], prompt: text, answer: label, group_id: person, task: classification}\n"
        "balance: {classes: oversample}\naugment: {methods: [instruction, typo]}\n"
    )
    return recipe


def start(recipe: Path, out: Path, threads: int) -> subprocess.Popen[bytes]:
    """`metier prepare`, with so many threads for polars and numpy."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": str(threads)}
    environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-c", "from metier.cli import main; main()", "prepare", str(recipe), "--out", str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measured(recipe: Path, out: Path, threads: int) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB) of one whole run."""
    began = time.perf_counter()
    process = start(recipe, out, threads)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("metier prepare failed")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def digests(out: Path) -> list[str]:
    sys.path.insert(0, str(ROOT))
    from metier.artifacts import digest_file

    return [digest_file(out / "dataset" / name) for name in FILES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        recipe = write_sources(here, arguments.records)
        rows = []
        for threads in (1, 2):
            wall, cpu, peak = measured(recipe, here / f"run{threads}", threads)
            rows.append(f"| {arguments.records:,} | {threads} | {wall:.1f} | {cpu:.1f} | {peak:.0f} |")
            print(rows[-1], flush=True)
        same = digests(here / "run1") == digests(here / "run2")
        equal = 0
        for kill in range(arguments.kills):
            process = start(recipe, here / f"killed{kill}", 2)
            time.sleep(wall * (kill + 1) / (arguments.kills + 1))
            process.send_signal(signal.SIGKILL)
            process.wait()
            measured(recipe, here / f"killed{kill}", 2)
            equal += digests(here / f"killed{kill}") == digests(here / "run1")
        counts = json.loads((here / "run1" / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    table = "\n".join(rows)
    lines = f"""# `metier prepare` on {arguments.records:,} mixed records

{datetime.date.today()}. `python benchmarks/bench_prepare.py --records {arguments.records} --kills {arguments.kills}`; \
{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.
Other jobs shared the cores: the CPU seconds are the number to compare.

{__doc__.split(chr(10) * 2, 2)[2].strip()}

| records | threads | wall s | CPU s | peak MB |
|---:|---:|---:|---:|---:|
{table}

Target: 100,000 records in at most 60 s wall on 2 cores and 1.5 GB.

- The same bytes of {", ".join(FILES)} with one thread and with two: {"yes" if same else "NO"}.
- Killed (SIGKILL) at {arguments.kills} moments and started again: {equal} of {arguments.kills} with the same bytes.
- {counts["counts"]}
- Leakage certificate: {counts["leakage"]["shared_with_train"]}; split by row: {counts["leakage"]["if_split_by_row"]}.
- Cleaning and de-identification are not part of this measurement.
"""
    print(lines)
    out = ROOT / "benchmarks" / "results" / f"prepare_cpu{os.cpu_count()}_{datetime.date.today():%Y%m}.md"
    out.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
