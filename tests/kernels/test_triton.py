"""Tries to make a Triton kernel differ from its plain-PyTorch definition: odd shapes, ranks 1 to 256, poisoned outputs.

Runs on a GPU; with TRITON_INTERPRET=1 the small shapes run on a CPU as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from metier.kernels import ops, reference
from metier.kernels.dropout import Dropout, drop_rows, keyed_dropout
from metier.kernels.groups import Groups
from metier.kernels.reference import Heads, Rotation
from tests.kernels.bounds import close, rows_close, size_of_gradient, size_of_low

IS_INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
QUANTISE = [False] if IS_INTERPRETED and os.environ.get("NO_FP8") else [False, True]
ROWS = [(1, 96), (37, 130)] if IS_INTERPRETED else [(1, 96), (37, 130), (129, 4096), (65, 11008)]
RANKS = [0, 1, 5, 40, 96] if IS_INTERPRETED else [0, 1, 5, 16, 40, 96, 256]

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


@pytest.mark.skipif(IS_INTERPRETED, reason="a race of the card's copies and products")
@pytest.mark.parametrize("rank", [1, 16, 40, 64])
@pytest.mark.parametrize("num_rows", [65, 130, 2048, 8192])
def test_rows_projected_while_they_are_quantised_are_the_same_each_time(num_rows: int, rank: int) -> None:
    from metier.kernels import triton_rows

    x, down = normal(num_rows, 11008, dtype=torch.bfloat16), normal(11008, rank, dtype=torch.bfloat16, scale=0.1)
    largest = x.float().abs().amax(1)

    def low() -> torch.Tensor:
        found = triton_rows.project_rows(x, down=down, segments=(11008,), quantise=True, largest=largest).low
        assert found is not None
        return found

    first = low()
    close(first, (x.double() @ down.double()), torch.bfloat16)
    assert all(torch.equal(low(), first) for _ in range(20))


@pytest.mark.skipif(IS_INTERPRETED, reason="a race of the card's copies and products")
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_sums_over_rows_are_the_same_each_time(rank: int) -> None:
    from metier.kernels import triton_rows, triton_swiglu

    num_rows, half, dtype = 4096, 4096, torch.bfloat16
    gate_up, dh = normal(num_rows, 2 * half, dtype=dtype), normal(num_rows, half, dtype=dtype)
    low, up = normal(num_rows, 2 * rank, dtype=dtype, scale=0.3), normal(2 * half, rank, dtype=dtype, scale=0.3)
    a, low_dh = normal(rank, half, dtype=dtype, scale=0.1), normal(num_rows, rank, dtype=dtype)
    both, weight, rstd = (
        normal(2 * rank, half, dtype=dtype),
        normal(half, dtype=dtype),
        torch.rand_like(dh[:, 0]).float(),
    )
    rest: dict[str, Any] = {
        "weight": weight,
        "rstd": rstd,
        "low": low,
        "down": both,
        "projected": low,
        "residual": None,
    }

    def sums() -> list[torch.Tensor | None]:
        back = triton_swiglu.swiglu_backward(
            dh.clone(), gate_up.clone(), low, up, low_dh=low_dh, down=a, factor=None, quantise=False
        )
        return [back.up, back.down, *triton_rows.norm_backward(dh, dh, **rest)]

    first = sums()
    want = reference.swiglu_backward(
        *exact(dh, gate_up, low, up), low_dh=low_dh.double(), down=a.double(), factor=None, quantise=False
    )
    assert want.up is not None and want.down is not None
    for got, truth in zip(first, (want.up, want.down), strict=False):
        assert got is not None and (got - truth).norm() <= 0.01 * truth.norm()
    for _ in range(10):
        assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(first, sums(), strict=True))


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


# Adapters 2 and 4 have no rows here, the others come in no order, and a span is shorter than any block.
SPANS = {
    "uneven": ((3, 0, 70), (0, 70, 71), (1, 71, 150)), "even": ((3, 0, 64), (0, 64, 192), (1, 192, 256)),
    "one": ((2, 0, 37),),
}  # fmt: skip
MIXED = [(5,) * 5, (4, 40, 8, 16, 1)]
GROUPED_RANKS = MIXED if IS_INTERPRETED else [*MIXED, (16,) * 5, (64,) * 5, (64, 4, 33, 16, 64)]
# In the interpreter e4m3 and 16 bits are slow or missing.
SOME = {"uneven": SPANS["uneven"]} if IS_INTERPRETED else SPANS


def groups_of(spans: tuple[tuple[int, int, int], ...], ranks: tuple[int, ...]) -> tuple[Groups, int]:
    return Groups(spans, ranks).on(DEVICE), spans[-1][2]


def projection(groups: Groups, layers: int, *, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """[M, n max(r)], zeros beyond an adapter's own columns."""
    low = normal(groups.spans[-1][2], layers * groups.widest, dtype=dtype, scale=scale)
    for adapter, start, end in groups.spans:
        low[start:end, layers * groups.ranks[adapter] :] = 0
    return low


# The definition for several adapters is that for one, adapter by adapter: `ops` takes it for float64.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", SOME.values(), ids=SOME)
@pytest.mark.parametrize("ranks", GROUPED_RANKS, ids=str)
@pytest.mark.parametrize("quantise", QUANTISE)
def test_rows_of_several_adapters_meet_their_own(
    dtype: torch.dtype, spans: tuple[tuple[int, int, int], ...], ranks: tuple[int, ...], quantise: bool
) -> None:
    from metier.kernels import triton_groups, triton_rows, triton_tiles

    groups, num_rows = groups_of(spans, ranks)
    x, weight, dz = (normal(*shape, dtype=dtype) for shape in ((num_rows, 192), (192,), (num_rows, 192)))
    one, down = (normal(n * groups.total, 192, dtype=dtype, scale=0.1) for n in (1, 3))
    for options in (
        {"factor": weight, "down": down.mT, "segments": (192,), "eps": 1e-5, "quantise": quantise},
        {"down": normal(192 * groups.total, dtype=dtype), "segments": (64, 128, 192), "quantise": quantise},
        {"down": one.mT, "segments": (192,), "quantise": quantise},
    ):  # fmt: skip
        exactly = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        got = triton_rows.project_rows(x, groups=groups, **options)
        rows_close(got, ops.project_rows(x.double(), groups=groups, **exactly), dtype)
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-5)
    low, options = projection(groups, 3, dtype=dtype), {"segments": (192,), "eps": 1e-5, "factor": weight.double()}
    projected = ops.project_rows(x.double(), down=down.double().mT, groups=groups, **options).low
    assert projected is not None
    names = ("rstd", "weight", "low", "down", "projected", "residual")
    rest = (rstd, weight, low, down, projected.to(dtype), normal(num_rows, 192, dtype=dtype))
    back = triton_rows.norm_backward(dz, x, groups=groups, **dict(zip(names, rest, strict=True)))
    want = ops.norm_backward(*exact(dz, x), groups=groups, **dict(zip(names, exact(*rest), strict=True)))
    close(back[0], want[0], dtype)
    close(back[1], want[1], dtype)
    want_up = ops.rank_gradient(*exact(dz, low[:, : groups.widest]), (192,), groups)
    close(triton_groups.rank_gradient(dz, low[:, : groups.widest], groups, is_up=True), want_up, dtype)
    want_down = ops.down_gradient(*exact(low, dz), groups)
    close(triton_groups.rank_gradient(low, dz, groups, is_up=False), want_down, dtype)
    # A site with a norm adds its low-rank part elsewhere: this kernel sees one layer's rank.
    own, up = projection(groups, 1, dtype=dtype), normal(192 * groups.total, dtype=dtype)
    want_sum = ops.add_low_rank_(*exact(dz, own, one), groups)
    close(triton_tiles.add_low_rank(None, dz, own, one.mT, groups, dz), want_sum, dtype)
    want_sum = ops.add_low_rank(*exact(x, dz, own, up), groups=groups)
    close(triton_tiles.add_low_rank(x, dz, own, up, groups), want_sum, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", SOME.values(), ids=SOME)
@pytest.mark.parametrize("ranks", GROUPED_RANKS, ids=str)
@pytest.mark.parametrize("is_qwen", [False, True])
def test_heads_of_several_adapters_meet_their_own(
    dtype: torch.dtype, spans: tuple[tuple[int, int, int], ...], ranks: tuple[int, ...], is_qwen: bool
) -> None:
    from metier.kernels import triton_tiles

    groups, num_rows = groups_of(spans, ranks)
    heads = Heads(4, 1, 64)
    cols = heads.ends[2]
    angle = torch.randn(num_rows, 32, device=DEVICE)
    norms = [normal(64, dtype=dtype) if is_qwen else None for _ in range(2)]
    rotation = Rotation(angle.cos(), angle.sin(), normal(cols, dtype=dtype), norms[0], norms[1], 1e-6)
    rotation64 = Rotation(*exact(*rotation[:5]), eps=1e-6)
    qkv, low = normal(num_rows, cols, dtype=dtype), projection(groups, 3, dtype=dtype)
    up, factor = normal(cols * groups.total, dtype=dtype), torch.rand(cols, device=DEVICE)
    want = ops.rotate(*exact(qkv, low, up), heads, rotation64, groups)
    for got, one in zip(triton_tiles.rotate(qkv.clone(), low, up, heads, rotation, groups), want, strict=True):
        close(got, one, dtype)
    grads = tuple(normal(*w.shape, dtype=dtype) for w in want)
    back = triton_tiles.rotate_backward(grads, qkv, low, up, heads, rotation, factor, groups)
    dq, dk, dv = exact(*grads)
    truth = ops.rotate_backward((dq, dk, dv), *exact(qkv, low, up), heads, rotation64, factor.double(), groups)
    for mine, theirs in zip(back, truth, strict=True):
        close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spans", SOME.values(), ids=SOME)
@pytest.mark.parametrize("ranks", GROUPED_RANKS, ids=str)
@pytest.mark.parametrize("quantise", QUANTISE)
def test_swiglu_of_several_adapters_meets_its_own(
    dtype: torch.dtype, spans: tuple[tuple[int, int, int], ...], ranks: tuple[int, ...], quantise: bool
) -> None:
    from metier.kernels import triton_swiglu

    groups, num_rows = groups_of(spans, ranks)
    gate_up, dh = normal(num_rows, 256, dtype=dtype), normal(num_rows, 128, dtype=dtype)
    low, up = projection(groups, 2, dtype=dtype, scale=0.3), normal(256 * groups.total, dtype=dtype, scale=0.3)
    a, low_dh = normal(groups.total, 128, dtype=dtype, scale=0.1), projection(groups, 1, dtype=dtype)
    options: dict[str, Any] = {"quantise": quantise, "groups": groups}
    got = triton_swiglu.swiglu(gate_up, low, up, down=a.mT, **options)
    x64, low64, up64, a64, low_dh64, dh64 = exact(gate_up, low, up, a, low_dh, dh)
    rows_close(got, ops.swiglu(x64, low64, up64, down=a64.mT, **options), dtype)
    factor = torch.rand(256, device=DEVICE) + 0.1
    back = triton_swiglu.swiglu_backward(
        dh, gate_up, low, up, low_dh=low_dh, down=a, factor=factor if quantise else None, **options
    )
    truth = ops.swiglu_backward(
        dh64, x64, low64, up64, low_dh=low_dh64, down=a64, factor=factor.double() if quantise else None, **options
    )
    rows_close(back.rows, truth.rows, dtype)
    close(back.up, truth.up, dtype)
    close(back.down, truth.down, dtype)


def test_what_is_not_finite_in_one_adapter_reaches_no_other() -> None:
    from metier.kernels import triton_rows, triton_swiglu

    groups, num_rows = groups_of(SPANS["uneven"], (4, 20, 8, 4, 4))
    dtype = torch.float32
    x, dz, gate_up, dh = (normal(num_rows, n, dtype=dtype) for n in (192, 192, 256, 128))
    low, low_dh = projection(groups, 2, dtype=dtype), projection(groups, 1, dtype=dtype)
    weight, rstd = torch.ones(192, device=DEVICE), torch.ones(num_rows, device=DEVICE)
    down, next_down = normal(2 * groups.total, 192, dtype=dtype), normal(groups.total, 128, dtype=dtype)
    up = normal(256 * groups.total, dtype=dtype)
    found = []
    for planted in (False, True):
        if planted:  # in the row and in the matrices of adapter 0
            for rows in (x, dz, low, low_dh, gate_up, dh):
                rows[70] = torch.nan
            down[:8], up[: 256 * 4] = torch.nan, torch.nan
        dx, down_grad = triton_rows.norm_backward(
            dz, x, rstd=rstd, weight=weight, low=low, down=down, projected=low, residual=None, groups=groups
        )
        back = triton_swiglu.swiglu_backward(
            dh.clone(), gate_up.clone(), low, up, low_dh=low_dh, down=next_down, factor=None, quantise=False,
            groups=groups,
        )  # fmt: skip
        assert back.rows.low is not None and down_grad is not None and back.up is not None and back.down is not None
        found.append((dx, back.rows.dense, back.rows.low, down_grad, back.up, back.down))
    for name, (clean, beside), own in zip(
        ("dx", "gradient", "low", "A", "B", "A below"), zip(*found, strict=True),
        (range(70, 71), range(70, 71), range(70, 71), range(8), range(256 * 4), range(4)), strict=True,
    ):  # fmt: skip
        assert torch.equal(clean[: own.start], beside[: own.start]), name
        assert torch.equal(clean[own.stop :], beside[own.stop :]), name
        assert beside[own.start : own.stop].isnan().any(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("site", [0, 7, 2**31])
def test_what_drops_out_is_the_same_to_the_bit(dtype: torch.dtype, shape: tuple[int, int], site: int) -> None:
    from metier.kernels import triton_dropout

    x, factor = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    rstd = torch.rand(shape[0], device=DEVICE) + 0.5
    keys = torch.randint(0, 2**31 - 1, (shape[0],), device=DEVICE, dtype=torch.int32)
    dropout = Dropout(0.3, keys)
    for norm in ({}, {"rstd": rstd, "factor": factor}):
        got = triton_dropout.drop_rows(x, dropout, site, **norm)
        want = drop_rows(*exact(x), dropout, site, **{k: v.double() for k, v in norm.items()})
        # A small value may round to zero in fp16 without being dropped.
        is_large = want.abs() > 1e-3
        kept = keyed_dropout(torch.ones_like(want), 0.3, keys, site) != 0
        assert bool((got[~kept] == 0).all())
        assert bool((got[kept & is_large] != 0).all())
        close(got, want, dtype)
        into = normal(*shape, dtype=dtype)
        want = want + into.double()
        assert triton_dropout.drop_rows(x, dropout, site, into=into, **norm) is into
        close(into, want, dtype)
