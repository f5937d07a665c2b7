"""Where the error of FP8's gradients comes from, and what NF4 costs before any training; real weights, on a CPU.

    python benchmarks/bench_rounding.py

SmolLM2-135M-Instruct, the bundled ICD-10 terms, an adapter of rank 16 trained for 75 steps in bf16. FP8's products are
emulated: weights, inputs and dY are rounded to e4m3 by the definitions of `metier.kernels.reference` and multiplied in
fp32. The cosines are of the adapter's gradients over 32 unseen records to those in fp32. NF4: loss on the two READMEs
(the base alone) and on 200 unseen records (with the adapter), each weight rounded to the nearest value, or as
metier loads it. Writes benchmarks/results/rounding_<machine>_<yyyymm>.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_quality as job
import torch

STEPS, RECORDS, UNSEEN, TOKENS = 75, 32, 200, 1024
SITES = ("q/k/v", "o", "gate/up", "down")
CPU = torch.device("cpu")


@dataclass
class Emulated:
    """weight [O, I] fp32 as the products read it; inputs and dY are rounded to e4m3 where so asked."""

    weight: torch.Tensor
    scale: torch.Tensor
    inputs: bool
    dy: bool
    column_scale: torch.Tensor | None = None
    eats_fp8: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def matmul(self, x: Any) -> torch.Tensor:
        return (rounded(x.dense) if self.inputs else x.dense) @ self.weight.T

    def matmul_t(self, grad: Any) -> torch.Tensor:
        if not self.dy:
            return grad.dense @ self.weight
        return rounded(grad.dense * self.scale) @ (self.weight / self.scale[:, None])


def rounded(x: torch.Tensor) -> torch.Tensor:
    from metier.kernels.reference import quantise_rows

    values, scale = quantise_rows(x)
    return values.float() * scale


def in_fp8(weight: torch.Tensor, parts: tuple[str, ...] = ("weights", "inputs", "dY")) -> Emulated:
    from metier.kernels.reference import quantise_rows

    used = rounded(weight) if "weights" in parts else weight
    return Emulated(used, quantise_rows(weight)[1][:, 0], "inputs" in parts, "dY" in parts)


def base_in(dtype: torch.dtype, storage: str = "dense") -> Any:
    from metier.model import load

    load.check_storage = lambda storage, device: None  # nf4 on a CPU, for this comparison
    return load.load_base(job.BASE, dtype=dtype, device=CPU, storage=storage)  # type: ignore[arg-type]


def trained(folder: Path, train: list[Any]) -> list[dict[str, torch.Tensor]]:
    """The adapter after one step and after `STEPS`, in bf16."""
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig
    from metier.training.loop import Trainer
    from metier.training.schedule import make_plan, seed_of

    base, config = base_in(torch.bfloat16), job.train_config("bf16")
    adapter = attach(base.model, AdapterConfig(rank=job.RANK, alpha=job.ALPHA), seed=seed_of("adapter", 0))
    plan = make_plan(config, len(train), base.config.hidden_size, base.device)
    trainer = Trainer(base, adapter, config, plan, 0, train, [], folder, print)
    base.model.train()
    states = []
    while trainer.progress.step < STEPS:
        trainer.step()
        if trainer.progress.step in (1, STEPS):
            states.append(adapter.tensors())
    return states


def attached(base: Any) -> tuple[Any, Any]:
    from metier.model.fused import fuse
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig

    adapter = attach(base.model, AdapterConfig(rank=job.RANK, alpha=job.ALPHA), seed=0)
    return fuse(base.model, adapter), adapter


def cases() -> dict[str, Callable[[int, str, torch.Tensor], Any]]:
    """What each row of the table puts in the place of a layer's weight: of the layer's number, the site's name, W."""
    from metier.kernels.frozen import DenseWeight

    found: dict[str, Callable[[int, str, torch.Tensor], Any]] = {"fp8, as trained": lambda i, n, w: in_fp8(w)}
    for part in ("weights", "inputs", "dY"):
        found[f"{part} alone"] = lambda i, n, w, part=part: in_fp8(w, (part,))
    for site in SITES:
        found[f"{site} alone"] = lambda i, n, w, site=site: in_fp8(w) if n == site else DenseWeight(w)
    for first in (0, 10, 20):
        found[f"layers {first} to {first + 9} alone"] = lambda i, n, w, first=first: (
            in_fp8(w) if first <= i < first + 10 else DenseWeight(w)
        )
    for count in (1, 3, 5):
        found[f"all but the first {count}"] = lambda i, n, w, count=count: in_fp8(w) if i >= count else DenseWeight(w)
    return found


def cosine_rows(states: list[Any], records: list[Any]) -> list[str]:
    from torch.nn.functional import cosine_similarity

    wide = base_in(torch.bfloat16)
    wide.model.float()
    model, adapter = attached(wide)
    weights = [[site.weight for site in layer.sites] for layer in model.layers]
    want = [grads[0] for grads in job.gradients_along(model, adapter, states, [records])]

    def row(name: str, model: Any, adapter: Any) -> str:
        mine = [grads[0] for grads in job.gradients_along(model, adapter, states, [records])]
        found = [float(cosine_similarity(a.double(), b.double(), dim=0)) for a, b in zip(mine, want, strict=True)]
        print(name, found, flush=True)
        return f"| {name} | {' | '.join(f'{c:.4f}' for c in found)} |"

    rows = [row("bf16 (the floor)", *attached(base_in(torch.bfloat16)))]
    for name, put in cases().items():
        for i, layer in enumerate(model.layers):
            for site, label, weight in zip(layer.sites, SITES, weights[i], strict=True):
                site.weight = put(i, label, weight.weight)
        rows.append(row(name, model, adapter))
    return rows


def loss_rows(state: dict[str, torch.Tensor], records: list[Any]) -> list[str]:
    from metier.model.quantise import quantise_model
    from metier.training.pack import pack_batches
    from metier.training.step import mean_loss

    rows: list[str] = []
    for name, storage in (("bf16's weights", "dense"), ("nf4, nearest", "nearest"), ("nf4, as loaded", "nf4")):
        base = base_in(torch.bfloat16 if storage != "nf4" else torch.float32, "nf4" if storage == "nf4" else "dense")
        base.model.float()
        if storage == "nearest":
            quantise_model(base.model, "nf4")
        found = []
        for file in ("README.md", "README.zh-CN.md"):
            ids = base.tokenizer((job.ROOT / file).read_text(encoding="utf-8"), return_tensors="pt").input_ids
            with torch.no_grad():
                found.append(float(base.model(ids[:, :TOKENS], labels=ids[:, :TOKENS]).loss))
        model, adapter = attached(base)
        adapter.load(state)
        found.append(mean_loss(model, pack_batches(records, TOKENS, 999)))
        print(name, found, flush=True)
        rows.append(f"| {name} | {' | '.join(f'{x:.4f}' for x in found)} |")
    return rows


def main() -> None:
    from metier.model.chat import Rendered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="cpu2", help="in the results file's name")
    parser.add_argument("--folder", type=Path, help="where the records lie, or are made")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    if not (folder / "job.json").is_file():
        job.make_job(folder)
    made = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    train, test = ([Rendered(*record) for record in made[split]] for split in ("train", "test"))
    states = trained(folder, train)
    losses = loss_rows(states[-1], test[RECORDS : RECORDS + UNSEEN])
    cosines = cosine_rows(states, test[:RECORDS])
    text = f"""# What FP8's and NF4's rounding does to SmolLM2-135M, on a CPU

{datetime.date.today().isoformat()}. `python benchmarks/bench_rounding.py`; {torch.get_num_threads()} cores, torch {torch.__version__}. FP8 emulated in fp32, see the script. An adapter of rank {job.RANK}
trained in bf16 on the bundled ICD-10 terms.

The adapter's gradients over {RECORDS} unseen records: cosine to fp32's at the same adapter. 'alone': only that is in e4m3.

| in e4m3 | after step 1 | after step {STEPS} |
|---|---|---|
{chr(10).join(cosines)}

Loss in nats a token, arithmetic in fp32: the base on the first {TOKENS:,} tokens of each README, and with the adapter after {STEPS} steps on {UNSEEN} unseen records.

| weights | English | Chinese | records |
|---|---|---|---|
{chr(10).join(losses)}
"""  # noqa: E501
    path = job.ROOT / "benchmarks" / "results" / f"rounding_{arguments.machine}_{datetime.date.today():%Y%m}.md"
    path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
