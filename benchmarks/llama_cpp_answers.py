"""Greedy answers of real llama.cpp, for bench_export.py: JSON on stdin, JSON on stdout.

Runs in an environment with llama-cpp-python alone. In: model, lora (or null), prompts ({text, ids}), stop (ids),
max_tokens. Out: for each prompt the token ids that llama.cpp itself makes of its text, and the answer's ids.
"""

from __future__ import annotations

import json
import sys

from llama_cpp import Llama

asked = json.load(sys.stdin)
model = Llama(asked["model"], lora_path=asked["lora"], n_ctx=2048, n_threads=1, verbose=False)
found = []
for prompt in asked["prompts"]:
    model.reset()
    answer: list[int] = []
    for token in model.generate(prompt["ids"], temp=0.0, top_k=1, repeat_penalty=1.0):
        if token in asked["stop"] or len(answer) == asked["max_tokens"]:
            break
        answer.append(token)
    ids = model.tokenize(prompt["text"].encode(), add_bos=False, special=True)
    found.append({"ids": ids, "answer": answer})
json.dump(found, sys.stdout)
