"""A merged export in real MLX on a CPU: prompts split alike, greedy answers as PARITY.json says.

    python benchmarks/bench_export_mlx.py RUN MERGED --mlx-python PYTHON

MERGED is what `metier export RUN --to merged` made; PYTHON has mlx[cpu] and mlx-lm (benchmarks/mlx_answers.py).
MLX is slow on a CPU (seconds a pass), so `--prompts` asks fewer than the record's 20.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from metier.serving import parity
from metier.serving.export import open_reference

CHILD = Path(__file__).with_name("mlx_answers.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("merged", type=Path)
    parser.add_argument("--mlx-python", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=parity.NUM_GREEDY)
    args = parser.parse_args()
    reference = open_reference(args.run)
    renderer = reference.renderer
    probes = parity.choose_probes(args.run / "dataset", renderer, reference.context)[: args.prompts]
    ids = [renderer.prompt(probe.messages[:-1]) for probe in probes]
    texts = [
        reference.base.tokenizer.decode(i, skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids
    ]
    asked = {
        "model": str(args.merged.resolve()), "stop": sorted(renderer.stop_token_ids),
        "max_tokens": parity.GREEDY_TOKENS,
        "prompts": [{"text": text, "ids": i} for text, i in zip(texts, ids, strict=True)],
    }  # fmt: skip
    done = subprocess.run([args.mlx_python, CHILD], input=json.dumps(asked), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("MLX did not answer; see above")
    answers = json.loads(done.stdout)
    [entry] = json.loads((args.merged / "PARITY.json").read_text(encoding="utf-8"))["forms"].values()
    digests = [parity.digest(renderer.decode(a["answer"])) for a in answers]
    same_ids = sum(a["ids"] == i for a, i in zip(answers, ids, strict=True))
    exported = sum(d == g["export"] for d, g in zip(digests, entry["greedy"], strict=False))
    measured = sum(d == g["reference"] for d, g in zip(digests, entry["greedy"], strict=False))
    print("| in MLX | prompts with the same ids | answers as PARITY.json says | as the adapter |")
    print("|---|---:|---:|---:|")
    row = " | ".join(f"{number} of {len(ids)}" for number in (same_ids, exported, measured))
    print(f"| merged, {entry['storage']} | {row} |")


if __name__ == "__main__":
    main()
