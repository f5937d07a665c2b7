"""Tries to make processes that share the base learn otherwise than one that has it whole, or hold too much of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import distributed

from metier import pipeline
from metier.model import device as device_module
from metier.model import load as load_module
from metier.model.fused import fuse
from metier.model.load import empty_model, load_base
from metier.model.lora import attach
from metier.model.recompute import set_recompute
from metier.recipe import AdapterConfig, TrainConfig, load_recipe
from metier.training import ranks
from metier.training.cards import Card
from metier.training.fit import fit
from metier.training.loop import Trainer
from metier.training.memory import WEIGHT_BYTES, shape_of
from metier.training.pack import pack_batches
from metier.training.plan import Job
from metier.training.step import mean_loss, train_step
from tests.model.tiny import tiny_tokenizer
from tests.training.notes import write_project
from tests.training.test_pack import random_records
from tests.training.test_ranks import ADAPTER, ROOT, free_port, losses

LAYERS = 8
# 9 records a step: the ranks' shares, and at times the number of their passes, differ.
RECIPE = """\
base: {base}
out: {out}
data: {{sources: [notes.csv], prompt: "Condition: {{note}}", answer: chapter, val: 7, test: 8}}
adapter: {{rank: 4}}
train:
  {{epochs: 1, micro_batch_size: 9, learning_rate: 1e-3, save_every: 1, eval_every: 2, log_every: 1,
    precision: {precision}, device: cpu, micro_batch_tokens: 64, recompute: {recompute}}}
evaluate: {{bootstrap_samples: 100, forgetting: false, memorisation_items: 0, max_new_tokens: 4}}
"""
# LLaMA takes the fused path, Phi the generic one. The first is killed on the way, the last is evaluated too.
CASES = [("llama", "fp32", "none"), ("llama", "nf4", "full"), ("phi", "fp32", "full")]
# Trains on a device of so many bytes, that takes NF4 and computes in fp32; tells the bytes of all tensors.
DEVICE = """
import dataclasses, json, sys
from pathlib import Path
import torch
from metier import pipeline
from metier.model import device, load
from metier.recipe import load_recipe
from metier.terminal import Terminal
from metier.training import cards, ranks, train
from tests.training.test_shards import telling

here, stop = cards.card_here, ranks.stop
ranks.stop = lambda: None  # one group for all
torch.cpu.get_capabilities = dict
device.check_storage = load.check_storage = lambda storage, device: None
for recipe, memory in json.loads(sys.argv[1]):
    cards.card_here = train.card_here = lambda device: dataclasses.replace(here(device), memory_bytes=memory)
    with telling(recipe.replace("recipe.yaml", "held")):
        verb = pipeline.run if "phi" in recipe else pipeline.train
        verb(load_recipe(Path(recipe)), Terminal())
stop()
"""


def num_bytes() -> int:
    """Of all tensors that there are, each storage once."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not t.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextlib.contextmanager
def telling(name: str) -> Iterator[None]:
    """Writes to `name`-RANK the bytes that came with base and trainer."""
    before, begin = num_bytes(), Trainer.__post_init__

    def begun(trainer: Trainer) -> None:
        begin(trainer)
        Path(f"{name}-{ranks.rank()}").write_text(str(num_bytes() - before))

    Trainer.__post_init__ = begun  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.__post_init__ = begin  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA, which takes the fused path, and a Phi, which takes the generic one, each of 8 layers."""
    folder = tmp_path_factory.mktemp("bases")
    for kind, config in (("llama", transformers.LlamaConfig), ("phi", transformers.PhiConfig)):
        tokenizer = tiny_tokenizer("chatml")
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
        ))  # fmt: skip
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
        made.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


def shape(base: Path) -> Any:
    return shape_of(empty_model(transformers.AutoConfig.from_pretrained(base), torch.float32), AdapterConfig(rank=4))


def memory_between(base: Path, precision: str, recompute: str) -> int:
    """Bytes in which two processes' parts fit and the whole base does not."""
    config = TrainConfig(precision=precision, recompute=recompute, micro_batch_tokens=64)  # type: ignore[arg-type]
    card = Card("a CPU", 1 << 40, 0.1, 0.0, 0.1, 0.0, is_cpu=True)
    ways = fit(shape(base), Job(64, 64, 0.5, 1, dropout=False), card, config, processes=2).ways
    whole, shared = (min(w.total_bytes for w in ways if w.shared_by == n) for n in (1, 2))
    return int((whole + shared) / 2 / 0.97)


def begin(jobs: list[tuple[str, int]], script: Path) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(script), json.dumps(jobs)], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(bases: Path) -> tuple[dict[str, Path], str]:
    """Each case's folder with the runs `one` and `two`, and what the two processes said."""
    folders, jobs = {}, []
    for kind, precision, recompute in CASES:
        folder = folders[f"{kind}-{precision}"] = bases / f"{kind}-{precision}"
        for name in ("one", "two"):
            text = RECIPE.format(base=bases / kind, precision=precision, recompute=recompute, out=folder / name / "run")
            (folder / name).mkdir(parents=True, exist_ok=True)
            path = write_project(folder / name, text)
            pipeline.prepare(load_recipe(path))
        jobs.append((str(path), memory_between(bases / kind, precision, recompute)))
        with pytest.MonkeyPatch.context() as patch, telling(str(folder / "one" / "held")):
            patch.setattr(torch.cpu, "get_capabilities", dict)
            for module in (device_module, load_module):
                patch.setattr(module, "check_storage", lambda storage, device: None)
            verb = pipeline.run if kind == "phi" else pipeline.train
            verb(load_recipe(folder / "one" / "recipe.yaml"))
    (bases / "device.py").write_text(DEVICE)
    process = begin(jobs[:1], bases / "device.py")
    first = Path(jobs[0][0]).parent / "run"
    while process.poll() is None and not any(first.glob(".adapter.partial/checkpoints/step-*")):
        time.sleep(0.002)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (first / "adapter").exists(), "the run was over before it was killed"
    process = begin(jobs, bases / "device.py")
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return folders, stderr


@pytest.mark.parametrize("name", ["llama-fp32", "llama-nf4", "phi-fp32"])
def test_two_processes_that_share_the_base_learn_what_one_learns(
    trained: tuple[dict[str, Path], str], name: str
) -> None:
    one, two = (trained[0][name] / each / "run" for each in ("one", "two"))
    for number in ("loss", "val_loss", "grad_norm"):
        assert losses(two, number) == pytest.approx(losses(one, number), rel=2e-5)
    want, got = load_file(one / ADAPTER), load_file(two / ADAPTER)
    apart = torch.cat([(got[key] - t).flatten() for key, t in want.items()])
    assert float(apart.norm() / torch.cat([t.flatten() for t in want.values()]).norm()) < 1e-5
    manifest = json.loads((two / "adapter" / "manifest.json").read_text())
    assert manifest["base_is_shared"]
    assert manifest["num_processes"] == 2


def test_the_planner_shares_what_fits_shared_alone_and_the_killed_run_goes_on(
    trained: tuple[dict[str, Path], str],
) -> None:
    assert trained[1].count(", the base's layers shared by 2 processes") == len(CASES)
    assert trained[1].count("resuming after step") == 1


def test_a_shared_base_is_evaluated_shared_and_gives_the_same_evidence(trained: tuple[dict[str, Path], str]) -> None:
    assert trained[1].count("evaluating with the base's layers shared by 2 processes") == 1
    one, two = (
        json.loads((trained[0]["phi-fp32"] / each / "run" / "evidence" / "evidence.json").read_text())
        for each in ("one", "two")
    )
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, metric in one["metrics"].items():
        for side in ("base", "adapter", "n"):
            assert two["metrics"][name][side] == pytest.approx(metric[side], rel=1e-4), name
    assert (trained[0]["phi-fp32"] / "two" / "run" / "report.html").exists()


@pytest.mark.parametrize("name", ["llama-fp32", "llama-nf4", "phi-fp32"])
def test_a_process_holds_half_of_the_layers_and_two_in_full(
    trained: tuple[dict[str, Path], str], bases: Path, name: str
) -> None:
    kind, precision = name.split("-")
    layers = shape(bases / kind).layer_weights * WEIGHT_BYTES[precision]
    folder = trained[0][name]
    whole = int((folder / "one" / "held-0").read_text())
    for number in (0, 1):
        part = int((folder / "two" / f"held-{number}").read_text())
        # Norms, and NF4's padded scales, are more of so small a layer than of a real one.
        assert whole - part == pytest.approx(layers / 2 - 2 * layers / LAYERS, rel=0.15)


ON_A_CARD = [
    pytest.param("cuda", dtype, storage, marks=pytest.mark.gpu, id=f"cuda-{storage}-{dtype}".replace("torch.", ""))
    for dtype, storage in ((torch.float32, "dense"), (torch.bfloat16, "dense"), (torch.bfloat16, "fp8"),
                           (torch.bfloat16, "nf4"))
]  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("device", "dtype", "storage"), [pytest.param("cpu", torch.float32, "dense", id="cpu"), *ON_A_CARD]
)
def test_a_group_of_one_learns_what_the_whole_base_learns(
    tmp_path: Path, device: str, dtype: torch.dtype, storage: Any, recompute: str
) -> None:
    """The views, their alignment and the waiting for the gathers, on whichever device there is."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    tokenizer = tiny_tokenizer("chatml")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    where = torch.device(device)
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    learnt = []
    try:
        for shared in (False, True):
            base = load_base(tmp_path, dtype=dtype, device=where, storage=storage, shared=shared)
            adapter = attach(base.model, AdapterConfig(rank=8), seed=0)
            model = fuse(base.model, adapter, fp8_copies=1)
            assert model is not None
            model.graphs = None  # of which the shared base has none
            set_recompute(model, recompute)
            optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=1e-2, fused=device == "cuda")
            scaler = torch.amp.GradScaler(device, enabled=False)
            losses = []
            for step in range(3):
                batches = pack_batches(random_records(6, len(tokenizer), seed=step), 64, 6)
                result = train_step(
                    model, optimizer, [batch.to(where) for batch in batches], learning_rate=1e-2, max_grad_norm=1.0,
                    scaler=scaler,
                )  # fmt: skip
                losses.append(result.loss)
            losses.append(mean_loss(model, [batch.to(where) for batch in batches]))
            learnt.append((losses, adapter.tensors()))
    finally:
        distributed.destroy_process_group()
    (losses, whole), (found, shared_one) = learnt
    if device == "cuda":  # kernels that add in any order
        assert found == pytest.approx(losses, rel=1e-3)
        apart = sum(float((shared_one[name] - tensor).norm()) for name, tensor in whole.items())
        assert apart < 1e-2 * sum(float(tensor.norm()) for tensor in whole.values())
        return
    assert found == losses
    for name, tensor in whole.items():
        assert torch.equal(shared_one[name], tensor), name
