"""Tries to make memory grow with the text of the records, or to leave text of people on the disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metier.data import spool
from metier.data.lines import Row, Source
from metier.data.records import Record
from metier.data.spool import Rows, SortedTexts, Spool

CHARS = 1_000
# What a record may take in memory, all stages at their worst; as Python's objects its text alone took 2,400.
BYTES_A_RECORD = 700
# The blocks in which texts pass through memory are made small, so that a small file shows what grows with its size.
PREPARE = """
import sys
from pathlib import Path
from metier.data import shingles, spool, tables
from metier.data.prepare import prepare
from metier.recipe import load_recipe
spool.RUN_CHARS, tables.BYTES_AT_ONCE, tables.PIECE, shingles.HASHES_AT_ONCE = 2**20, 2**20, 500, 2**19
recipe = load_recipe(Path(sys.argv[1]))
prepare(recipe, out=Path(sys.argv[1]).parent / "run" / "dataset", progress=lambda line: None)
# Not ru_maxrss: a process inherits it from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_bytes(folder: Path, number: int) -> int:
    """The most memory that a process holds while it prepares so many records of 1,000 characters."""
    folder.mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 10))) for _ in range(3_000)]
    with (folder / "a.jsonl").open("w") as file:
        for position in range(number):
            text = " ".join(rng.choices(words, k=170))[:CHARS]
            file.write(json.dumps({"question": text, "answer": f"answer {position % 977}", "case": f"c{position}"}) + "\n")
    (folder / "recipe.yaml").write_text(
        f"base: none\nout: run\ndata: {{sources: [{folder / 'a.jsonl'}], prompt: question, answer: answer, "
        "group_id: case}\nprivacy: {policy: none}\nscale: {workers: 1}\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "POLARS_MAX_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(folder / "recipe.yaml")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is there on Linux alone")
def test_memory_grows_by_numbers_and_not_by_text(tmp_path: Path) -> None:
    few, many = 5_000, 20_000
    grown = peak_bytes(tmp_path / "many", many) - peak_bytes(tmp_path / "few", few)
    assert grown < BYTES_A_RECORD * (many - few), f"{grown / (many - few):.0f} bytes a record"
    # Nothing is left beside the data set.
    assert {path.name for path in (tmp_path / "many" / "run").iterdir()} == {"dataset"}
