"""What a device can do: memory, arithmetic, bandwidth. A table for cards elsewhere, a measurement for the one here.

The table holds the makers' dense figures; SUSTAINED is the share of them that one large product of matrices
reached where we measured it (H100: 720 of 989 TFLOP/s in bf16, 1,400 of 1,979 in FP8).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

from metier.errors import RecipeError, did_you_mean

SUSTAINED = 0.72
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Card:
    """`memory_bytes` in all; `half_tflops` sustained, in bf16, or fp16 without `has_bf16`; no FP8: `fp8_tflops` 0."""

    name: str
    memory_bytes: int
    half_tflops: float
    fp8_tflops: float
    fp32_tflops: float
    gb_per_s: float
    has_bf16: bool = True
    is_cpu: bool = False


# name: memory in GiB as drivers report it, bf16 (or fp16), FP8 and fp32 TFLOP/s of the data sheet, GB/s, bf16 units.
_SHEETS: dict[str, tuple[float, float, float, float, float, bool]] = {
    "h100": (79.2, 989, 1979, 67, 3350, True),
    "h200": (139.7, 989, 1979, 67, 4800, True),
    "b200": (178.0, 2250, 4500, 80, 8000, True),
    "a100-80": (79.2, 312, 0, 19.5, 2039, True),
    "a100-40": (39.4, 312, 0, 19.5, 1555, True),
    "l40s": (44.5, 362, 733, 91, 864, True),
    "l4": (22.0, 121, 242, 30, 300, True),
    "a10": (22.1, 125, 0, 31, 600, True),
    "rtx5090": (31.4, 209, 419, 105, 1792, True),
    "rtx4090": (23.6, 165, 330, 83, 1008, True),
    "rtx4080": (15.7, 97, 195, 49, 717, True),
    "rtx3090": (23.6, 71, 0, 36, 936, True),
    "t4": (14.7, 65, 0, 8, 320, False),
    "v100-16": (15.8, 125, 0, 16, 900, False),
    "v100-32": (31.7, 125, 0, 16, 900, False),
}


def card_named(name: str) -> Card:
    """A card of the table. Raises `RecipeError` for one that is not in it."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in _SHEETS:
        raise RecipeError(
            f"`--card {name}` is not in the table{did_you_mean(key, list(_SHEETS))}; it has {', '.join(_SHEETS)}",
            hint="or name the memory alone, in GiB: `--memory 16`",
        )
    gib, half, fp8, fp32, gb_per_s, has_bf16 = _SHEETS[key]
    return Card(
        key, int(gib * GIB), half * SUSTAINED, fp8 * SUSTAINED, fp32 * SUSTAINED, gb_per_s, has_bf16=has_bf16
    )  # fmt: skip


# What decides between ways to train on a CPU: relative speeds, so that the same job is always cut in the same way.
_CPU_FP32, _CPU_BF16 = 0.09, 0.3


def card_here(device: Any) -> Card:
    """The device at hand: its memory as much as is free now, its arithmetic as the table or its generation has it."""
    import torch

    if device.type != "cuda":
        # Without units for it bf16 is far slower than fp32.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
        half = _CPU_BF16 if has_bf16 else _CPU_FP32 / 9
        name = f"this CPU, {torch.get_num_threads()} threads"
        return Card(name, _free_host_memory(), half, 0.0, _CPU_FP32, 0.0, has_bf16=has_bf16, is_cpu=True)
    name = torch.cuda.get_device_name(device)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    capability = torch.cuda.get_device_capability(device)
    key = next((k for k in _SHEETS if k.partition("-")[0] in name.lower().replace(" ", "")), None)
    like = card_named(key or ("rtx4090" if capability >= (8, 9) else "a10" if capability >= (8, 0) else "t4"))
    return replace(like, name=name, memory_bytes=free)


def measured(card: Card, device: Any) -> Card:
    """`card`, the device at hand, with its arithmetic measured in a fraction of a second."""
    import torch

    half = _rate(device, torch.bfloat16 if card.has_bf16 else torch.float16) if not card.is_cpu else 0.0
    if card.is_cpu:
        half = _rate(device, torch.bfloat16) if card.has_bf16 else _rate(device, torch.float32) / 9
    fp8 = half * card.fp8_tflops / card.half_tflops
    return replace(card, half_tflops=half, fp8_tflops=fp8, fp32_tflops=_rate(device, torch.float32))


def _rate(device: Any, dtype: Any) -> float:
    """TFLOP/s of a large product of matrices: the best of three."""
    import torch

    rows, width = (8192, 4096) if device.type == "cuda" else (256, 1024)
    a = torch.randn(rows, width, device=device).to(dtype)
    w = torch.randn(width, width, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * rows * width * width / best / 1e12


def _free_host_memory() -> int:
    """Bytes that this machine can still give: /proc/meminfo's MemAvailable on Linux, else half of what there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
