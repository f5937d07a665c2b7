"""The fastest way to train that fits: precision of the base, recomputation, tokens in a pass.

Memory is `metier.training.memory`'s. Time is a roofline: the arithmetic of the frozen layers over the device's
sustained rate, times the share of it that such a loop reaches. Speed is an estimate, memory the promise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from metier.recipe import TrainConfig
from metier.training.cards import GIB, Card
from metier.training.memory import LEAN_FP8, SAVED, WEIGHT_BYTES, Shape, activation_bytes, loss_bytes

# CUDA's context, cuBLAS' workspace, and what the allocator cannot use between its blocks.
CONTEXT_BYTES, FRAGMENTATION = int(0.6 * GIB), 0.03
# The ways to recompute that a path has.
RECOMPUTE = {"generic": ("none", "full"), "fused": ("none", "mlp", "full")}
# Of a device's memory: a desktop, a monitoring tool and a record longer than all before want some too.
USED_AT_MOST = 0.97
BUDGETS = (16384, 8192, 4096, 2048, 1024, 512, 256)
# Share of the device's sustained arithmetic that the loop's large products reach, all else included.
EFFICIENCY = {"generic": 0.45, "fused": 0.75}
# Between cards that share a base: PCIe 4.0 with 16 lanes; NVLink has many times that.
LINK_GB_PER_S = 25
# A pass of this many tokens runs at half its speed: launches on a GPU, everything that is not a product on a CPU.
HALF_SPEED_TOKENS = {"gpu": 800, "cpu": 50}


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained: the records' mean and greatest length in tokens, the share with loss, and the step's records."""

    mean_tokens: float
    longest: int
    loss_share: float
    records_per_pass: int
    dropout: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to train, and what it costs a process: memory in bytes by part, and tokens/s (an estimate).

    `shared_by` is the number of processes over which the base's layers are divided.
    """

    precision: str
    recompute: str
    micro_batch_tokens: int
    memory: dict[str, int]
    tok_per_sec: float
    shared_by: int = 1

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())


def cost(shape: Shape, job: Job, card: Card, *, precision: str, recompute: str, budget: int) -> Choice:
    """Memory and speed of one way to train."""
    element = 4 if precision == "fp32" else 2
    tokens = _tokens(job, budget)
    loss_tokens = int(tokens * job.loss_share)
    weights = shape.layer_weights * WEIGHT_BYTES[precision] + shape.other_weights * element
    widest = max(2 * shape.mlp, 3 * shape.query, 2 * shape.hidden)
    memory = {
        "frozen base": weights,
        "adapter, gradients, Adam": shape.adapter_weights * 16,
        "activations": activation_bytes(shape, element, tokens, recompute=recompute, dropout=job.dropout),
        "loss": loss_bytes(shape, element, loss_tokens),
        "workspace": tokens * widest * element * (3 if job.dropout else 1)
        + (2 * shape.hidden * shape.mlp if precision == "nf4" else 0),
    }  # fmt: skip
    if not card.is_cpu:
        memory["CUDA and fragmentation"] = CONTEXT_BYTES + FRAGMENTATION * sum(memory.values())
    rate = _tok_per_sec(shape, job, card, precision=precision, recompute=recompute, tokens=tokens)
    return Choice(precision, recompute, budget, {k: int(v) for k, v in memory.items()}, rate)


def _tokens(job: Job, budget: int) -> int:
    """What a pass really has of the tokens that it may have."""
    return int(min(max(budget, job.longest), max(job.records_per_pass * job.mean_tokens, job.longest)))


def share(way: Choice, shape: Shape, job: Job, processes: int) -> Choice:
    """`way` with the base's layers divided over `processes`: each holds its part and two layers in full.

    They travel twice a pass, while the card computes, so that the slower of the two decides.
    """
    layers = shape.layer_weights * WEIGHT_BYTES[way.precision]
    less = layers - layers / processes - 2 * layers / shape.num_layers
    memory = way.memory | {"frozen base": int(way.memory["frozen base"] - less)}
    if (rest := "CUDA and fragmentation") in memory:
        memory[rest] -= int(FRAGMENTATION * less)
    tokens = _tokens(job, way.micro_batch_tokens)
    travel = 2 * layers * (processes - 1) / processes / (LINK_GB_PER_S * 1e9)
    rate = tokens / max(tokens / way.tok_per_sec, travel)
    return replace(way, memory=memory, tok_per_sec=rate, shared_by=processes)


def _tok_per_sec(shape: Shape, job: Job, card: Card, *, precision: str, recompute: str, tokens: int) -> float:
    """Roofline: the frozen layers' products, forward, backward and once more; attention; the head where loss is."""
    # Gate and up are 45 % of a LLaMA layer's arithmetic.
    passes = {"none": 2.0, "mlp": 2.45, "full": 3.0}[recompute]
    half = card.half_tflops if precision != "fp32" else card.fp32_tflops
    is_8_bit = precision in ("fp8", LEAN_FP8, "nf4") and shape.path == "fused" and card.fp8_tflops > 0
    fast = card.fp8_tflops * (1.0 if precision == "fp8" else 0.95) if is_8_bit else half
    head = 4 * job.loss_share * shape.vocabulary * shape.hidden
    span = tokens if SAVED[shape.path].dense_mask else job.mean_tokens / 2
    attention = 4 * shape.num_layers * shape.query * span * (passes + 1.5)
    seconds = passes * 2 * shape.layer_weights / fast + (head + 6 * shape.adapter_weights) / half
    seconds += attention / (card.fp32_tflops if card.is_cpu else half / 2)
    if precision == "nf4":  # each pass over the tokens writes and reads every weight once more
        seconds += passes * 5 * shape.layer_weights / tokens / (card.gb_per_s or 3000) * 1e3
    full_speed = EFFICIENCY[shape.path] if not card.is_cpu else 0.85
    speed = tokens / (tokens + HALF_SPEED_TOKENS["cpu" if card.is_cpu else "gpu"])
    return 1e12 / seconds * full_speed * speed


def choices(
    shape: Shape, job: Job, card: Card, config: TrainConfig, precisions: list[str], *, shared_by: int = 1
) -> list[Choice]:  # fmt: skip
    """Every way that `config` leaves open, fitting or not: precision x recomputation x tokens in a pass.

    `shared_by` processes divide the base, which then has no second, transposed copy in fp8.
    """
    budgets = BUDGETS if config.micro_batch_tokens == "auto" else (config.micro_batch_tokens,)
    largest = 1024 if card.is_cpu else BUDGETS[0]
    modes = RECOMPUTE[shape.path] if config.recompute == "auto" else (config.recompute,)
    ways = [
        cost(shape, job, card, precision=precision, recompute=recompute, budget=budget)
        for precision in precisions
        for recompute in modes
        for budget in budgets
        if budget <= largest or config.micro_batch_tokens != "auto"
    ]
    if shared_by == 1:
        return ways
    return [share(way, shape, job, shared_by) for way in ways if way.precision != "fp8"]


def best(ways: list[Choice], memory_bytes: int) -> Choice | None:
    """The fastest way that fits, with a little to spare, the leaner of near equals; None when none fits."""
    fitting = [way for way in ways if way.total_bytes <= USED_AT_MOST * memory_bytes]
    if not fitting:
        return None
    fastest = max(way.tok_per_sec for way in fitting)
    near = [way for way in fitting if way.tok_per_sec >= 0.98 * fastest]
    return min(near, key=lambda way: way.total_bytes)
