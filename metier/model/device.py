"""Where a model computes and in which numbers: a recipe's `device` and `precision` on the machine at hand."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from metier.errors import ModelError
from metier.kernels.frozen import Storage
from metier.model.embedded import Progress, say
from metier.model.quantise import check_storage

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8", "nf4"]


def tokens_per_pass(device: torch.device) -> int:
    """How many tokens one forward pass takes at most when nothing else is asked for."""
    return 1024 if device.type == "cpu" else 8192


def resolve_device(name: Device) -> torch.device:
    """`auto` is the GPU when there is one. Raises `ModelError` when `cuda` is asked for and there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise ModelError(
            f"`device: cuda` was asked for, and this torch ({torch.__version__}) {reason}",
            hint="`device: auto` or `cpu` runs here; for a GPU install torch's CUDA build and check `nvidia-smi`",
        )
    _grow_segments()
    return torch.device("cuda", torch.cuda.current_device())


def _grow_segments() -> None:
    """Has torch's allocator grow its segments, unless its settings come from outside or it works already.

    Segments of fixed size leave holes that blocks of other sizes cannot use: half a GiB of LLaMA-2-7B's 6 in NF4.
    """
    is_set = any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if sys.platform == "linux" and not is_set and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def resolve_precision(name: Precision, device: torch.device, *, progress: Progress = say) -> torch.dtype:
    """The dtype of the arithmetic on `device`, and of the frozen base unless `storage_of` says otherwise.

    `auto` is bf16 where the device has units for it (compute capability 8.0 and up; AVX512-BF16 or AMX),
    else fp16 on a GPU and fp32 on a CPU. bf16 on a CPU without units is allowed, with a word of warning: it
    was measured 9 times slower than fp32. fp8 and nf4 compute in what `auto` takes. Raises `ModelError` for fp16 on a
    CPU, bf16 on an older GPU, and fp8 and nf4 where the device has no way to multiply them.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # Without the query (torch before 2.13) fp32 is the safe answer.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
    check_storage(storage_of(name), device)
    if name in ("auto", "fp8", "nf4"):
        without = torch.float16 if device.type == "cuda" else torch.float32
        return torch.bfloat16 if has_bf16 else without
    if name == "fp16" and device.type == "cpu":
        raise ModelError("`precision: fp16` needs a GPU", hint="`precision: auto` picks the fastest on this CPU")
    if name == "bf16" and not has_bf16:
        if device.type == "cuda":
            raise ModelError(
                f"`precision: bf16` needs a GPU of compute capability 8.0 or newer, and "
                f"{torch.cuda.get_device_name(device)} is older",
                hint="`precision: auto` takes fp16 on it",
            )
        progress("precision: bf16 is slow on this CPU, which has no units for it; fp32 is several times faster")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def storage_of(name: Precision) -> Storage:
    """How `precision` keeps the linear layers' weights."""
    return name if name in ("fp8", "nf4") else "dense"


def reset_peak(device: torch.device) -> None:
    """Begins to watch the peak of memory anew; where the system cannot (not Linux), it is the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held since `reset_peak`: of the GPU, or resident in the host; None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return None
