"""What a training step is made of, each piece alone on one CUDA GPU: products, attention, the adapter's parts, copies.

    python benchmarks/bench_kernels.py            # all, at r=16
    python benchmarks/bench_kernels.py 16 32 64   # what adapters add to: one, eight, eight of ranks 4 to 32

LLaMA-2-7B's sizes, 8,192 tokens, random data; median time in microseconds, and TFLOP/s where it is a product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parents[1]))

from metier.kernels import ops
from metier.kernels.attention import Documents, attend
from metier.kernels.frozen import Fp8Weight, Nf4Weight, freeze
from metier.kernels.groups import Groups
from metier.kernels.reference import Heads, Rotation, Rows, quantise_rows

TOKENS, HIDDEN, INNER, RANK = 8192, 4096, 11008, 16
Piece = tuple[str, Callable[[], object], float]


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def products() -> Iterator[Piece]:
    for rows, cols in ((12288, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN, HIDDEN)):
        work = 2.0 * TOKENS * rows * cols
        for extra in (0, 64):
            x, w = bf16(TOKENS, cols + extra), bf16(rows, cols + extra)
            yield f"bf16 {cols}+{extra} -> {rows}", (lambda x=x, w=w: x @ w.T), work
        dy = bf16(TOKENS, rows)
        w = bf16(rows, cols)
        yield f"bf16 dX {rows} -> {cols}", (lambda dy=dy, w=w: dy @ w), work
        frozen, eight = freeze(w, "fp8"), Rows(None, *quantise_rows(bf16(TOKENS, cols)))
        yield f"fp8 {cols} -> {rows}", (lambda f=frozen, e=eight: f.matmul(e)), work
        y, low, up = bf16(TOKENS, rows), bf16(TOKENS, RANK), bf16(rows, RANK)
        yield f"adding the low-rank part by addmm_, {rows}", (lambda y=y, lo=low, up=up: y.addmm_(lo, up.T)), 0.0
    weight = freeze(bf16(2 * INNER, HIDDEN), "nf4")
    assert isinstance(weight, Nf4Weight)
    yield "nf4 -> e4m3, gate/up", lambda: weight._to_fp8(transposed=False), 0.0
    yield "nf4 -> e4m3, transposed", lambda: weight._to_fp8(transposed=True), 0.0
    eighth = freeze(bf16(2 * INNER, HIDDEN), "fp8")
    assert isinstance(eighth, Fp8Weight)
    yield "e4m3 transposed", eighth.keep_transposed, 0.0


def attention() -> Iterator[Piece]:
    for size in (512, 2048):
        for is_equal in (True, False):
            # A first document shorter than the others keeps cuDNN out.
            count = TOKENS // size
            lengths = (size,) * count if is_equal else (size - 8, *(size,) * (count - 1), 8)
            documents = Documents.of(lengths, torch.device("cuda"), is_flash=True)
            q, k, v = (bf16(TOKENS, 32, 128).requires_grad_() for _ in range(3))
            grad = bf16(TOKENS, 32, 128)
            out = attend(q, k, v, documents)
            name = f"{'cuDNN' if is_equal else 'FlashAttention-2'}, documents of {size}"
            yield f"{name}, forward", (lambda a=(q, k, v, documents): attend(*a)), 0.0
            yield (
                f"{name}, backward",
                (lambda o=out, g=grad, a=(q, k, v): torch.autograd.grad(o, a, g, retain_graph=True)),
                0.0,
            )


def row_and_tile_kernels() -> Iterator[Piece]:
    x, weight, a = bf16(TOKENS, HIDDEN), bf16(HIDDEN), bf16(3 * RANK, HIDDEN)
    both, low, up = bf16(TOKENS, 2 * INNER), bf16(TOKENS, 2 * RANK), bf16(2 * INNER, RANK) * 0.1
    dh, down = bf16(TOKENS, INNER), bf16(RANK, INNER) * 0.1
    one, factor = bf16(TOKENS, RANK), torch.rand(2 * INNER, device="cuda")
    heads = Heads(32, 32, 128)
    qkv, low3, up3 = bf16(TOKENS, heads.ends[2]), bf16(TOKENS, 3 * RANK), bf16(heads.ends[2], RANK)
    angle = torch.randn(TOKENS, 64, device="cuda")
    rotation = Rotation(angle.cos(), angle.sin())
    grads = tuple(bf16(TOKENS, 32, 128) for _ in range(3))
    logits, targets = bf16(4096, 32000), torch.randint(0, 32000, (4096,), device="cuda")
    for quantise in (False, True):
        word = "e4m3" if quantise else "bf16"
        options = {"factor": weight, "down": a.T, "segments": (HIDDEN,), "eps": 1e-5, "quantise": quantise}
        yield f"norm to {word}, with the projection", (lambda o=options: ops.project_rows(x, **o)), 0.0
        yield (
            f"SwiGLU to {word}, with the projection",
            (lambda q=quantise: ops.swiglu(both, low, up, down=down.T, quantise=q)),
            0.0,
        )
        yield (
            f"SwiGLU backward to {word}, with the projection",
            (
                lambda q=quantise: ops.swiglu_backward(
                    dh, both, low, up, low_dh=one, down=down, factor=factor if q else None, quantise=q
                )
            ),
            0.0,
        )
    options = {
        "weight": weight,
        "rstd": torch.rand(TOKENS, device="cuda"),
        "low": low3,
        "down": a,
        "projected": low3,
        "residual": x,
    }
    yield "norm backward", lambda: ops.norm_backward(x, x, **options), 0.0
    yield "rotary", lambda: ops.rotate(qkv, low3, up3, heads, rotation), 0.0
    yield "rotary backward", lambda: ops.rotate_backward(grads, None, None, None, heads, rotation), 0.0
    yield "residual and low-rank part", lambda: ops.add_low_rank(x, x, one, up3[:HIDDEN]), 0.0
    yield "cross-entropy, 4096 x 32000", lambda: ops.cross_entropy_rows(logits, targets), 0.0
    yield "copy of x", x.clone, 0.0


def adapter_kernels(ranks: tuple[int, ...]) -> Iterator[Piece]:
    """Every op of a layer that an adapter takes part in, in e4m3: of one adapter, or of several with equal shares."""
    count, total, rank = len(ranks), sum(ranks), max(ranks)
    each = TOKENS // count
    spans = tuple((number, number * each, (number + 1) * each) for number in range(count))
    groups = Groups(spans, ranks).on(torch.device("cuda")) if count > 1 else None
    some: dict[str, Any] = {} if groups is None else {"groups": groups}

    def ups(size: int) -> torch.Tensor:
        return bf16(size, rank) * 0.1 if groups is None else bf16(size * total) * 0.1

    x, weight, both, dh = bf16(TOKENS, HIDDEN), bf16(HIDDEN), bf16(TOKENS, 2 * INNER), bf16(TOKENS, INNER)
    heads, qkv, rstd = Heads(32, 32, 128), bf16(TOKENS, 3 * HIDDEN), torch.rand(TOKENS, device="cuda")
    angle, factor = torch.randn(TOKENS, 64, device="cuda"), torch.rand(2 * INNER, device="cuda")
    rotation, grads = Rotation(angle.cos(), angle.sin()), tuple(bf16(TOKENS, 32, 128) for _ in range(3))
    one, two, three = (bf16(TOKENS, n * rank) for n in (1, 2, 3))
    a1, a2, a3 = (bf16(n * total, HIDDEN) * 0.1 for n in (1, 2, 3))
    wide_a, b1, b2, b3 = bf16(total, INNER) * 0.1, ups(HIDDEN), ups(2 * INNER), ups(3 * HIDDEN)
    norm: dict[str, Any] = {"factor": weight, "segments": (HIDDEN,), "eps": 1e-5, "quantise": True} | some
    back: dict[str, Any] = {"weight": weight, "rstd": rstd, "residual": x} | some
    largest = dh.abs().amax(1).float()
    ops_of: list[tuple[str, Callable[[], object]]] = [
        ("norm of q/k/v's input", lambda: ops.project_rows(x, down=a3.mT, **norm)),
        ("norm of gate/up's input", lambda: ops.project_rows(x, down=a2.mT, **norm)),
        ("rows of o's input", lambda: ops.project_rows(x, down=a1.mT, segments=(HIDDEN,), quantise=True, **some)),
        ("rotary", lambda: ops.rotate(qkv, three, b3, heads, rotation, **some)),
        ("residual and low-rank part", lambda: ops.add_low_rank(x, x, one, b1, **some)),
        ("SwiGLU", lambda: ops.swiglu(both, two, b2, down=wide_a.mT, quantise=True, **some)),
        ("SwiGLU backward", lambda: ops.swiglu_backward(
            dh, both, two, b2, low_dh=one, down=wide_a, factor=factor, quantise=True, **some)),
        ("rotary backward", lambda: ops.rotate_backward(
            grads, None, three, b3, heads, rotation, factor[: 3 * HIDDEN], **some)),
        ("rows of q/k/v's gradient", lambda: ops.project_rows(
            qkv, factor=factor[: 3 * HIDDEN], down=b3, segments=heads.ends, quantise=True,
            largest=rstd, **some)),
        ("rows of h", lambda: ops.project_rows(
            dh, down=wide_a.mT, segments=(INNER,), quantise=True, largest=largest, **some)),
        ("norm backward, q/k/v", lambda: ops.norm_backward(x, x, low=three, down=a3, projected=three, **back)),
        ("norm backward, gate/up", lambda: ops.norm_backward(x, x, low=two, down=a2, projected=two, **back)),
        ("gradient of B of o", lambda: ops.rank_gradient(x, one, (HIDDEN,), groups)),
        ("gradient of A of o", lambda: ops.down_gradient(one, x, groups)),
        ("low-rank part of o's input gradient", lambda: ops.add_low_rank_(x, one, a1, groups)),
    ]  # fmt: skip
    for name, run in ops_of:
        yield name, run, 0.0


def by_rank(ranks: list[int]) -> None:
    """A table: a row for each op, a column for each rank of one adapter and of eight."""
    columns = [(rank,) * count for count in (1, 8) for rank in ranks] + [(4, 4, 8, 8, 16, 16, 32, 32)]
    names = [f"{len(column)} x {'/'.join(map(str, sorted(set(column))))}" for column in columns]
    rows: dict[str, list[float]] = {}
    for column, title in zip(columns, names, strict=True):
        for name, run, _ in adapter_kernels(column):
            rows.setdefault(name, []).append(do_bench(run, warmup=8, rep=30, return_mode="median") * 1e3)
        print(f"{title}: {sum(times[-1] for times in rows.values()):.0f} us", flush=True)
    print("| us, adapters x rank | " + " | ".join(names) + " |")
    for name, times in [*rows.items(), ("all", [sum(column) for column in zip(*rows.values(), strict=True)])]:
        print(f"| {name} | " + " | ".join(f"{time:.0f}" for time in times) + " |")


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:]:
        by_rank([int(word) for word in sys.argv[1:]])
        return
    for pieces in (products(), attention(), row_and_tile_kernels()):
        for name, run, work in pieces:
            ms = do_bench(run, warmup=8, rep=40, return_mode="median")
            rate = f"{work / ms / 1e9:8.0f}" if work else ""
            print(f"{name:50s} {ms * 1e3:9.1f} us {rate}", flush=True)


if __name__ == "__main__":
    main()
