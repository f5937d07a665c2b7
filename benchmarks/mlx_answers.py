"""Greedy answers of real MLX on a CPU, for bench_export_mlx.py: JSON on stdin, JSON on stdout.

Runs in an environment with mlx[cpu] and mlx-lm alone. In: model (a merged folder), prompts (text, ids), stop (ids),
max_tokens. Out: for each prompt the ids that MLX's tokenizer makes of its text, and the answer's ids.
"""

from __future__ import annotations

import json
import sys

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

asked = json.load(sys.stdin)
mx.set_default_device(mx.cpu)
model, tokenizer = load(asked["model"])
found = []
for prompt in asked["prompts"]:
    answer: list[int] = []
    for token, _ in generate_step(mx.array(prompt["ids"]), model, max_tokens=asked["max_tokens"]):
        if int(token) in asked["stop"]:
            break
        answer.append(int(token))
    found.append({"ids": tokenizer.encode(prompt["text"], add_special_tokens=False), "answer": answer})
json.dump(found, sys.stdout)
