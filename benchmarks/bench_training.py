"""LoRA training speed on one CUDA GPU: metier beside PEFT, PEFT + Liger and Unsloth, each in a process of its own.

    python benchmarks/bench_training.py all                   # every row that can run here, and the results file
    python benchmarks/bench_training.py metier_fp8 peft ...   # some rows, printed
    python benchmarks/bench_training.py report FILE           # the results file from lines that rows printed
    SHAPE=7b|8b|smol|70b BATCH=16 SEQ=512 STEPS=8             # environment of those
    python benchmarks/bench_training.py metier_fp8@8b metier_bf16@7b,2,4096     # shape, batch and length for one row
    MORE="4x2048 2x4096 1x8192"                               # a row measures these as well, in the same process

Rows that fit the card's memory together start together, and each waits after its warm-up until it is its turn: then the
card is its alone.

Random weights of the shape (speed does not depend on them), all-linear r=16, alpha 32, no dropout, fused AdamW, loss on
every token. A row: the median step's tokens/s, peak memory from torch's allocator, and mfu: the arithmetic of forward
and dX (no weight gradients, causal attention, no recomputation) over 989 TFLOP/s, the H100's dense bf16 peak.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "training_h100_202611.md"
RANK, ALPHA, WARM_UP = 16, 32, 4
# vocabulary, hidden, intermediate, layers, heads, key/value heads
SHAPES = {
    "7b": (32000, 4096, 11008, 32, 32, 32), "8b": (128256, 4096, 14336, 32, 32, 8),
    "smol": (49152, 576, 1536, 30, 9, 3), "70b": (32000, 8192, 28672, 80, 64, 8),
}  # fmt: skip
SHAPE = os.environ.get("SHAPE", "7b")
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = SHAPES[SHAPE]
BATCH, SEQ, STEPS = (int(os.environ.get(name, value)) for name, value in (("BATCH", 16), ("SEQ", 512), ("STEPS", 8)))
SAVED = Path(tempfile.gettempdir()) / f"llama-{SHAPE}"
H100_BF16 = 989e12
STARTED = time.time()


def config() -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=SHAPE == "smol",
    )  # fmt: skip


def build(storage: str = "dense") -> Any:
    """The model with random bf16 weights on the GPU, made module by module, so that 70B in NF4 fits."""
    import torch
    import transformers

    from metier.model.quantise import quantise_linear

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            value = value.fill_(1.0) if value.dim() == 1 else value.normal_(0, 0.02)
            setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
            del value  # which quantising is to free
        if isinstance(module, torch.nn.Linear) and module is not head and storage != "dense":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantise_linear(module, storage))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to("cuda")
    return model


def token_flops() -> float:
    """Operations a token: forward and dX of the linear layers and the head, causal attention forward and 2.5x back."""
    size = HIDDEN // HEADS
    linear = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * size + 3 * HIDDEN * INNER)
    return 4 * (linear + VOCAB * HIDDEN) + 3.5 * LAYERS * 2 * SEQ * HIDDEN


def batches() -> Iterator[Any]:
    import torch

    generator = torch.Generator(device="cuda").manual_seed(0)
    while True:
        yield torch.randint(5, min(VOCAB, 31000), (BATCH, SEQ), device="cuda", generator=generator)


def wait_for_turn() -> None:
    """Tells the parent that this row is warm, and waits until it may have the card, which it then keeps."""
    print("WARM", flush=True)
    if os.environ.pop("TURNS", None):
        sys.stdin.readline()


def measure(name: str, step: Callable[[Any], Any]) -> None:
    import torch

    ids = batches()
    tick = time.time()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(next(ids))
    torch.cuda.synchronize()
    first = time.time()
    for _ in range(WARM_UP - 1):
        step(next(ids))
    torch.cuda.synchronize()
    warm = time.time() - tick
    wait_for_turn()
    for _ in range(WARM_UP):
        loss = step(next(ids))
    pairs = []
    for _ in range(STEPS):
        some = next(ids)
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        loss = step(some)
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairs)
    rate = BATCH * SEQ / times[len(times) // 2] * 1e3
    row = {
        "name": name, "shape": SHAPE, "batch": BATCH, "seq": SEQ, "tok_s": round(rate),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "mfu": round(rate * token_flops() / H100_BF16, 3), "ms": round(times[len(times) // 2], 1),
        "ms_min_max": [round(times[0], 1), round(times[-1], 1)], "warm_up_s": round(warm, 1),
        "first_step_s": round(first - STARTED, 1),
        "loss": round(float(loss), 3),
    }  # fmt: skip
    print("ROW " + json.dumps(row), flush=True)
    if os.environ.get("PROFILE"):
        profile(name, step, next(ids))


def measure_sizes(name: str, step: Callable[[Any], Any]) -> None:
    """`measure` at BATCH x SEQ and then at the sizes of MORE."""
    global BATCH, SEQ
    measure(name, step)
    for size in os.environ.get("MORE", "").split():
        BATCH, SEQ = map(int, size.split("x"))
        measure(name, step)


KINDS = (
    ("attention", ("flash", "fmha", "attention", "cudnn::fusion")),
    ("quantise, norm and LoRA down", ("_project_rows", "_scaled_rows", "_norm_backward", "_row_means")),
    ("SwiGLU", ("_swiglu",)), ("rotary", ("_rotate",)), ("residual and LoRA up", ("_add_low_rank",)),
    ("weights: dequantise, transpose", ("_dequantise", "_transpose")), ("loss", ("_cross_entropy",)),
    ("optimizer", ("multi_tensor", "fused_adam")), ("products", ("gemm", "nvjet", "cutlass", "splitk", "gemv")),
)  # fmt: skip


def profile(name: str, step: Callable[[Any], Any], ids: Any) -> None:
    """Kernel time of one step by kind, and the gaps between kernels."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step(ids)
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    time_of: Counter[str] = Counter()
    count_of: Counter[str] = Counter()
    for event in events:
        time_of[event.name] += event.time_range.elapsed_us()
        count_of[event.name] += 1
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    kinds: Counter[str] = Counter()
    for kernel, us in time_of.items():
        kinds[next((kind for kind, words in KINDS if any(w in kernel.lower() for w in words)), "other")] += us
    kinds["gaps"] = span - sum(time_of.values())
    print("PROFILE " + json.dumps({"name": name} | {k: round(v / 1e3, 1) for k, v in kinds.most_common()}), flush=True)
    for kernel, us in time_of.most_common(int(os.environ["PROFILE"])):
        print(f"  {us / 1e3:8.2f} ms {count_of[kernel]:5d}x  {kernel[:130]}", flush=True)


def trainer(storage: str, *, recompute: str = "none", copies: int = 2) -> Callable[[list[Any]], Any]:
    """metier's own training step over a model of the shape: packed batches -> loss."""
    import torch

    from metier.model.device import resolve_device
    from metier.model.fused import fuse
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig
    from metier.training.step import train_step

    resolve_device("cuda")
    model = build(storage)
    adapter = attach(model, AdapterConfig(rank=RANK, alpha=ALPHA), seed=0)
    fused = fuse(model, adapter, recompute=recompute, fp8_copies=copies)
    assert fused is not None
    torch.cuda.empty_cache()
    optimizer = torch.optim.AdamW(list(adapter.parameters.values()), lr=2e-4, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    model.train()
    return lambda parts: train_step(fused, optimizer, parts, learning_rate=2e-4, max_grad_norm=1.0, scaler=scaler).loss


def metier(name: str, storage: str = "dense", *, micro: int = 1, **options: Any) -> None:
    """`micro` passes a step, of equal size."""
    import torch

    from metier.training.pack import PackedBatch

    train = trainer(storage, **options)

    def packed(ids: Any) -> Any:
        rows, seq = ids.shape
        positions = torch.arange(seq, device="cuda").repeat(rows)[None]
        at = torch.arange(rows * seq, device="cuda").view(rows, seq)[:, :-1].flatten()
        return PackedBatch(ids.reshape(1, -1), positions, at, ids[:, 1:].flatten(), (seq,) * rows)

    measure_sizes(name, lambda ids: train([packed(part) for part in ids.chunk(micro)]))


def uneven_lengths(num: int) -> list[int]:
    """Tokens of instruction records: lognormal, median 150, clipped at 512."""
    import numpy as np

    generator = np.random.default_rng(1)
    return np.clip(generator.lognormal(np.log(150), 0.6, num).astype(int), 24, 512).tolist()


def metier_uneven(name: str, storage: str = "dense", records: int = 48) -> None:
    """The tutorial's uneven job through metier's own loop, graphs' recording and host time included: real tokens/s."""
    import torch

    from metier.model.chat import Rendered
    from metier.model.device import resolve_device
    from metier.model.load import Base
    from metier.model.lora import attach
    from metier.recipe import AdapterConfig, TrainConfig
    from metier.training.loop import Trainer
    from metier.training.schedule import make_plan

    device = resolve_device("cuda")
    kind: Any = storage
    base = Base(build(storage), None, Path("none"), "random", None, "", torch.bfloat16, device, kind)
    adapter = attach(base.model, AdapterConfig(rank=RANK, alpha=ALPHA), seed=0)
    given = [Rendered(row["input_ids"], row["input_ids"]) for row in uneven_records(records * 15 * STEPS)]
    config = TrainConfig(micro_batch_size=records, micro_batch_tokens=12288, epochs=1)
    plan = make_plan(config, len(given), HIDDEN, device)
    trainer = Trainer(base, adapter, config, plan, 0, given, [], Path("none"), print)
    torch.cuda.empty_cache()
    base.model.train()
    for _ in range(6 * STEPS):
        trainer.step()
    wait_for_turn()
    trainer.step()
    rates = []
    for _ in range(8 * STEPS):
        tick = time.perf_counter()
        tokens = trainer.step().num_tokens
        rates.append((time.perf_counter() - tick, tokens))
    seconds, tokens = (sum(column) for column in zip(*rates, strict=True))
    middle = sorted(took / num for took, num in rates)[len(rates) // 2]
    row = {"name": name, "shape": SHAPE, "records_a_step": records, "real_tok_s": round(tokens / seconds),
           "median_step_tok_s": round(1 / middle), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
           "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "steps": len(rates)}  # fmt: skip
    print("ROW " + json.dumps(row), flush=True)


def plain_loop(name: str, model: Any) -> None:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    model.train()

    def step(ids: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    measure_sizes(name, step)


def peft_model(*, checkpointing: bool = False) -> Any:
    import peft

    model = build()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def liger() -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    plain_loop("PEFT + Liger", peft_model())


def unsloth_model(checkpointing: Any, *, four_bit: bool = False) -> tuple[Any, Any]:
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(SAVED), max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=four_bit, local_files_only=True
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, target_modules=targets, lora_alpha=ALPHA, lora_dropout=0, bias="none",
        use_gradient_checkpointing=checkpointing, random_state=0,
    )  # fmt: skip
    return model, tokenizer


def trained_by(trainer: Any, name: str, *, skip: int = 4) -> None:
    """Real tokens/s of a transformers trainer's steps after the first `skip`, by its own count without padding."""
    import torch
    from transformers import TrainerCallback

    marks: list[tuple[float, int]] = []

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))
            if len(marks) == skip:
                wait_for_turn()
                marks[-1] = (time.perf_counter(), marks[-1][1])

    trainer.add_callback(Marks())
    trainer.train()
    seconds, tokens = (b - a for a, b in zip(marks[skip - 1], marks[-1], strict=True))
    row = {"name": name, "shape": SHAPE, "records_a_step": 16, "real_tok_s": round(tokens / seconds),
           "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
           "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "steps": len(marks) - skip}  # fmt: skip
    print("ROW " + json.dumps(row), flush=True)


def uneven_records(num: int) -> list[dict[str, list[int]]]:
    import torch

    return [{"input_ids": torch.randint(5, min(VOCAB, 31000), (n,)).tolist()} for n in uneven_lengths(num)]


def tutorial_uneven() -> None:
    """The tutorial's recipe on the uneven job: PEFT + Trainer, fp16, q and v of rank 8, 4 records x 4 accumulated."""
    import peft
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(SAVED)
    tokenizer.pad_token = tokenizer.eos_token
    adapter = peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], bias="none", task_type="CAUSAL_LM"
    )
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=4 + STEPS,
        learning_rate=2e-4, fp16=True, save_strategy="no", report_to=[], include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    trained_by(
        Trainer(
            model=peft.get_peft_model(build().half(), adapter), args=arguments,
            train_dataset=uneven_records(16 * (4 + STEPS)),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        ),
        "the tutorial's recipe (PEFT + Trainer, fp16), uneven records",
    )  # fmt: skip


def unsloth_uneven() -> None:
    """Unsloth's packing through TRL's trainer, 8,192 tokens a step, no checkpointing."""
    model, tokenizer = unsloth_model(False)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=4, max_length=2048, packing=True, max_steps=4 + STEPS,
        learning_rate=2e-4, bf16=True, save_strategy="no", report_to=[], gradient_checkpointing=False,
        include_num_input_tokens_seen="non_padding",
    )  # fmt: skip
    records = Dataset.from_list(uneven_records(64 * (4 + STEPS)))
    trained_by(
        SFTTrainer(model=model, args=arguments, train_dataset=records, processing_class=tokenizer),
        "Unsloth, packing, uneven records",
    )


def save() -> None:
    """The random model and a tokenizer on disk, for peers that load from there alone."""
    from tests.model.tiny import tiny_tokenizer

    build().save_pretrained(SAVED, max_shard_size="4GB")
    tiny_tokenizer("llama2").save_pretrained(SAVED)
    print("saved", flush=True)


ROWS: dict[str, Callable[[], None]] = {
    "save": save,
    "peft": lambda: plain_loop("PEFT, bf16 autocast", peft_model()),
    "peft_ckpt": lambda: plain_loop("PEFT, checkpointing", peft_model(checkpointing=True)),
    "liger": liger,
    "unsloth": lambda: plain_loop("Unsloth, no checkpointing", unsloth_model(False)[0]),
    "unsloth_ckpt": lambda: plain_loop("Unsloth, its checkpointing", unsloth_model("unsloth")[0]),
    "unsloth_4bit": lambda: plain_loop("Unsloth 4-bit, its checkpointing", unsloth_model("unsloth", four_bit=True)[0]),
    "tutorial_uneven": tutorial_uneven,
    "unsloth_uneven": unsloth_uneven,
    "metier_bf16": lambda: metier("metier bf16"),
    "metier_fp8": lambda: metier("metier fp8", "fp8"),
    "metier_fp8_one": lambda: metier("metier fp8, one copy", "fp8", copies=1),
    "metier_fp8_16g": lambda: metier("metier fp8 in 16 GiB", "fp8", copies=1, micro=4),
    "metier_fp8_16g_mlp": lambda: metier("metier fp8, MLP computed again", "fp8", copies=1, micro=2, recompute="mlp"),
    "metier_nf4": lambda: metier("metier nf4", "nf4"),
    "metier_nf4_6g": lambda: metier("metier nf4 in 6 GiB", "nf4", recompute="layer", micro=2),
    "metier_nf4_6g_4": lambda: metier("metier nf4, four passes", "nf4", recompute="layer", micro=4),
    "metier_nf4_layer": lambda: metier("metier nf4, layers computed again", "nf4", recompute="layer"),
    "metier_uneven_bf16": lambda: metier_uneven("metier bf16, uneven records"),
    "metier_uneven_fp8": lambda: metier_uneven("metier fp8, uneven records", "fp8"),
}


# GiB that a row takes of the card at most; 74 where it is not known.
GIB = {
    "metier_bf16": 39, "metier_fp8": 39, "metier_fp8_16g": 17, "metier_nf4_6g": 9, "metier_nf4_6g_4": 9,
    "metier_uneven_fp8": 44, "metier_uneven_bf16": 44, "metier_nf4": 40, "save": 17, "unsloth": 48, "unsloth_ckpt": 19,
    "unsloth_4bit": 12, "liger": 58, "tutorial_uneven": 34, "unsloth_uneven": 48,
}  # fmt: skip


class Row:
    """A row in a process of its own: NAME or NAME@SHAPE or NAME@SHAPE,BATCH,SEQ."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        name, _, sizes = spec.partition("@")
        names = dict(zip(("SHAPE", "BATCH", "SEQ"), sizes.split(","), strict=False)) if sizes else {}
        self.gib = self.gib_of(spec)
        self.deadline = time.time() + float(os.environ.get("EACH", 150))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "one", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env=os.environ | {"TURNS": "1"} | names,
        )  # fmt: skip
        self.lines: list[str] = []
        self.is_warm = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    @staticmethod
    def gib_of(spec: str) -> int:
        name, _, sizes = spec.partition("@")
        shape = sizes.split(",")[0] or SHAPE
        return 10 if shape == "smol" else GIB.get(name, 74) if shape == "7b" else 74

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("WARM"):
                self.is_warm.set()
        self.is_warm.set()

    def result(self) -> list[str]:
        """Lets the row measure, once it is warm; its lines, or one that says how it failed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.close()
            self.process.wait(max(1.0, self.deadline - time.time()))
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
        self.reader.join(5)
        kept = [line for line in self.lines if line.startswith(("ROW", "PROFILE", "  ", "saved"))]
        if kept:
            return kept
        self.errors.seek(0)
        reason = self.errors.read().strip()[-int(os.environ.get("TRACE", 200)) :] or "took too long"
        return [f"MISSING {self.spec}: {reason}"]


def run_rows(specs: list[str]) -> list[str]:
    """The rows' lines. Rows that fit together start together; then each has the card for itself."""
    lines: list[str] = []
    waiting = list(specs)
    while waiting:
        tick, group = time.time(), [Row(waiting.pop(0))]
        while waiting and "save" not in group[0].spec:
            row_gib = Row.gib_of(waiting[0])
            if sum(row.gib for row in group) + row_gib > 74:
                break
            group.append(Row(waiting.pop(0)))
        for row in group:
            row.is_warm.wait(max(1.0, row.deadline - time.time()))
            if not any(line.startswith("WARM") for line in row.lines):
                row.process.kill()
        for row in group:
            found = row.result()
            lines += found
            print("\n".join(found), f"[{row.spec}, {time.time() - tick:.0f} s]", flush=True)
    return lines


def missing_peers() -> list[str]:
    return [name for name in ("peft", "liger_kernel", "unsloth") if importlib.util.find_spec(name) is None]


def write_report(lines: list[str]) -> None:
    """The results file: a table of the rows, the kernel time by kind where it was taken, and what failed."""
    decode = json.JSONDecoder().raw_decode
    rows = [decode(line[4:])[0] for line in lines if line.startswith("ROW ")]
    kinds = [decode(line[8:])[0] for line in lines if line.startswith("PROFILE ")]
    text = [
        "# LoRA training on one H100: metier and its peers", "",
        "`python benchmarks/bench_training.py`; random weights of the shape, all-linear r=16, alpha 32, no dropout,",
        "fused AdamW, loss on every token, each row in a process of its own, the median of 8 steps. mfu: arithmetic",
        "of forward and dX over 989 TFLOP/s (bf16's peak, also in the rows that multiply in FP8).", "",
        "| row | shape | records x tokens | tokens/s | ms a step (least, most) | peak GiB | reserved GiB | mfu |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        if "tok_s" in row:
            low, high = row["ms_min_max"]
            text.append(
                f"| {row['name']} | {row['shape']} | {row['batch']} x {row['seq']} | {row['tok_s']:,} | "
                f"{row['ms']} ({low}, {high}) | {row['peak_gib']} | {row.get('reserved_gib', '')} | {row['mfu']} |"
            )
    for row in rows:
        if "real_tok_s" in row:
            text.append(
                f"| {row['name']} | {row['shape']} | {row['records_a_step']} uneven | {row['real_tok_s']:,} | | "
                f"{row['peak_gib']} | | |"
            )
    for entry in kinds:
        parts = ", ".join(f"{kind} {ms}" for kind, ms in entry.items() if kind != "name")
        text += ["", f"Kernel time of one step of {entry['name']}, ms: {parts}."]
    text += [
        "",
        "A CUDA graph (SmolLM2; 2,048 tokens of 7B) uses memory that the allocator's peak does not count: there the",
        "peak is too low, and reserved is the measure.",
    ]
    failed = [line for line in lines if line.startswith("MISSING")]
    text += ["", *(f"- not measured: {line[8:].split(':')[0]}" for line in failed)] if failed else []
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    names = sys.argv[1:]
    if names[:1] == ["one"]:
        ROWS[names[1]]()
        return
    if names[0] == "report":
        write_report(Path(names[1]).read_text().splitlines())
        return
    if missing := missing_peers():
        print(f"not installed, so without a row: {', '.join(missing)}")
    lines = run_rows(names if names != ["all"] else list(ROWS))
    if names == ["all"]:
        write_report(lines)


if __name__ == "__main__":
    main()
