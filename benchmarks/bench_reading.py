"""What the readers make of encodings and hostile files, and what large files cost them; beside other readers.

    python benchmarks/bench_reading.py [--megabytes 300] [--out benchmarks/results/reading_cpu2_202611.md]

Encodings: 1,000 seeded files a seed (tests/data/encoding_cases.py), seeds that no rule was fitted to; Traditional text
comes from OpenCC. Hostile kinds: tests/data/hostile_cases.py; *right* is the exact rows as text, *WRONG* other rows
without an error. Memory: the peak of a process that does nothing but read; files are made in a temporary folder.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from metier.data.encodings import detect_encoding, sample_lines
from metier.data.sources import find_sources, read_columns, read_rows
from metier.errors import DataError
from metier.recipe import DataConfig
from tests.data import encoding_cases, hostile_cases

HEAD = "| {} |\n|---|{}"
MEASURED = HEAD.format("file | MB | CPU-s, columns and rows | rows/CPU-s | peak MB", "---:|" * 4)
READ = """
import sys, time
from metier.recipe import DataConfig
from metier.data.sources import find_sources, read_columns, read_rows
start = time.process_time()
sources = find_sources(DataConfig(sources=[sys.argv[1]]))
read_columns(sources[0])
rows = sum(1 for source in sources for row in read_rows(source) if not row.problem)
seconds = time.process_time() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(rows, seconds, int(peak) / 1024)
"""


def encodings(seeds: list[int]) -> str:
    """One row a kind: how many files were right, a sentence, wrong; charset-normalizer beside it."""
    from charset_normalizer import from_bytes
    from opencc import OpenCC

    encoding_cases.traditional = OpenCC("s2t").convert
    ours: dict[str, Counter[str]] = {}
    other: dict[str, Counter[str]] = {}
    seconds = [0.0, 0.0]
    for case in (case for seed in seeds for case in encoding_cases.cases(1000, seed)):
        kind = f"{case.language}, {case.encoding}"
        wanted = case.text.removeprefix("\ufeff")
        start = time.process_time()
        try:
            found = detect_encoding(case.raw[:65536], sample_lines([case.raw], 65536), Path("a.csv"))
            outcome = "right" if case.raw[found.mark :].decode(found.codec, "replace") == wanted else "WRONG"
        except DataError:
            outcome = "sentence"
        seconds[0] += time.process_time() - start
        ours.setdefault(kind, Counter())[outcome] += 1
        start = time.process_time()
        best = from_bytes(case.raw).best()
        seconds[1] += time.process_time() - start
        text = "" if best is None else str(best).removeprefix("\ufeff")
        other.setdefault(kind, Counter())["right" if text == wanted else "WRONG" if best else "sentence"] += 1
    lines = [HEAD.format("text, encoding | right | a sentence | WRONG | charset-normalizer right | WRONG", "---:|" * 5)]
    lines += [_encoding_row(kind, ours[kind], other[kind]) for kind in ours]
    total, rival = sum(ours.values(), Counter()), sum(other.values(), Counter())
    n = total.total()
    lines.append(_encoding_row(f"**all {n}**", total, rival))
    lines.append(
        f"\nmetier {total['right'] / n:.2%} right, {seconds[0]:.1f} CPU-s; "
        f"charset-normalizer {rival['right'] / n:.2%}, {seconds[1]:.1f} CPU-s."
    )
    return "\n".join(lines)


def _encoding_row(name: str, ours: Counter[str], other: Counter[str]) -> str:
    mine = f"{ours['right']} | {ours['sentence']} | {ours['WRONG']}"
    return f"| {name} | {mine} | {other['right']} | {other['WRONG']} |"


def hostile() -> str:
    """One row a kind and reader."""
    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "metier": _metier, "pandas": _pandas, "polars": _polars, "stdlib": _stdlib,
    }  # fmt: skip
    lines = [HEAD.format(" | ".join(["file", *readers]), "---|" * len(readers))]
    totals = {name: Counter[str]() for name in readers}
    for case in hostile_cases.CSV + hostile_cases.JSON:
        outcomes = [_outcome(case, reader) for reader in readers.values()]
        for name, outcome in zip(readers, outcomes, strict=True):
            totals[name][outcome] += 1
        lines.append(f"| {case.name.rpartition('.')[2]}: {case.kind} | {' | '.join(outcomes)} |")
    sums = [f"{t['right']} right, {t['sentence']} sentence or error, {t['WRONG']} WRONG" for t in totals.values()]
    lines.append(f"| **all {totals['metier'].total()}** | {' | '.join(sums)} |")
    return "\n".join(lines)


def _outcome(case: hostile_cases.Hostile, reader: Callable[[Path], list[dict[str, Any]]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        path.write_bytes(case.raw)
        try:
            rows = reader(path)
        except Exception:  # other readers raise whatever they like
            return "sentence"
        return "right" if not case.sentence and rows == case.rows else "WRONG"


def _metier(path: Path) -> list[dict[str, Any]]:
    (source,) = find_sources(DataConfig(sources=[str(path)]))
    read_columns(source)
    return [row.fields for row in read_rows(source) if row.problem is None]


def _pandas(path: Path) -> list[dict[str, Any]]:
    import pandas

    if path.suffix in (".json", ".jsonl"):
        table = pandas.read_json(path, lines=path.suffix == ".jsonl", dtype=False)
    else:
        table = pandas.read_csv(path, sep=None, engine="python", dtype=str, keep_default_na=False)
    return table.to_dict("records")  # type: ignore[return-value]


def _polars(path: Path) -> list[dict[str, Any]]:
    import polars

    if path.suffix == ".jsonl":
        return polars.read_ndjson(path).to_dicts()
    if path.suffix == ".json":
        return polars.read_json(path).to_dicts()
    return polars.read_csv(path, infer_schema=False, separator="\t" if path.suffix == ".tsv" else ",").to_dicts()


def _stdlib(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
        return rows if isinstance(rows, list) else [rows]
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    return list(csv.DictReader(io.StringIO(text, newline=""), dialect=csv.Sniffer().sniff(text[:4096])))


def _rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)
    words = [
        "股票",
        "银行",
        "患者",
        "诊断",
        "治疗",
        "利率",
        "学生",
        "考试",
        "the",
        "bank",
        "patient",
        "was",
        "treated",
        "with",
        "loan",
        "rate",
        "exam",
        "student",
    ]
    return [
        {
            "id": f"{i:06d}", "text": " ".join(rng.choices(words, k=30)), "label": rng.choice("abcd"),
            "id_card": str(110101199003070000 + i), "date": "2026-01-01",
        }
        for i in range(count)
    ]  # fmt: skip


def throughput(folder: Path) -> str:
    """100,000 rows in each format."""
    import polars

    rows = _rows(100_000)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    text = buffer.getvalue()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files: dict[str, bytes] = {
        "utf8.csv": text.encode(), "gb18030.csv": text.encode("gb18030"), "utf16.csv": text.encode("utf-16"),
        "packed.csv.gz": gzip.compress(text.encode()), "lines.jsonl": lines.encode(),
        "array.json": json.dumps(rows, ensure_ascii=False).encode(),
    }  # fmt: skip
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    polars.DataFrame(rows).write_parquet(folder / "table.parquet")
    return "\n".join([MEASURED, *(_measured(folder / name) for name in [*files, "table.parquet"])])


def memory(folder: Path, megabytes: int) -> str:
    """The same rows over and over, in files ten times apart."""
    row = {**_rows(1)[0], "text": "股票 the bank " * 20}
    record = json.dumps(row, ensure_ascii=False)
    table = [MEASURED]
    for size in (megabytes // 10, megabytes):
        count = size * 2**20 // len(record.encode())
        with (folder / "large.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(record + "\n" for _ in range(count))
        with (folder / "large.json").open("w", encoding="utf-8") as file:
            file.write("[" + record)
            file.writelines(",\n" + record for _ in range(count - 1))
            file.write("]")
        with (folder / "large.csv").open("w", encoding="utf-8") as file:
            file.write(",".join(row) + "\n")
            file.writelines(",".join(row.values()) + "\n" for _ in range(count))
        table += [_measured(folder / name) for name in ("large.jsonl", "large.json", "large.csv")]
    return "\n".join(table)


def _measured(path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    rows, seconds, peak = done.stdout.split()
    speed = f"{float(seconds):.2f} | {int(rows) / float(seconds):,.0f}"
    return f"| {path.name} | {path.stat().st_size / 2**20:.0f} | {speed} | {float(peak):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            "# Reading: encodings, hostile files, memory, speed",
            f"{datetime.date.today()}. `python benchmarks/bench_reading.py --megabytes {arguments.megabytes}`; Linux "
            "x86_64, 2 cores shared with other work, Python 3.11, one process. CPU-s are the process's own.",
            "## Encodings",
            "Files of 1 to 200 rows, seeds 100, 101, 102 (1,000 each). A sentence asks for `data.encoding`.",
            encodings([100, 101, 102]),
            "## Hostile kinds",
            "*right*: the exact rows, all as text. pandas: `sep=None`, all text; polars: all text; stdlib: "
            "`csv.Sniffer`, `json`.",
            hostile(),
            "## 100,000 rows",
            "A process that finds the encoding, the dialect and the columns, then reads every row.",
            throughput(Path(folder)),
            "## Memory",
            "Peak of that process by the size of the file.",
            memory(Path(folder), arguments.megabytes),
        ]
    text = "\n\n".join(parts) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
