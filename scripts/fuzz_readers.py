"""Feeds every reader damaged files until the time is over; prints what was no row and no sentence.

    python scripts/fuzz_readers.py --seconds 600 --seed 1

A file is a good one with bytes changed or cut off, or pieces of the format strung together. What must hold:
tests/data/test_hostile.py, `check_nothing_is_lost`. A reader that hangs stops the run at its time limit.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.data.test_hostile import JSON_PIECES, PIECES, WHOLE, check_nothing_is_lost

HANG_S = 60.0


def draw(rng: random.Random) -> tuple[str, bytes]:
    """A file's name and bytes. Workbooks are rare, since each one costs a process."""
    kind = rng.random()
    if kind < 0.35:
        name = rng.choice(["a.parquet", "a.zip", "a.jsonl.gz"])
        if rng.random() < 0.02:
            name = rng.choice(["a.xls", "a.xlsx"])
        raw = bytearray(WHOLE[name]())
        for _ in range(rng.randint(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return name, bytes(raw[: rng.choice([len(raw), rng.randint(1, len(raw))])])
    pieces = PIECES if kind < 0.65 else JSON_PIECES
    name = rng.choice(["a.csv", "a.tsv", "a.md"] if kind < 0.65 else ["a.json", "a.jsonl"])
    return name, b"".join(rng.choices(pieces, k=rng.randint(0, 60)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, counts, failures = random.Random(arguments.seed), Counter[str](), 0
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            name, raw = draw(rng)
            counts[name] += 1
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            try:
                check_nothing_is_lost(Path(folder) / name, raw)
            except Exception as error:
                failures += 1
                print(f"{name}: {type(error).__name__}: {raw!r}")
            faulthandler.cancel_dump_traceback_later()
    print(f"{counts.total()} files ({dict(sorted(counts.items()))}), seed {arguments.seed}: {failures} failures")


if __name__ == "__main__":
    main()
