"""Tries to make memory grow with the text of the records, or to leave text of people on the disk."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metier.data import spool
from metier.data.lines import Row, Source
from metier.data.records import Record
from metier.data.spool import Rows, SortedTexts, Spool

CHARS = 1_000
# What a record may take in memory, all stages at their worst: 400 of its own, and what allocators do not give back.
# Held as Python's objects it took 5,700.
BYTES_A_RECORD = 1_500
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
            file.write(
                json.dumps({"question": text, "answer": f"answer {position % 977}", "case": f"c{position}"}) + "\n"
            )
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


def test_a_spool_gives_back_what_was_put_whoever_asks_and_leaves_no_name(tmp_path: Path) -> None:
    rng = random.Random(1)
    values = [
        (i, "文字" * rng.choice([0, 3, 400, 200_000 if i % 400 == 0 else 5]), None, ("a", "b")) for i in range(2_000)
    ]
    kept = Spool(tmp_path)
    places = [kept.put(value) for value in values[:1_000]]

    def read(seed: int) -> bool:
        order = random.Random(seed).choices(range(1_000), k=3_000)
        return all(kept.get(places[i]) == values[i] for i in order)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(read, seed) for seed in range(4)]
        places += [kept.put(value) for value in values[1_000:]]
        assert all(future.result() for future in asked)
    assert [kept.get(place) for place in places] == values
    assert list(kept.between(places[7], kept.end)) == values[7:]
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_matrix_come_back_by_number(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 2**32, (5_000, 128), dtype=np.uint32)
    rows = Rows(np.uint32, 128, folder=tmp_path)
    for start in range(0, 5_000, 700):
        rows.append(whole[start : start + 700])
    assert (rows.take([4_999, 0, 3, 3]) == whole[[4_999, 0, 3, 3]]).all() and (rows.whole() == whole).all()


def test_texts_are_sorted_as_in_memory_however_many_runs_it_takes(tmp_path: Path, monkeypatch: Any) -> None:
    rng = random.Random(2)
    texts = ["".join(rng.choices("ab中😀", k=rng.randrange(6))) * rng.choice([1, 1, 60]) for _ in range(4_000)]
    for chars in (500, 10**9):
        monkeypatch.setattr(spool, "RUN_CHARS", chars)
        found = SortedTexts(iter(texts), tmp_path)
        assert list(found) == sorted(texts) and found[10:20] == sorted(texts)[10:20]
        assert found.order.tolist() == sorted(range(len(texts)), key=texts.__getitem__)


def test_a_stored_record_is_the_record_and_its_variants_stand_beside_it(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    kept, source = Spool(tmp_path), Source(Path("a.csv"), "a.csv", "csv", is_test=False)
    record = Record(source, Row(7, 99, "line 8"), messages, "g", "q")
    record.store(kept)
    other = record.variant([messages[0], {"role": "user", "content": "Q"}, messages[2]], method="typo", number=1)
    again = record.variant(None, method="repeat", number=2)
    record.rewrite([*messages[:2], {"role": "assistant", "content": "[NAME]"}], None, (("PERSON", "0f"),))
    assert (record.answer, record.group, record.removed) == ("[NAME]", "q", (("PERSON", "0f"),))
    assert (other.prompt, other.answer, other.group_id, other.parent) == ("Q", "a", "g", record)
    assert (again.messages, again.row, again.number) == (messages, Row(7, 99, "line 8"), 2)
    copy = pickle.loads(pickle.dumps(other))  # as it goes to another process
    assert (copy.messages, copy.row, copy.method, copy.parent.answer) == (other.messages, other.row, "typo", "[NAME]")
