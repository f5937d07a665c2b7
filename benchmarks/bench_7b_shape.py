"""The bundled ICD-10 recipe, unchanged, on a LLaMA-2-7B shape with random weights: trained, stopped, resumed, judged.

    python benchmarks/bench_7b_shape.py --work /tmp/7b

One CUDA GPU. The run is stopped with SIGTERM near its middle and started again with the same command.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RECIPE = ROOT / "metier" / "bundled" / "icd10cm.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "llama2-7b-shape_h100_202611.md"


def save_base(folder: Path) -> None:
    """6.74e9 random weights in bf16, with a small byte-level tokenizer and LLaMA-2's chat format."""
    from tests.model.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer("llama2")
    config = transformers.LlamaConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (4096, 32, 32000)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.absolute()
    base, run = work / "base", work / "run"
    ticks = [time.time()]
    if not base.exists():
        save_base(base)
    ticks.append(time.time())
    metier = [sys.executable, "-c", "from metier.cli import main; main()"]
    command = [*metier, "run", str(RECIPE), "--out", str(run), "--set", f"base={base}", "--set", "train.max_steps=50",
               "--set", "train.log_every=1", "--set", "train.eval_every=25", "--set", "evaluate.max_items=64",
               "--set", "train.learning_rate=auto"]  # fmt: skip
    first = subprocess.Popen(command)
    metrics = run / ".adapter.partial" / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 20):
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    stopped = first.wait()
    ticks.append(time.time())
    second = subprocess.run(command).returncode
    ticks.append(time.time())
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    rows = [json.loads(line) for line in (run / "adapter" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    speed = sorted(row["tok_per_sec"] for row in steps)[len(steps) // 2]
    evidence = json.loads((run / "evidence" / "evidence.json").read_text())
    lines = [
        "# LLaMA-2-7B shape, random weights, bf16, the bundled ICD-10 recipe unchanged", "",
        f"`python benchmarks/bench_7b_shape.py --work {work}` on one {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.", "",
        "| what | value |", "|---|---|",
        f"| stopped by SIGTERM, exit code | {stopped} |", f"| the same command again, exit code | {second} |",
        f"| steps in metrics.jsonl | {[row['step'] for row in steps] == list(range(1, 51))} (1 to 50, each once) |",
        f"| trainable parameters | {manifest['trainable_parameters']:,} of {manifest['total_parameters']:,} |",
        f"| precision, device | {manifest['precision']}, {manifest['device']} |",
        f"| loss, first and last step | {steps[0]['loss']:.3f}, {steps[-1]['loss']:.3f} |",
        f"| median tokens/s (16 records, about {steps[0]['num_tokens']} tokens a step) | {speed:,.0f} |",
        f"| making the base / first command / second command with evaluation | {ticks[1] - ticks[0]:.0f} s / "
        f"{ticks[2] - ticks[1]:.0f} s / {ticks[3] - ticks[2]:.0f} s |",
        f"| verdict (random weights, 64 items) | {evidence['verdict']['statement']} |", "",
    ]  # fmt: skip
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
