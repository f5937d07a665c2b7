"""Feeds every reader files until the time is over; prints what came out wrong, and how many files there were.

    python scripts/fuzz_reading.py --engine damage --seconds 600 --seed 1

damage   good files with bytes changed or cut off, or pieces of the format strung together
written  hypothesis draws a table; it is written as CSV, TSV, JSON, Excel or Parquet, in an encoding, packed or not;
         what comes back must be that table, row for row, or a row or file that is refused
atheris  libFuzzer mutates the hostile files of the tests along the readers' branches (pip install atheris); only
         readers in Python, since a workbook or a Parquet file is first tried in another process

What must hold of any bytes: tests/data/test_hostile.py, `check_nothing_is_lost`. What takes longer than a minute is a
hang and stops the run with its traceback.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import gzip
import inspect
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path
from typing import Literal

import polars
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from metier.errors import DataError
from tests.data import hostile_cases
from tests.data.test_hostile import JSON_PIECES, PIECES, WHOLE, check_nothing_is_lost, rows_of
from tests.data.tiny_xlsx import xlsx

HANG_S = 60.0
MAX_SHOWN = 300
COLUMNS = ("text", "label", "note")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030")
FORMATS = ("csv", "csv", "tsv", "jsonl", "jsonl", "json", "json under a key", "json columns", "xlsx", "parquet")
ATHERIS_NAMES = ("a.csv", "a.tsv", "a.json", "a.jsonl", "a.md", "a.txt", "a.csv.gz", "a.zip")
LETTERS = st.sampled_from("abz 019 ,;|\t\"'\\\n#=：，。患者好跌的É€😀{}[]")
CELL = st.one_of(
    st.text(LETTERS, max_size=14),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=10),
    st.sampled_from(["0001", "110101199003078515", "NA", "null", "1e5", "=1+1", "患者三天前开始发热,伴咳嗽", "NaN"]),
)
Table = list[tuple[str, ...]]
TABLE = st.lists(
    st.tuples(CELL, CELL, CELL).filter(lambda row: all(c.strip() for c in row[:2])), min_size=1, max_size=12
)


class Failures:
    """Counts what was tried and prints each kind of failure once."""

    def __init__(self) -> None:
        self.tried, self.seen = Counter[str](), Counter[str]()

    def check(self, path: Path, raw: bytes, table: Table | None = None) -> None:
        """Reads the file; with `table`, what must come out."""
        self.tried[path.name] += 1
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            check_nothing_is_lost(path, raw) if table is None else check_same(path, raw, table)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
            self.seen[kind] += 1
            if self.seen[kind] <= 3:
                print(f"{path.name}: {kind}: {str(error)[:MAX_SHOWN]}\n  {raw[:MAX_SHOWN]!r}", flush=True)
        faulthandler.cancel_dump_traceback_later()

    def report(self, engine: str) -> str:
        tried = ", ".join(f"{name} {count:,}" for name, count in sorted(self.tried.items()))
        return f"{engine}: {self.tried.total():,} files ({tried}): {self.seen.total()} failures {dict(self.seen)}"


def check_same(path: Path, raw: bytes, table: Table) -> None:
    """The rows that can be read are those of the table, at their places; the file as a whole may be refused."""
    try:
        rows = rows_of(path, raw)
    except DataError:
        return
    assert len(rows) == len(table), f"{len(rows)} rows came out of {len(table)}"
    for row, wanted in zip(rows, table, strict=True):
        found = tuple(str(row.fields.get(name) or "") for name in COLUMNS)
        if "xlsx" in path.name:  # a workbook's cell loses white space at its ends unless it says otherwise
            found, wanted = tuple(map(str.strip, found)), tuple(map(str.strip, wanted))
        assert row.problem is not None or found == wanted, f"row {row.number}: {found!r} is not {wanted!r}"


def damaged(rng: random.Random) -> tuple[str, bytes]:
    """A file's name and bytes. Workbooks are rare, since each one costs a process."""
    kind = rng.random()
    if kind < 0.35:
        name = rng.choice(["a.parquet", "a.zip", "a.jsonl.gz", "a.zip", "a.jsonl.gz"])
        if rng.random() < 0.02:
            name = rng.choice(["a.xls", "a.xlsx"])
        raw = bytearray(WHOLE[name]())
        for _ in range(rng.randint(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return name, bytes(raw[: rng.choice([len(raw), rng.randint(1, len(raw))])])
    pieces = PIECES if kind < 0.65 else JSON_PIECES
    name = rng.choice(["a.csv", "a.tsv", "a.md"] if kind < 0.65 else ["a.json", "a.jsonl"])
    return name, b"".join(rng.choices(pieces, k=rng.randint(0, 60)))


def fuzz_damaged(folder: Path, seconds: float, number: int) -> Failures:
    rng, failures, end = random.Random(number), Failures(), time.monotonic() + seconds
    while time.monotonic() < end:
        name, raw = damaged(rng)
        failures.check(folder / name, raw)
    return failures


def written(table: Table, kind: str, encoding: str, draw: random.Random) -> tuple[str, bytes]:
    """The table as a file: its name and its bytes."""
    objects = [dict(zip(COLUMNS, row, strict=True)) for row in table]
    if kind == "xlsx":
        sheet: list[list[object]] = [list[object](row) for row in (COLUMNS, *table)]
        return "a.xlsx", xlsx({"s": sheet})
    if kind == "parquet":
        buffer = io.BytesIO()
        polars.DataFrame(objects).write_parquet(buffer)
        return "a.parquet", buffer.getvalue()
    text = io.StringIO(newline="")
    if kind in ("csv", "tsv"):
        delimiter = "\t" if kind == "tsv" else draw.choice(",;|\t")
        end = draw.choice(["\n", "\r\n"])
        quoting: Literal[0, 1] = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([COLUMNS, *table])
        name = f"a.{kind}"
    else:
        ascii_only, name = draw.random() < 0.3, "a.jsonl" if kind == "jsonl" else "a.json"
        columns = {column: [row[i] for row in table] for i, column in enumerate(COLUMNS)}
        whole = {"json": objects, "json under a key": {"data": objects}, "json columns": columns}
        lines = objects if kind == "jsonl" else [whole[kind]]
        indent = draw.choice([None, 1]) if kind != "jsonl" else None
        text.write("".join(json.dumps(line, ensure_ascii=ascii_only, indent=indent) + "\n" for line in lines))
    return name, text.getvalue().encode(encoding)


def fuzz_written(folder: Path, seconds: float, number: int) -> Failures:
    failures, end = Failures(), time.monotonic() + seconds

    @settings(
        max_examples=500, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(TABLE, st.sampled_from(FORMATS), st.sampled_from(ENCODINGS), st.integers(0, 10**6))
    def one(table: Table, kind: str, encoding: str, drawn: int) -> None:
        draw = random.Random(drawn)
        if kind in ("xlsx", "parquet") and draw.random() < 0.9:
            kind = "csv"
        name, raw = written(table, kind, encoding, draw)
        packing = draw.choice(["", "", "", ".gz", ".zip"])
        if packing == ".gz" and kind not in ("xlsx", "parquet"):
            name, raw = f"{name}.gz", gzip.compress(raw)
        if packing == ".zip":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr(f"inner/{name}", raw)
            name, raw = f"{name.split('.')[1]}.zip", buffer.getvalue()
        failures.check(folder / name, raw, table)

    while time.monotonic() < end:
        number += 1
        seed(number)(one)()
    return failures


def fuzz_atheris(folder: Path, seconds: float, number: int) -> None:
    """Reports when the time is over, and ends the process."""
    import atheris

    failures, begun = Failures(), time.monotonic()
    corpus = folder / "corpus"
    corpus.mkdir()
    for place, case in enumerate(hostile_cases.CSV + hostile_cases.JSON):
        if case.name in ATHERIS_NAMES and len(case.raw) < 10_000:
            (corpus / str(place)).write_bytes(bytes([ATHERIS_NAMES.index(case.name)]) + case.raw)
    # The readers alone: with numpy's and polars' functions it would take minutes to begin.
    for module in [module for name, module in sys.modules.items() if name.startswith("metier.data.")]:
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                atheris.instrument_func(function)

    def one(data: bytes) -> None:
        if not data:
            return
        name, raw = ATHERIS_NAMES[data[0] % len(ATHERIS_NAMES)], data[1:]
        if name == "a.csv.gz":
            raw = gzip.compress(raw, 1)
        elif name == "a.zip":
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("a.csv" if len(raw) % 2 else "a.jsonl", raw)
            raw = buffer.getvalue()
        failures.check(folder / name, raw)
        if time.monotonic() - begun > seconds:
            print(f"seed {number}, {failures.report('atheris')}", flush=True)
            shutil.rmtree(folder)
            os._exit(0)  # libFuzzer would go on

    limits = [
        f"-seed={number}",
        "-max_len=4096",
        f"-timeout={HANG_S:.0f}",
        f"-artifact_prefix={folder}/",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["damage", "written", "atheris"], default="damage")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.engine == "atheris":
            fuzz_atheris(folder, arguments.seconds, arguments.seed)
            return
        fuzz = fuzz_damaged if arguments.engine == "damage" else fuzz_written
        print(f"seed {arguments.seed}, {fuzz(folder, arguments.seconds, arguments.seed).report(arguments.engine)}")


if __name__ == "__main__":
    main()
