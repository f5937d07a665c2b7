"""A sweep under kill -9: killed at random moments and started again, it must end with the table of one left alone.

    python benchmarks/bench_sweep.py RECIPE WORK [KILLS] [LEAST SECONDS] [MOST SECONDS]

RECIPE has a `sweep` section; WORK is an empty folder. Prints how many kills found the sweep at work, and whether table
and adapter are the same bytes.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

FILES = ("sweep/trials.json", "adapter/adapter_model.safetensors")


def command(recipe: str, out: Path) -> subprocess.Popen[bytes]:
    """`metier sweep` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "metier", "sweep", recipe, "--out", str(out)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def main() -> None:
    recipe, work = sys.argv[1], Path(sys.argv[2])
    kills, least, most = (float(n) for n in (*sys.argv[3:6], "20", "3", "9")[:3])
    assert command(recipe, work / "whole").wait() == 0
    draw, hits = random.Random(0), 0
    for _ in range(int(kills)):
        process = command(recipe, work / "killed")
        try:
            process.wait(draw.uniform(least, most))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            hits += 1
    assert command(recipe, work / "killed").wait() == 0
    same = [(work / "whole" / name).read_bytes() == (work / "killed" / name).read_bytes() for name in FILES]
    print(f"{int(kills)} starts, {hits} killed at work; same table: {same[0]}, same adapter: {same[1]}")


if __name__ == "__main__":
    main()
