"""What FP8 and NF4 cost in quality: one training in bf16, fp8 and nf4 on a GPU, three seeds, real weights and records.

    python benchmarks/bench_quality.py --seeds 0 1 2

SmolLM2-135M-Instruct on the bundled ICD-10 terms, rank 16 on all linear layers; the test split's categories are
unseen. Each training has a process of its own (they share the GPU, and nothing is timed). It reports the loss on the
test split in the precision of the training and on the bf16 base, the chapter that has the highest log-likelihood for
each term, and how far PEFT's logits on the bf16 base are from metier's. The adapter's gradients are compared with
those on the bf16 base after one step (before it A's are zero), in the middle and at the end of the training, over
records that it trains on and over records that it never sees; those in bf16 with those in fp32: the floor. `--stage
job` (makes the records, anywhere), `train` (needs the GPU and PEFT) and `report` may run apart, over one `--folder`.
Writes benchmarks/results/quality_<machine>_<yyyymm>.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PRECISIONS = ("bf16", "fp8", "nf4")
WHEN, RECORDS, NUM_RECORDS = ("first step", "middle", "end"), ("trained on", "unseen"), 64
BASE = "smollm2-135m"
RECORDS_PER_STEP, EPOCHS, LEARNING_RATE, RANK, ALPHA = 16, 2, 1e-3, 16, 32
# Wanted: the loss's relative difference to bf16, and the gradients' cosine.
MOST_LOSS = {"fp8": 0.005, "nf4": 0.01}
LEAST_COSINE = {"fp8": 0.99}


def make_job(folder: Path) -> None:
    """Writes job.json: rendered train and test records, and the test split's prompts, answers, groups and options."""
    import polars
    import torch

    from metier import pipeline
    from metier.model.chat import Renderer, eos_token_ids
    from metier.model.load import load_base
    from metier.recipe import load_recipe
    from metier.training.labels import render_records
    from metier.training.train import read_split

    recipe = load_recipe(ROOT / "metier" / "bundled" / "icd10cm.yaml", ["data.test=600"], str(folder / "run"))
    pipeline.prepare(recipe)
    base = load_base(BASE, dtype=torch.float32, device=torch.device("cpu"))
    renderer = Renderer(base.tokenizer, eos_token_ids(base.path))
    job: dict[str, Any] = {}
    for split in ("train", "test"):
        rendered, _ = render_records(*read_split(folder / "run" / "dataset", split), renderer, train_config("bf16"))
        job[split] = [[r.input_ids, r.labels] for r in rendered]
    table = polars.read_parquet(folder / "run" / "dataset" / "records.parquet")
    test = table.filter(polars.col("split") == "test")
    job["prompts"] = [messages[:-1] for messages in test["messages"].to_list()]
    job |= {"answers": test["label"].to_list(), "groups": test["group_id"].to_list()}
    job["options"] = table["label"].unique().sort().to_list()
    (folder / "job.json").write_text(json.dumps(job, ensure_ascii=False), encoding="utf-8")


def train_config(precision: str) -> Any:
    from metier.recipe import TrainConfig

    return TrainConfig(
        epochs=EPOCHS, micro_batch_size=RECORDS_PER_STEP, learning_rate=LEARNING_RATE, precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip


def base_in(precision: str) -> Any:
    import torch

    from metier.model.device import storage_of
    from metier.model.load import load_base

    storage, dtype = storage_of(precision), torch.float32 if precision == "fp32" else torch.bfloat16  # type: ignore[arg-type]
    return load_base(BASE, dtype=dtype, device=torch.device("cuda"), storage=storage)


def work(folder: Path, precision: str, seed: int) -> None:
    """One training in this process; writes PRECISION-SEED.json."""
    from metier.model.chat import Rendered
    from metier.model.lora import attach, save_adapter
    from metier.recipe import AdapterConfig
    from metier.training.loop import Trainer
    from metier.training.schedule import make_plan, seed_of

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    train, test = ([Rendered(*record) for record in job[split]] for split in ("train", "test"))
    base, config = base_in(precision), train_config(precision)
    adapter = attach(base.model, AdapterConfig(rank=RANK, alpha=ALPHA), seed=seed_of("adapter", seed))
    plan = make_plan(config, len(train), base.config.hidden_size, base.device)
    trainer = Trainer(base, adapter, config, plan, seed, train, [], folder, print)
    base.model.train()
    marks = {1, plan.total_steps // 2, plan.total_steps}
    losses, states = [], []
    while trainer.progress.step < plan.total_steps:
        losses.append(trainer.step().loss)
        if trainer.progress.step in marks:
            states.append(adapter.tensors())
    result: dict[str, Any] = {"precision": precision, "seed": seed, "steps": len(losses), "last_loss": losses[-1]}
    result["here"] = judged(trainer.model, base, adapter, job, test)
    samples = [train[:NUM_RECORDS], test[:NUM_RECORDS]]
    mine = gradients_along(trainer.model, adapter, states, samples)
    saved = folder / f"adapter-{precision}-{seed}"
    saved.mkdir(exist_ok=True)
    save_adapter(saved, adapter, adapter.tensors(), base=str(base.path), revision=None)
    result |= on_bf16(saved, job, test)
    result["cosines"] = cosines("fp32" if precision == "bf16" else "bf16", saved, states, samples, mine)
    (folder / f"{precision}-{seed}.json").write_text(json.dumps(result))


def judged(model: Any, base: Any, adapter: Any, job: dict[str, Any], test: list[Any]) -> dict[str, Any]:
    """Loss in nats a token on the test split, and for each of its records whether the likeliest option is right."""
    from metier.model.specialist import Specialist
    from metier.training.pack import pack_batches
    from metier.training.step import mean_loss

    loss = mean_loss(model, [b.to(base.device) for b in pack_batches(test, 8192, 999)])
    scores = Specialist(base, adapter).score_choices(job["prompts"], job["options"])
    chosen = [job["options"][int(i)] for i in scores.argmax(1)]
    return {"loss": loss, "right": [int(a == b) for a, b in zip(chosen, job["answers"], strict=True)]}


def gradients_along(model: Any, adapter: Any, states: list[Any], samples: list[Any]) -> list[list[Any]]:
    """`gradients` at each of the adapter's `states` over each of the samples; leaves the last state."""
    found = []
    for state in states:
        adapter.load(state)
        found.append([gradients(model, adapter, records) for records in samples])
    return found


def gradients(model: Any, adapter: Any, records: list[Any]) -> Any:
    """The adapter's gradients over `records`, in one row, fp32, on the CPU."""
    import torch

    from metier.training.pack import pack_batches
    from metier.training.step import accumulate

    model.train()
    device = next(iter(adapter.parameters.values())).device
    weight = torch.full((), 1 / sum(r.num_loss_tokens for r in records), device=device)
    for parameter in adapter.parameters.values():
        parameter.grad = None
    for batch in pack_batches(records, 1024, 999):
        accumulate(model, batch.to(device), weight)
    return torch.cat([p.grad.flatten().float() for p in adapter.parameters.values()]).cpu()


def cosines(precision: str, saved: Path, states: list[Any], samples: list[Any], mine: list[Any]) -> list[list[float]]:
    """Cosines of `mine` to the gradients on the base in `precision`, by state and sample."""
    from torch.nn.functional import cosine_similarity

    from metier.model.fused import fuse
    from metier.model.lora import load_adapter

    base = base_in(precision)
    adapter = load_adapter(base.model, saved)
    theirs = gradients_along(fuse(base.model, adapter), adapter, states, samples)
    return [
        [float(cosine_similarity(a.double(), b.double(), dim=0)) for a, b in zip(*pair, strict=True)]
        for pair in zip(mine, theirs, strict=True)
    ]


def on_bf16(saved: Path, job: dict[str, Any], test: list[Any]) -> dict[str, Any]:
    """The saved adapter on the bf16 base: loss, choices, and logits against PEFT's."""
    import torch

    from metier.model.fused import fuse
    from metier.model.lora import load_adapter

    base = base_in("bf16")
    adapter = load_adapter(base.model, saved)
    result: dict[str, Any] = {"on_bf16": judged(fuse(base.model, adapter), base, adapter, job, test)}
    apart = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        apart[name] = peft_apart(saved, base.path, test[:16], dtype)
    return result | {"peft": apart}


def peft_apart(saved: Path, path: Path, records: list[Any], dtype: Any) -> float:
    """Norm of (PEFT's logits - metier's) over PEFT's, on the bf16 base's weights, with arithmetic in `dtype`."""
    import peft
    import torch
    import transformers

    from metier.model.lora import load_adapter

    def model_in() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        return model.to("cuda", dtype).eval()

    mine = model_in()
    load_adapter(mine, saved)
    theirs = peft.PeftModel.from_pretrained(model_in(), str(saved), autocast_adapter_dtype=False).eval().to(dtype)
    apart = whole = 0.0
    with torch.no_grad():
        for record in records:
            ids = torch.tensor([record.input_ids], device="cuda")
            want = theirs(input_ids=ids).logits.double()
            apart += float((mine(input_ids=ids).logits.double() - want).square().sum())
            whole += float(want.square().sum())
    return (apart / whole) ** 0.5


def train_all(folder: Path, seeds: list[int]) -> None:
    """All trainings side by side. Raises with the first failure's last lines."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = {}
    for seed in seeds:
        for precision in PRECISIONS:
            command = [sys.executable, __file__, "--folder", str(folder), "--work", precision, str(seed)]
            log = (folder / f"{precision}-{seed}.log").open("w")
            running[precision, seed] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    for (precision, seed), process in running.items():
        if process.wait():
            lines = (folder / f"{precision}-{seed}.log").read_text().splitlines()
            print(f"{precision}, seed {seed}, failed:", *lines[-12:], sep="\n", flush=True)
    import torch

    (folder / "card.json").write_text(json.dumps([torch.cuda.get_device_name(), torch.__version__]))


def interval(right: Any, groups: list[str]) -> tuple[float, float, float]:
    """Mean paired difference in points with its 95 % interval: `right` [seeds, records], drawn by groups."""
    import numpy as np

    names = sorted(set(groups))
    member = np.array([[group == name for group in groups] for name in names], dtype=float)
    sums, sizes = member @ right.mean(0), member.sum(1)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=10_000)
    means = 100 * (draws @ sums) / (draws @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(right.mean()), float(low), float(high)


def write_report(folder: Path, machine: str, out: Path, seeds: list[int]) -> None:
    """The tables, from what the trainings left in `folder`."""
    import numpy as np

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    card, torch_version = json.loads((folder / "card.json").read_text())
    found = {(p, s): json.loads((folder / f"{p}-{s}.json").read_text()) for p in PRECISIONS for s in seeds}
    rows, verdicts = [], []
    plain = [found["bf16", s] for s in seeds]
    base = np.array([r["here"]["loss"] for r in plain])
    for precision in PRECISIONS:
        mine = [found[precision, s] for s in seeds]
        for key, where in (("here", precision), ("on_bf16", "bf16")):
            if precision == where and key == "on_bf16":
                continue
            losses = np.array([r[key]["loss"] for r in mine])
            right = np.array([r[key]["right"] for r in mine])
            delta, low, high = interval(right - np.array([r["here"]["right"] for r in plain]), job["groups"])
            apart, mean = 100 * (losses / base - 1), 100 * (losses.mean() / base.mean() - 1)
            error = apart.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else float("nan")
            rows.append(
                f"| {precision} | {where} | {', '.join(f'{x:.4f}' for x in losses)} | "
                f"{', '.join(f'{x:+.2f}' for x in apart)} | {mean:+.2f} % (standard error {error:.2f}) | "
                f"{', '.join(f'{100 * x:.1f}' for x in right.mean(1))} | {delta:+.2f} ({low:+.2f} to {high:+.2f}) |"
            )
            if key == "here" and precision in MOST_LOSS:
                most = 100 * MOST_LOSS[precision]
                verdicts.append(
                    verdict(f"{precision}: loss within {most:.1f} % of bf16's", abs(mean) <= most, f"{mean:+.2f} %")
                )
                verdicts.append(verdict(f"{precision}: the difference's interval holds zero", low <= 0 <= high,
                                        f"{low:+.2f} to {high:+.2f} points"))  # fmt: skip
        if precision in LEAST_COSINE:
            least = min(c for r in mine for when in r["cosines"] for c in when)
            verdicts.append(verdict(f"{precision}: gradients' cosine at least {LEAST_COSINE[precision]}",
                                    least >= LEAST_COSINE[precision], f"{least:.4f}"))  # fmt: skip
    peft = {name: max(r["peft"][name] for r in found.values()) for name in ("fp32", "bf16")}
    text = f"""# FP8 and NF4 against bf16: the same training, {len(seeds)} seeds

{datetime.date.today().isoformat()}. `python benchmarks/bench_quality.py --seeds {" ".join(map(str, seeds))}`; {card}, torch {torch_version}. SmolLM2-135M-Instruct, bundled ICD-10 terms
({len(job["train"]):,} to train on, {len(job["test"])} of {len(set(job["groups"]))} unseen categories to test), rank {RANK} on all linear layers, {RECORDS_PER_STEP} records a step, \
{plain[0]["steps"]} steps, learning rate {LEARNING_RATE}.

'in' says in which precision the base stands when the adapter is judged. Loss: nats a token on the test split, seeds {", ".join(map(str, seeds))}; then its difference to bf16 of the
same seed in per cent, and that of the means, with the standard error of the seeds' differences. Right: share of terms whose chapter has the highest
log-likelihood, and the paired difference to bf16, all seeds together, with its 95 % interval (10,000 bootstrap samples by category).

| trained in | in | loss | to bf16, % | mean | right, % | right to bf16, points |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The adapter's gradients: cosine, seed by seed, of those on the base in the training's precision to those on the bf16 base at the same adapter ({NUM_RECORDS} records); for bf16
to those in fp32, which is the floor.

| trained in | to | records | {" | ".join(WHEN)} |
|---|---|---|---|---|---|
{chr(10).join(cosine_rows(found, seeds))}

PEFT's logits on the bf16 base: norm of the difference to metier's over their norm, at most {peft["fp32"]:.1e} in fp32 and {peft["bf16"]:.1e} in bf16.

| target | reached |
|---|---|
{chr(10).join(verdicts)}
"""  # noqa: E501
    out.mkdir(exist_ok=True)
    path = out / f"quality_{machine}_{datetime.date.today():%Y%m}.md"
    path.write_text(text, encoding="utf-8")
    print(text)


def cosine_rows(found: dict[tuple[str, int], Any], seeds: list[int]) -> list[str]:
    """The lines of the gradients' table."""
    rows = []
    for precision in PRECISIONS:
        for place, records in enumerate(RECORDS):
            cells = (
                ", ".join(f"{found[precision, s]['cosines'][when][place]:.4f}" for s in seeds)
                for when in range(len(WHEN))
            )
            rows.append(
                f"| {precision} | {'fp32' if precision == 'bf16' else 'bf16'} | {records} | {' | '.join(cells)} |"
            )
    return rows


def verdict(target: str, reached: bool, figure: str) -> str:
    return f"| {target} | {'yes' if reached else '**no**'}: {figure} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h100", help="in the results file's name")
    parser.add_argument("--folder", type=Path, help="where the job and the trainings' results lie")
    parser.add_argument("--stage", choices=["job", "train", "report"], help="one stage alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.work:
        return work(folder, arguments.work[0], int(arguments.work[1]))
    if arguments.stage in (None, "job"):
        make_job(folder)
    if arguments.stage in (None, "train"):
        train_all(folder, arguments.seeds)
    if arguments.stage in (None, "report"):
        write_report(folder, arguments.machine, arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
