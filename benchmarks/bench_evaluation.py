"""How long do base and adapter take over classification items, metier's way and the plain way?

    python benchmarks/bench_evaluation.py RUN [items] [plain items]     # RUN: a finished run, e.g. of `metier demo`
    python benchmarks/bench_evaluation.py --card [items]                # LLaMA-2-7B shape on one GPU, tokens/s

The plain way: for base and adapter apart, item by item, one forward pass over all labels as a padded batch, one pass
for the reference, one `generate`. Ours: evaluation.ask, with a fresh cache. Prints a table; answers must be equal. With
a third number the plain way is timed on so many of the items, drawn at random, and ours on all.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

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
    if sys.argv[1] == "--card":
        on_card(int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
        return
    run, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    specialist = load(run)
    labels = json.loads((run / "dataset" / "manifest.json").read_text(encoding="utf-8"))["labels"]
    pool = [*read_items(run / "dataset", "test"), *read_items(run / "dataset", "train")]
    chosen = choose_items(pool, max_items=count, seed=0)
    max_new_tokens = longest_answer(specialist, chosen, "auto")
    items, _ = leave_out(specialist, chosen, max_new_tokens)
    questions = Questions(labels=labels, max_new_tokens=max_new_tokens)
    ours, sides = timed_ask(specialist, items, questions)
    few = int(sys.argv[3]) if len(sys.argv) > 3 else len(items)
    places = sorted(random.Random(0).sample(range(len(items)), few))
    started = time.perf_counter()
    slow = plain(specialist, [items[i] for i in places], labels, max_new_tokens)
    theirs = time.perf_counter() - started
    same = {
        side: (
            sum((sides[side].labels or [])[i] == b for i, b in zip(places, slow[side][0], strict=True)),
            sum((sides[side].completions or [])[i] == b for i, b in zip(places, slow[side][1], strict=True)),
        )
        for side in ("base", "adapter")
    }
    each = ours / len(items), theirs / few
    print("| items | labels | metier, s | plain: items, s | s an item | ratio | equal labels | equal answers |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {len(items)} | {len(labels)} | {ours:.1f} | {few}, {theirs:.1f} | {each[0]:.3f}, {each[1]:.3f} | "
        f"{each[1] / each[0]:.2f} | {same['base'][0]}, {same['adapter'][0]} of {few} | "
        f"{same['base'][1]}, {same['adapter'][1]} of {few} |"
    )


def timed_ask(specialist: Specialist, items: list[Item], questions: Questions) -> tuple[float, dict[str, Any]]:
    """Seconds and answers of evaluation.ask with a fresh cache."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = AnswerCache(Path(folder) / "answers.jsonl", [])
        sides, _ = ask(specialist, items, questions, cache=cache, progress=lambda what, done, total: None)
    return time.perf_counter() - started, sides


def on_card(count: int) -> None:
    """Base and adapter of a LLaMA-2-7B shape (random weights, bf16, r 16) over `count` items with 22 labels."""
    import transformers
    from transformers.initialization import no_init_weights

    from metier.model.load import Base
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig
    from tests.model.tiny import tiny_tokenizer

    device, tokenizer = torch.device("cuda"), tiny_tokenizer("llama2")
    config = transformers.LlamaConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with device:
        torch.set_default_dtype(torch.bfloat16)
        with no_init_weights():
            model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02)
    model.requires_grad_(False).eval()
    base = Base(model, tokenizer, Path("7b"), "7b", None, "0" * 64, torch.bfloat16, device)
    specialist = Specialist(base, attach(model, AdapterConfig(rank=16), seed=0))
    labels = [f"Chapter {i:02d}" for i in range(22)]
    words = random.Random(0)
    items = []
    for i in range(count):
        note = " ".join(words.choice(["pain", "fever", "of", "the", "left", "hand", "acute"]) for _ in range(40))
        turns = [{"role": "user", "content": f"{i} {note}"}, {"role": "assistant", "content": labels[i % 22]}]
        items.append(Item(f"{i:05d}", None, "en", labels[i % 22], turns))
    sizes = [len(specialist._answer(i.messages)[0]) for i in items]
    prompt = sum(len(specialist.renderer.prompt(i.prompt)) for i in items)
    print(
        f"{torch.cuda.get_device_name()}: {model.num_parameters():,} weights, {sum(sizes) / count:.0f} tokens a record"
    )
    for name, some, new in (("likelihoods", items, 0), ("likelihoods and answers of 16 tokens", items[:64], 16)):
        timed_ask(specialist, some[:32], Questions(labels=labels, max_new_tokens=new))
        torch.cuda.synchronize()
        seconds, _ = timed_ask(specialist, some, Questions(labels=labels, max_new_tokens=new))
        scored = 2 * (sum(sizes) + prompt) * len(some) / count
        print(
            f"{name}: {len(some)} items, base and adapter, {seconds:.2f} s, {2 * len(some) / seconds:.1f} items/s, "
            f"{scored / seconds:,.0f} tokens/s of records and prompts (labels not counted)"
        )


if __name__ == "__main__":
    main()
