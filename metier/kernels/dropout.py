"""Dropout whose masks follow from keys, so that none is kept: plain PyTorch, what the kernel must equal.

In: rows [M, I], a key a row and a site's number. Out: the rows with what drops out at zero, the rest scaled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Dropout(NamedTuple):
    """Dropout of a pass on what its adapter reads: the probability, and the tokens' keys [M] int32."""

    probability: float
    keys: torch.Tensor


def keyed_dropout(x: torch.Tensor, probability: float, keys: torch.Tensor, site: int) -> torch.Tensor:
    """Dropout on x [..., T, I] whose mask follows from the tokens' `keys` [T] int32 and the site's number alone.

    A token's mask is the same wherever it lies, in whichever pass or process, and when it is computed again. The
    bits are murmur3's finaliser (Appleby, 2011) over key, site and column.
    """
    columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * -1640531527  # 2^32 / golden ratio
    number = (site * 668265263 + 2**31) % 2**32 - 2**31  # as int32
    bits = _mixed(keys + number)[:, None] + columns
    # 31 random bits: the sign is not looked at.
    kept = (_mixed(bits) & 0x7FFFFFFF) >= int(probability * 2**31)
    return x * kept * (1 / (1 - probability))


def drop_rows(
    x: torch.Tensor,
    dropout: Dropout,
    site: int,
    *,
    rstd: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """`keyed_dropout` of x [M, I], or of its normalised form x * rstd * factor with rstd [M] and factor [I].

    Added to `into` [M, I] where it is given.
    """
    if rstd is not None and factor is not None:
        work = x if x.dtype == torch.float64 else x.float()
        x = (work * rstd[:, None] * factor).to(x.dtype)
    dropped = keyed_dropout(x, dropout.probability, dropout.keys, site)
    return dropped if into is None else into.add_(dropped)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """murmur3's 32-bit finaliser on int32, which wraps; shifts are made unsigned."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)
