"""How far a kernel may lie from its definition in float64.

A sum may cancel: its error follows its terms, not its result. So it is measured against the root of the sum of the
terms' squares, which is the result's own size where nothing cancels. An e4m3 value may fall to either side of a tie.
"""

from __future__ import annotations

import torch

from metier.kernels import reference

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
# Of e4m3 values, those that may lie one step away: bf16's error is up to a sixteenth of a step, on either side.
MAX_SHARE_OF_TIES = 0.2


def close(
    got: torch.Tensor | None, want: torch.Tensor | None, dtype: torch.dtype, size: torch.Tensor | None = None
) -> None:
    """got is want up to dtype's rounding; `size` is what the error is measured against, where it is not `want`."""
    assert (got is None) == (want is None)
    if got is None or want is None:
        return
    assert got.shape == want.shape
    size = want if size is None else size
    assert size.shape == want.shape
    assert (got.double() - want.double()).norm() <= BOUNDS[dtype] * size.double().norm() + 1e-9


def size_of_low(source: torch.Tensor | None, down: torch.Tensor | None, ends: tuple[int, ...]) -> torch.Tensor | None:
    """Of a projection of source [M, I] on down [I, R], range by range: the root of the sum of its terms' squares."""
    if source is None or down is None:
        return None
    low = reference.project_rows(source.square(), down=down.square(), segments=ends).low
    assert low is not None
    return low.sqrt()


def size_of_gradient(dy: torch.Tensor, low: torch.Tensor | None, ends: tuple[int, ...]) -> torch.Tensor | None:
    """The same of `reference.rank_gradient`."""
    return None if low is None else reference.rank_gradient(dy.square(), low.square(), ends).sqrt()


def steps(x: torch.Tensor) -> torch.Tensor:
    """e4m3 values as integers: neighbours differ by one, both zeros are 0."""
    bits = x.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def e4m3_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Few values differ; by one step, or by no more than two roundings in dtype of the row's largest, which is 448.

    The latter is for small values made of large ones, which wide ranks round on the way.
    """
    apart = (steps(got) - steps(want)).abs()
    error = (got.double() - want.double()).abs()
    assert bool(((apart <= 1) | (error <= torch.finfo(dtype).eps * reference.FP8_MAX)).all())
    assert int((apart > 0).sum()) <= MAX_SHARE_OF_TIES * apart.numel() + 2


def rows_close(got: reference.Rows, want: reference.Rows, dtype: torch.dtype, size: torch.Tensor | None = None) -> None:
    """Rows of a kernel against those in float64; `size` is that of `low`."""
    close(got.dense, want.dense, dtype)
    close(got.low, want.low, dtype, size)
    close(got.rstd, want.rstd, torch.float32)
    assert (got.quantised is None) == (want.quantised is None)
    if got.quantised is not None and want.quantised is not None:
        close(got.scale, want.scale, dtype)
        e4m3_close(got.quantised, want.quantised, dtype)
