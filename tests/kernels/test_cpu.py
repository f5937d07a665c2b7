"""Tries to make a CPU op differ from its float64 definition: odd shapes, ranks 1 to 256, poisoned outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from metier.kernels import cpu, ops, reference
from metier.kernels.attention import Documents, attend

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [(1, 96), (37, 130), (9, 1030)]
RANKS = [0, 1, 5, 40, 256]


@pytest.fixture(autouse=True)
def _new_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    yield


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def close(
    got: torch.Tensor | None, want: torch.Tensor | None, dtype: torch.dtype, *, kept_in: torch.dtype | None = None
) -> None:
    assert (got is None) == (want is None)
    if got is None or want is None:
        return
    assert got.shape == want.shape
    assert got.dtype == (kept_in or dtype)
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert (got.double() - want).norm() <= bound * want.norm() + 1e-9


def exact(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_residual_and_low_rank_part(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    residual, y = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    low = normal(shape[0], rank, dtype=dtype) if rank else None
    up = normal(shape[1], rank, dtype=dtype, scale=0.1) if rank else None
    want = reference.add_low_rank(*exact(residual, y, low, up))
    close(ops.add_low_rank(residual, y, low, up), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_swiglu_forward_and_backward(dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    rows, width = shape
    gate_up, dh = normal(rows, 2 * width, dtype=dtype, scale=2), normal(rows, width, dtype=dtype)
    low = normal(rows, 2 * rank, dtype=dtype) if rank else None
    up = normal(2 * width, rank, dtype=dtype, scale=0.1) if rank else None
    down = normal(width, rank, dtype=dtype, scale=0.1) if rank else None
    low_dh = normal(rows, rank, dtype=dtype) if rank else None
    down_t = None if down is None else down.T
    want = reference.swiglu(*exact(gate_up, low, up), down=exact(down)[0], quantise=False)
    before = gate_up.clone()
    got = ops.swiglu(gate_up, low, up, down=down, quantise=False)
    close(got.dense, want.dense, dtype)
    close(got.low, want.low, dtype)
    assert torch.equal(gate_up, before)  # backward reads it again
    wanted = reference.swiglu_backward(
        *exact(dh, gate_up, low, up), low_dh=exact(low_dh)[0], down=exact(down_t)[0], factor=None, quantise=False
    )
    found = ops.swiglu_backward(dh, gate_up, low, up, low_dh=low_dh, down=down_t, factor=None, quantise=False)
    close(found.up, wanted.up, dtype, kept_in=torch.float32)
    close(found.down, wanted.down, dtype, kept_in=torch.float32)
    close(found.rows.dense, wanted.rows.dense, dtype)
    close(found.rows.low, wanted.rows.low, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}, {"factor": True}, {"eps": 1e-6, "factor": True}], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 40])
def test_rows_are_normalised_and_projected(dtype: torch.dtype, options: dict[str, Any], rank: int) -> None:
    x = normal(37, 130, dtype=dtype)
    factor = normal(130, dtype=dtype) if "factor" in options else None
    down = normal(130, rank, dtype=dtype, scale=0.1) if rank else None
    segments = (70, 130) if rank else ()
    eps = options.get("eps")
    want = reference.project_rows(exact(x)[0], factor=exact(factor)[0], down=exact(down)[0], segments=segments, eps=eps)
    got = ops.project_rows(x, factor=factor, down=down, segments=segments, eps=eps)
    close(got.dense, want.dense, dtype)
    close(got.low, want.low, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(64, 64), (50, 3, 27), (1, 1, 1), (1,)])
@pytest.mark.parametrize("heads", [(4, 4, 64), (9, 3, 64), (8, 1, 16)])
@pytest.mark.parametrize("scores", [cpu.MAX_SCORES, 1])
def test_attention_stays_inside_documents(
    dtype: torch.dtype, lengths: tuple[int, ...], heads: tuple[int, int, int], scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cpu, "MAX_SCORES", scores)
    many, few, size = heads
    parts = [normal(sum(lengths), n, size, dtype=dtype) for n in (many, few, few)]
    grad = torch.randn_like(parts[0])
    mine = [p.clone().requires_grad_() for p in parts]
    out = attend(mine[0], mine[1], mine[2], Documents.of(lengths, torch.device("cpu"), is_flash=False))
    out.backward(grad)
    # Each document alone under torch's own attention, in float64.
    leaves = [p.double().requires_grad_() for p in parts]
    pieces = zip(*(leaf.split(list(lengths)) for leaf in leaves), strict=True)
    alone = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in piece), is_causal=True, enable_gqa=many != few
        )[0].transpose(0, 1)
        for piece in pieces
    ]
    whole = torch.cat(alone)
    whole.backward(grad.double())
    assert (out.double() - whole).norm() <= {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype] * whole.norm()
    for got, want in zip(mine, leaves, strict=True):
        assert got.grad is not None
        assert want.grad is not None
        bound = {torch.float32: 3e-6, torch.bfloat16: 2e-2}[dtype]
        # One token attends to itself alone: the gradient of q and k is then zero.
        assert (got.grad.double() - want.grad).norm() <= bound * want.grad.norm() + (
            2e-2 if dtype == torch.bfloat16 else 1e-5
        )
