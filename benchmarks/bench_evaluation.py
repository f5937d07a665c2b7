"""How long do base and adapter take over classification items, metier's way and the plain way?

    python benchmarks/bench_evaluation.py RUN [items]      # RUN: a finished run, e.g. of `metier demo`

The plain way: for base and adapter apart, item by item, one forward pass over all labels as a padded batch, one pass
for the reference, one `generate`. Ours: evaluation.ask, with a fresh cache. Prints a table; answers must be equal.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from metier.evaluation.ask import AnswerCache, Questions, ask, leave_out, longest_answer
from metier.evaluation.items import Item, choose_items, read_items
from metier.model.specialist import Specialist, load


@torch.no_grad()
def plain_scores(specialist: Specialist, item: Item, answers: list[str], use_adapter: bool) -> list[float]:
    """Summed log-probability of each answer: one padded batch, full logits, as a first script would do it."""
    rows = [specialist._answer([*item.prompt, {"role": "assistant", "content": a}]) for a in answers]
    width = max(len(ids) for ids, _ in rows)
    pad = specialist.renderer.encode(" ")[0]
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    with specialist._adapter(use_adapter):
        logits = specialist.base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    log_probs = logits.float().log_softmax(-1)
    sums = []
    for row, (tokens, positions) in enumerate(rows):
        sums.append(sum(float(log_probs[row, t - 1, tokens[t]]) for t in positions[:-1]))
    return sums


def plain(specialist: Specialist, items: list[Item], labels: list[str], max_new_tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side, use in (("base", False), ("adapter", True)):
        chosen, completions = [], []
        for item in items:
            scores = plain_scores(specialist, item, labels, use)
            chosen.append(labels[scores.index(max(scores))])
            plain_scores(specialist, item, [item.reference], use)
            completions += specialist.generate([item.prompt], use_adapter=use, max_new_tokens=max_new_tokens)
        found[side] = (chosen, completions)
    return found


def main() -> None:
    run, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    specialist = load(run)
    labels = json.loads((run / "dataset" / "manifest.json").read_text(encoding="utf-8"))["labels"]
    pool = [*read_items(run / "dataset", "test"), *read_items(run / "dataset", "train")]
    chosen = choose_items(pool, max_items=count, seed=0)
    max_new_tokens = longest_answer(specialist, chosen, "auto")
    items, _ = leave_out(specialist, chosen, max_new_tokens)
    questions = Questions(labels=labels, max_new_tokens=max_new_tokens)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = AnswerCache(Path(folder) / "answers.jsonl", [])
        sides, _ = ask(specialist, items, questions, cache=cache, progress=lambda what, done, total: None)
    ours = time.perf_counter() - started
    started = time.perf_counter()
    slow = plain(specialist, items, labels, max_new_tokens)
    theirs = time.perf_counter() - started
    same = {
        side: (
            sum(a == b for a, b in zip(sides[side].labels or [], slow[side][0], strict=True)),
            sum(a == b for a, b in zip(sides[side].completions or [], slow[side][1], strict=True)),
        )
        for side in ("base", "adapter")
    }
    print("| items | labels | metier, s | plain, s | ratio | equal labels (base, adapter) | equal answers |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {len(items)} | {len(labels)} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} | "
        f"{same['base'][0]}, {same['adapter'][0]} | {same['base'][1]}, {same['adapter'][1]} |"
    )


if __name__ == "__main__":
    main()
