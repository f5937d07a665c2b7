"""`metier prepare` on mixed records, all steps: seconds, memory, the same bytes whoever works and whatever stops it.

    python benchmarks/bench_prepare.py --records 100000 --workers 1 2 [--kills 20]
    python benchmarks/bench_prepare.py --jsonl 200 1000 --chars 912 --workers 2

Records: half English (60 words from the bundled ICD-10-CM terms), half Chinese (106 characters from the bundled
articles of law), in a CSV and a JSONL file, with a label, a person and 5 % near-duplicates; 1 % of the rows are broken,
1 % are exact copies, and one in ten names a person with a telephone number. Every step is on: cleaning,
de-identification by rules (hipaa-safe-harbor), copies, near-duplicates, groups by person, stratified split,
oversampling, variants of two methods, domain terms, certificate. Each measurement is a run of the command line; MB is
the largest sum over its processes, shared pages counted once (PSS).

`--jsonl MB`: one JSON Lines file of so many MB (`--chars` English characters a record), read alone in a process that
keeps nothing, and prepared whole with cleaning, duplicates and certificate, without de-identification.
"""

from __future__ import annotations

import argparse
import contextlib
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
FILES = (
    "records.parquet", "rejected.parquet", "merged.parquet", "conflicts.parquet", "subjects.parquet", "DATA_CARD.md",
    "croissant.json", "privacy_review.jsonl",
)  # fmt: skip
FIRST = ["James", "Mary", "Robert", "Linda", "Ahmed", "Wei"]
LAST = ["Smith", "Johnson", "Garcia", "Brown", "Davis", "Miller"]
SURNAMES, GIVEN = "王李张刘陈杨", "伟芳娜敏静磊军洋勇艳杰娟"


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
                digits = f"{rng.randrange(10**8):08d}"
                if position % 10 == 3 and language == "en":
                    text += (
                        f". Seen by {rng.choice(FIRST)} {rng.choice(LAST)}; phone (415) 5{digits[:2]}-{digits[2:6]}."
                    )
                elif position % 10 == 3:
                    text += f"。患者{rng.choice(SURNAMES)}{''.join(rng.choices(GIVEN, k=2))},电话138{digits}。"
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


READ = """
import sys
from metier.recipe import DataConfig
from metier.data.sources import find_sources, read_columns, read_rows
source = find_sources(DataConfig(sources=[sys.argv[1]]))[0]
read_columns(source)
print(sum(1 for _ in read_rows(source)))
"""


def write_jsonl(folder: Path, size: int, chars: int) -> Path:
    """A file of `size` bytes and its recipe."""
    rng, stock, written = random.Random(0), bench_dedup.words_of("en"), 0
    with (folder / "long.jsonl").open("w", encoding="utf-8") as file:
        while written < size:
            text = " ".join(rng.choices(stock, k=300))[:chars]
            row = {"question": text, "answer": " ".join(rng.choices(stock, k=4)), "case": f"c{rng.randrange(10**6)}"}
            written += file.write(json.dumps(row) + "\n")
    recipe = folder / "jsonl.yaml"
    recipe.write_text(
        "base: none\nout: run\ndata: {sources: [long.jsonl], prompt: question, answer: answer, group_id: case}\n"
        "privacy: {policy: none}\n"
    )
    return recipe


def stream(folder: Path, megabytes: int, chars: int, workers: int) -> None:
    """Prints what reading the file alone, and preparing it, costs."""
    recipe = write_jsonl(folder, megabytes * 10**6, chars)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    read = [sys.executable, "-c", READ, str(folder / "long.jsonl")]
    for what, begin in (
        ("columns and rows read, nothing kept", lambda: subprocess.Popen(read, env=environment)),
        (f"`metier prepare`, {workers} workers", lambda: start(recipe, folder / "run", workers)),
    ):
        wall, cpu, peak = watched(begin(), recipe)
        print(f"| {what} | {megabytes:,} | {wall:.1f} | {cpu:.1f} | {peak:.0f} |", flush=True)


def start(recipe: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """`metier prepare` with so many workers; numpy and polars use one thread each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "POLARS_MAX_THREADS": str(workers), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from metier.cli import main; main()", "prepare", str(recipe), "--out", str(out)]
    command += ["--set", f"scale.workers={workers}"]
    log = recipe.with_suffix(".log").open("ab")
    with log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def tree(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def megabytes(pid: int) -> float:
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 1024


def measured(recipe: Path, out: Path, workers: int) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds of all processes, peak MB of all together) of one whole run."""
    return watched(start(recipe, out, workers), recipe)


def watched(process: subprocess.Popen[bytes], recipe: Path) -> tuple[float, float, float]:
    """The same of a process that has just begun; `recipe` has its log beside it."""
    began = time.perf_counter()
    before = os.times()
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, megabytes(process.pid))
        time.sleep(0.25)
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(recipe.with_suffix(".log").read_text())
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return wall, used, peak


def digests(out: Path) -> list[str]:
    sys.path.insert(0, str(ROOT))
    from metier.artifacts import digest_file

    return [digest_file(out / "dataset" / name) for name in FILES]


def kill(recipe: Path, folder: Path, kills: int, wall: float, workers: int) -> tuple[int, int]:
    """(runs that ended with the reference's bytes, processes that outlived a kill) of runs killed at moments by lot."""
    rng, equal, left = random.Random(1), 0, 0
    for number in range(kills):
        process = start(recipe, folder / f"killed{number}", workers)
        # Half of them in the last third, where the result is written.
        time.sleep(wall * (rng.random() if number % 2 else rng.uniform(0.66, 1)))
        below = tree(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(2)
        left += sum(Path(f"/proc/{pid}").exists() for pid in below)
        measured(recipe, folder / f"killed{number}", workers)
        equal += digests(folder / f"killed{number}") == digests(folder / f"run{workers}")
        print(f"kill {number + 1}: {equal} equal, {left} left", flush=True)
    return equal, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--jsonl", type=int, nargs="+", default=[], metavar="MB")
    parser.add_argument("--chars", type=int, default=2000)
    arguments = parser.parse_args()
    if arguments.jsonl:
        print("| | MB of the file | wall s | CPU s | peak MB |\n|---|---:|---:|---:|---:|", flush=True)
    for size in arguments.jsonl:
        with tempfile.TemporaryDirectory() as temporary:
            stream(Path(temporary), size, arguments.chars, arguments.workers[-1])
    if arguments.jsonl:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = write_sources(folder, arguments.records)
        rows, made = [], {}
        for workers in arguments.workers:
            out = folder / f"run{workers}"
            wall, cpu, peak = measured(recipe, out, workers)
            made[workers] = digests(out)
            rows.append(f"| {arguments.records:,} | {workers} | {wall:.1f} | {cpu:.1f} | {peak:.0f} |")
            print(rows[-1], flush=True)
        manifest = json.loads((out / "dataset" / "manifest.json").read_text(encoding="utf-8"))
        is_same = len({tuple(found) for found in made.values()}) == 1
        if arguments.kills:
            equal, left = kill(recipe, folder, arguments.kills, wall, arguments.workers[-1])
    print(
        f"\n{datetime.date.today()}. `python benchmarks/bench_prepare.py {' '.join(sys.argv[1:])}`; "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.\n\n"
        "| records | workers | wall s | CPU s | peak MB |\n|---:|---:|---:|---:|---:|\n" + "\n".join(rows)
    )
    print(f"\n- The same bytes of {', '.join(FILES)} with {arguments.workers} workers: {'yes' if is_same else 'NO'}.")
    if arguments.kills:
        print(
            f"- Killed (SIGKILL) at {arguments.kills} moments and started again: {equal} with the same bytes; {left} "
            "worker processes outlived their parent by 2 s."
        )
    print(f"- {manifest['counts']}; {manifest['privacy']['records_touched']:,} records held identifiers")
    print(f"- Leakage certificate: {manifest['leakage']['shared_with_train']}")


if __name__ == "__main__":
    main()
