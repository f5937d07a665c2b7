"""Tries to make a Triton kernel differ from its plain-PyTorch definition: odd shapes, ranks 1 to 256, poisoned outputs.

Runs on a GPU; with TRITON_INTERPRET=1 the small shapes run on a CPU as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from metier.kernels import reference
from metier.kernels.reference import Heads, Rotation
from tests.kernels.bounds import close, rows_close, size_of_gradient, size_of_low

IS_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
QUANTISE = [False] if IS_INTERPRETED and os.environ.get("NO_FP8") else [False, True]
ROWS = [(1, 96), (37, 130)] if IS_INTERPRETED else [(1, 96), (37, 130), (129, 4096), (65, 11008)]
RANKS = [0, 1, 5, 40] if IS_INTERPRETED else [0, 1, 5, 16, 40, 256]

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory is full of NaN, so that an element that no kernel writes is seen."""
    if not IS_INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.dtype != reference.FP8 else x.view(torch.uint8).fill_(127).view(x.dtype)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    yield


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def exact(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("quantise", QUANTISE)
def test_rows_are_normalised_quantised_and_projected(
    dtype: torch.dtype, shape: tuple[int, int], rank: int, quantise: bool
) -> None:
    from metier.kernels import triton_rows

    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    a = normal(rank, shape[1], dtype=dtype, scale=shape[1] ** -0.5) if rank else None
    down, segments = (a.T, (shape[1],)) if a is not None else (None, ())
    got = triton_rows.project_rows(x, factor=weight, down=down, segments=segments, eps=1e-5, quantise=quantise)
    x64, w64, d64 = exact(x, weight, down)
    options: dict[str, Any] = {"factor": w64, "down": d64, "segments": segments, "eps": 1e-5}
    want = reference.project_rows(x64, quantise=quantise, **options)
    z = reference.project_rows(x64, **options).dense
    rows_close(got, want, dtype, size_of_low(z, d64, segments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("quantise", QUANTISE)
def test_gradients_are_projected_segment_by_segment(dtype: torch.dtype, rank: int, quantise: bool) -> None:
    from metier.kernels import triton_rows

    dy, factor = normal(41, 160, dtype=dtype), torch.rand(160, device=DEVICE) + 0.1
    up = normal(160, rank, dtype=dtype) if rank else None
    options: dict[str, Any] = {"segments": (96, 128, 160) if rank else (), "quantise": quantise}
    got = triton_rows.project_rows(dy, factor=factor if quantise else None, down=up, **options)
    dy64, f64, up64 = exact(dy, factor, up)
    want = reference.project_rows(dy64, factor=f64 if quantise else None, down=up64, **options)
    rows_close(got, want, dtype, size_of_low(dy64, up64, options["segments"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_norm_backward(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    from metier.kernels import triton_rows

    dz, x, weight = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-5)
    low = normal(shape[0], rank, dtype=dtype) if rank else None
    down = normal(rank, shape[1], dtype=dtype) if rank else None
    residual = normal(*shape, dtype=dtype) if rank != 1 else None
    z = x.double() * rstd.double()[:, None] * weight.double()
    projected = (z @ down.double().T).to(dtype) if down is not None else None
    names = ("rstd", "weight", "low", "down", "projected", "residual")
    rest = (rstd, weight, low, down, projected, residual)
    got = triton_rows.norm_backward(dz, x, **dict(zip(names, rest, strict=True)))
    want = reference.norm_backward(*exact(dz, x), **dict(zip(names, exact(*rest), strict=True)))
    close(got[0], want[0], dtype)
    # dA = ((low * rstd)^T x) * weight.
    size = None if low is None else size_of_gradient((low * rstd[:, None]).double(), x.double(), (rank,))
    close(got[1], want[1], dtype, None if size is None else size * weight.double().abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_residual_and_low_rank_part(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    from metier.kernels import triton_tiles

    low = normal(shape[0], rank, dtype=dtype) if rank else None
    up = normal(shape[1], rank, dtype=dtype) if rank else None
    parts = (normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), low, up)
    close(triton_tiles.add_low_rank(*parts), reference.add_low_rank(*exact(*parts)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [Heads(4, 4, 16), Heads(9, 3, 64), Heads(4, 1, 128)], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("is_qwen", [False, True])
def test_rotation_forward_and_backward(dtype: torch.dtype, heads: Heads, rank: int, is_qwen: bool) -> None:
    from metier.kernels import triton_tiles

    num_rows, cols = 71, heads.ends[2]
    angle = torch.randn(num_rows, heads.size // 2, device=DEVICE)
    norms = [normal(heads.size, dtype=dtype) if is_qwen else None for _ in range(2)]
    rotation = Rotation(angle.cos(), angle.sin(), normal(cols, dtype=dtype), norms[0], norms[1], 1e-6)
    rotation64 = Rotation(*exact(*rotation[:5]), eps=1e-6)
    qkv = normal(num_rows, cols, dtype=dtype)
    low = normal(num_rows, 3 * rank, dtype=dtype) if rank else None
    up = normal(cols, rank, dtype=dtype) if rank else None
    want = reference.rotate(*exact(qkv, low, up), heads, rotation64)
    grads = tuple(normal(*w.shape, dtype=dtype) for w in want)
    factor = torch.rand(cols, device=DEVICE)
    want_back = reference.rotate_backward(
        tuple(exact(*grads)), *exact(qkv, low, up), heads, rotation64, factor.double()
    )
    for got, one in zip(triton_tiles.rotate(qkv.clone(), low, up, heads, rotation), want, strict=True):
        close(got, one, dtype)
    back = triton_tiles.rotate_backward(grads, qkv, low, up, heads, rotation, factor)
    sizes = (None, None, None if low is None else size_of_gradient(want_back[0], low.double(), heads.ends))
    for mine, theirs, size in zip(back, want_back, sizes, strict=True):
        close(mine, theirs, dtype, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("quantise", QUANTISE)
def test_swiglu_forward_and_backward(dtype: torch.dtype, shape: tuple[int, int], rank: int, quantise: bool) -> None:
    from metier.kernels import triton_swiglu

    num_rows, half = shape
    gate_up, dh = normal(num_rows, 2 * half, dtype=dtype), normal(num_rows, half, dtype=dtype)
    low = up = a = low_dh = None
    if rank:
        low, up = normal(num_rows, 2 * rank, dtype=dtype, scale=0.3), normal(2 * half, rank, dtype=dtype, scale=0.3)
        a, low_dh = normal(rank, half, dtype=dtype, scale=0.1), normal(num_rows, rank, dtype=dtype)
    factor = torch.rand(2 * half, device=DEVICE) + 0.1
    got = triton_swiglu.swiglu(gate_up, low, up, down=None if a is None else a.T, quantise=quantise)
    x64, low64, up64, a64 = exact(gate_up, low, up, a)
    want = reference.swiglu(x64, low64, up64, down=None if a is None else a64.T, quantise=quantise)
    h = reference.swiglu(x64, low64, up64, down=None, quantise=False).dense
    assert h is not None
    rows_close(got, want, dtype, size_of_low(h, None if a is None else a64.T, (half,)))
    low_dh64, factor64, dh64 = exact(low_dh, factor, dh)
    options: dict[str, Any] = {"quantise": quantise}
    back = triton_swiglu.swiglu_backward(
        dh, gate_up, low, up, low_dh=low_dh, down=a, factor=factor if quantise else None, **options
    )
    given = (dh64, x64, low64, up64)
    truth = reference.swiglu_backward(
        *given, low_dh=low_dh64, down=a64, factor=factor64 if quantise else None, **options
    )
    both = reference.swiglu_backward(*given, low_dh=low_dh64, down=a64, factor=None, quantise=False).rows.dense
    assert both is not None
    ends = (half, 2 * half)
    rows_close(back.rows, truth.rows, dtype, size_of_low(both, up64, ends))
    close(back.up, truth.up, dtype, size_of_gradient(both, low64, ends))
    close(back.down, truth.down, dtype, None if low_dh64 is None else size_of_gradient(low_dh64, h, (rank,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 7), (33, 5000)] if IS_INTERPRETED else [(1, 7), (33, 32000), (9, 128_256)], ids=str
)
def test_cross_entropy_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from metier.kernels import triton_tiles

    logits = normal(*shape, dtype=dtype, scale=4.0)
    targets = torch.randint(0, shape[1], (shape[0],), device=DEVICE)
    targets[1::5] = -100
    want_grad = logits.double()
    want = reference.cross_entropy_rows(want_grad, targets)
    close(triton_tiles.cross_entropy_rows(logits, targets), want, torch.float32)
    close(logits, want_grad, dtype)
