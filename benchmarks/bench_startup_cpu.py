"""Loading a base model on a CPU: metier's streaming loader against transformers' from_pretrained, in turn.

    python benchmarks/bench_startup_cpu.py

SmolLM2-135M-Instruct in fp32 files, to fp32 and bf16. Each load has a process of its own; imports are done before
the clock starts, the file is in the page cache. Seconds are process time (one thread) and wall; memory is what the
process grew by at its peak, mapped file pages included. Writes benchmarks/results/startup_<machine>_<yyyymm>.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROUNDS = 5


def work(loader: str, precision: str) -> None:
    """One load, in this process; prints seconds and MiB as JSON."""
    import resource

    import torch
    import transformers

    from metier.model.load import load_base
    from metier.model.resolve import resolve_base

    torch.set_num_threads(1)
    path, dtype = resolve_base("smollm2-135m"), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    transformers.AutoConfig.from_pretrained(path)
    from transformers.models.llama import modeling_llama  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    if loader == "metier":
        model = load_base(path, dtype=dtype, device=torch.device("cpu")).model
    else:
        transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map={"": "cpu"}, attn_implementation="sdpa"
        )
    sum(float(p.detach().flatten()[::512].sum()) for p in model.parameters())  # touch the mapped pages
    seconds = (time.perf_counter() - wall, time.process_time() - cpu)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([*seconds, grown]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=f"cpu{os.cpu_count()}", help="in the results file's name")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return work(*arguments.load)
    import torch
    import transformers

    from metier.artifacts import write_atomic

    cases = [(loader, precision) for precision in ("fp32", "bf16") for loader in ("transformers", "metier")]
    results: dict[tuple[str, str], list[list[float]]] = {case: [] for case in cases}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for number in range(ROUNDS):
        for case in cases if number % 2 == 0 else reversed(cases):
            command = [sys.executable, str(Path(__file__).resolve()), "--load", *case]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results[case].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for (loader, precision), runs in results.items():
        wall, cpu, grown = (statistics.median(column) for column in zip(*runs, strict=True))
        each = ", ".join(f"{run[1]:.2f}" for run in runs)
        rows.append(f"| {loader} | {precision} | {cpu:.2f} | {each} | {wall:.2f} | {grown:,.0f} |")
    text = f"""# Loading SmolLM2-135M-Instruct (fp32 files, tokenizer included) on a CPU

{datetime.date.today().isoformat()}. `python benchmarks/bench_startup_cpu.py`; {platform.system()} {platform.machine()}, {os.cpu_count()} cores, \
one thread, shared with other jobs; torch {torch.__version__}, transformers {transformers.__version__}. Medians of {ROUNDS} rounds in turn.

| loader | to | process s | in each round | wall s | grown by at the peak, MiB |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""  # noqa: E501
    path = ROOT / "benchmarks" / "results" / f"startup_{arguments.machine}_{datetime.date.today():%Y%m}.md"
    write_atomic(path, text.encode())
    print(text)


if __name__ == "__main__":
    main()
