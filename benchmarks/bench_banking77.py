"""banking77 in full, with SmolLM2-135M on one GPU: candidates chosen on validation, the best tested once, PEFT beside.

    python benchmarks/bench_banking77.py data/banking77 --work /tmp/banking77

Every candidate is a metier run of recipes/banking77_smollm2-135m_h100.yaml with overrides, trained in a
process of its own; candidates run side by side on the one card, so their times are not comparable. Each is
scored on the validation split; only the best is evaluated on the test split. PEFT's rows train on the same
records, rendered by the same template, with PEFT + a plain AdamW loop over padded batches (bf16 autocast),
and answer the test questions greedily.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "banking77_smollm2-135m_h100.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "banking77_h100_202611.md"

R64 = ["adapter.rank=64", "adapter.alpha=128"]
CANDIDATES: dict[str, list[str]] = {
    "r32 lr1e-3 4 epochs": ["train.epochs=4"],
    "r64 lr1e-3 4 epochs": [*R64, "train.epochs=4"],
    "r32 lr1e-3 5 epochs batch 64": ["train.epochs=5", "train.micro_batch_size=64"],
    "r32 lr2e-3 4 epochs batch 64": ["train.epochs=4", "train.micro_batch_size=64", "train.learning_rate=2e-3"],
    "r32 lr1e-3 6 epochs dropout 0.1": ["train.epochs=6", "adapter.dropout=0.1"],
    "r64 lr2e-3 8 epochs dropout 0.1 batch 64": [
        *R64, "train.epochs=8", "adapter.dropout=0.1", "train.learning_rate=2e-3", "train.micro_batch_size=64",
    ],
}  # fmt: skip
PEFT: dict[str, dict[str, Any]] = {
    "PEFT, the tutorial's recipe": {
        "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"], "dropout": 0.05, "lr": 2e-4, "batch": 16, "epochs": 3,
    },
    "PEFT, all linear layers, r 32, 1e-3": {
        "rank": 32, "alpha": 64, "targets": "all-linear", "dropout": 0.0, "lr": 1e-3, "batch": 32, "epochs": 4,
    },
}  # fmt: skip


def folder_of(work: Path, name: str) -> Path:
    return work / "".join(c if c.isalnum() else "-" for c in name)


def overrides(data: Path, name: str) -> list[str]:
    sources = [f"data.sources=[{data / 'train.csv'}]", f"data.test_sources=[{data / 'test.csv'}]"]
    return [*sources, "train.eval_every=200", "adapter.rank=32", "adapter.alpha=64", *CANDIDATES[name]]


def read(run: Path, split: str) -> list[dict[str, Any]]:
    import polars

    table = polars.read_parquet(run / "dataset" / "records.parquet")
    return table.filter(polars.col("split") == split).to_dicts()


def train_candidate(data: Path, work: Path, name: str) -> dict[str, Any]:
    """Trains one candidate and returns its accuracy on the validation split (labels by log-likelihood)."""
    from metier import pipeline
    from metier.model.specialist import load
    from metier.recipe import load_recipe

    run = folder_of(work, name)
    recipe = load_recipe(RECIPE, overrides(data, name), str(run))
    pipeline.prepare(recipe)
    pipeline.train(recipe)
    manifest = json.loads((run / "adapter" / "manifest.json").read_text())
    records, labels = read(run, "val"), json.loads((run / "dataset" / "manifest.json").read_text())["labels"]
    scores = load(run).score_choices([r["messages"][:-1] for r in records], labels)
    right = sum(labels[best] == r["label"] for best, r in zip(scores.argmax(1), records, strict=True))
    return {
        "val_accuracy": right / len(records), "n": len(records), "val_loss": manifest["val_loss"],
        "train_seconds": manifest["train_seconds"], "best_step": manifest["best_step"], "steps": manifest["steps"],
    }  # fmt: skip


def train_peft(data: Path, work: Path, name: str) -> dict[str, Any]:
    """PEFT over the records of the first candidate's data set; greedy answers to the test questions."""
    import peft
    import torch
    import transformers

    from metier.model.chat import Renderer
    from metier.model.load import load_tokenizer
    from metier.model.resolve import resolve_base

    settings = PEFT[name]
    run = folder_of(work, next(iter(CANDIDATES)))
    path = resolve_base("smollm2-135m")
    renderer = Renderer(load_tokenizer(path))
    records = [renderer.conversation(r["messages"]) for r in read(run, "train")]
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            target_modules=settings["targets"],
            lora_dropout=settings["dropout"],
            task_type="CAUSAL_LM",
        ),  # fmt: skip
    )
    steps = settings["epochs"] * (len(records) // settings["batch"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        epoch, at = divmod(step, len(records) // settings["batch"])
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(epoch)).tolist()
        rows = [records[i] for i in order[at * settings["batch"] : (at + 1) * settings["batch"]]]
        width = max(r.num_tokens for r in rows)
        ids = torch.tensor([r.input_ids + [2] * (width - r.num_tokens) for r in rows]).cuda()
        labels = torch.tensor([r.labels + [-100] * (width - r.num_tokens) for r in rows]).cuda()
        mask = torch.tensor([[1] * r.num_tokens + [0] * (width - r.num_tokens) for r in rows]).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {
        "test_accuracy_generated": peft_accuracy(model.eval(), renderer, read(run, "test")),
        "train_seconds": seconds,
    }


def peft_accuracy(model: Any, renderer: Any, tests: list[dict[str, Any]]) -> float:
    """Share of test questions whose greedy answer is the intent, as PEFT's own generate gives it."""
    import torch

    tests = sorted(tests, key=lambda r: len(r["messages"][1]["content"]))
    right = 0
    for start in range(0, len(tests), 128):
        rows = tests[start : start + 128]
        prompts = [renderer.prompt(r["messages"][:-1]) for r in rows]
        width = max(map(len, prompts))
        ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts]).cuda()
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=2)
        answers = [renderer.decode(row).strip() for row in out[:, width:].tolist()]
        right += sum(a == r["label"] for a, r in zip(answers, rows, strict=True))
    return right / len(tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with train.csv and test.csv")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    data, work = args.data.absolute(), args.work.absolute()
    if args.only:
        task = train_candidate if args.only in CANDIDATES else train_peft
        (folder_of(work, args.only).with_suffix(".json")).write_text(json.dumps(task(data, work, args.only)))
        return
    work.mkdir(parents=True, exist_ok=True)
    first = next(iter(CANDIDATES))
    from metier import pipeline
    from metier.recipe import load_recipe

    pipeline.prepare(load_recipe(RECIPE, overrides(data, first), str(folder_of(work, first))))
    command = [sys.executable, __file__, str(data), "--work", str(work), "--only"]
    running = {name: subprocess.Popen([*command, name]) for name in [*CANDIDATES, *PEFT]}
    for process in running.values():
        process.wait()
    found = {}
    for name in running:
        path = folder_of(work, name).with_suffix(".json")
        if path.exists():
            found[name] = json.loads(path.read_text())
            print(name, found[name], flush=True)
    best = max((n for n in CANDIDATES if n in found), key=lambda n: found[n]["val_accuracy"])
    recipe = load_recipe(RECIPE, overrides(data, best), str(folder_of(work, best)))
    evidence = json.loads((pipeline.evaluate(recipe) / "evidence.json").read_text())
    write_results(found, best, evidence, work)


def write_results(found: dict[str, Any], best: str, evidence: dict[str, Any], work: Path) -> None:
    import torch

    lines = [
        "# banking77, full data, SmolLM2-135M-Instruct (4-bit source weights), one GPU", "",
        f"`python benchmarks/bench_banking77.py data/banking77 --work {work}` on one {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; one seed.",
        "Data: Casanueva et al., 2020 (PolyAI), CC BY 4.0.",
        "", "Chosen on validation (labels by log-likelihood). They ran side by side: times are not comparable.", "",
        "| candidate | validation accuracy | steps (best) |", "|---|---:|---:|",
    ]  # fmt: skip
    for name in CANDIDATES:
        if name in found:
            one = found[name]
            lines.append(f"| {name} | {100 * one['val_accuracy']:.1f} % | {one['steps']} ({one['best_step']}) |")
    metrics = evidence["metrics"]
    lines += [
        "", f"The chosen one (**{best}**) on the test split, once:", "",
        "| metric | base | adapter | difference, 95 % interval | n |", "|---|---:|---:|---|---:|",
    ]  # fmt: skip
    for name, m in metrics.items():
        lines.append(
            f"| {name} | {m['base']:.4f} | {m['adapter']:.4f} | {m['ci95'][0]:+.4f} to {m['ci95'][1]:+.4f} | {m['n']} |"
        )
    lines += [
        "",
        "The same records through plain PEFT, greedy answers, same test questions:",
        "",
        "| | test accuracy |",
        "|---|---:|",
    ]
    for name in PEFT:
        if name in found:
            lines.append(f"| {name} | {100 * found[name]['test_accuracy_generated']:.1f} % |")
    lines += ["", f"Controls: {json.dumps(evidence['controls'])[:600]}", ""]
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
