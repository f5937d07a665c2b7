"""Rounding in which the columns that come later make up for the errors of those before them.

On inputs X [M, I] a weight's error E [O, I] costs tr(E H E^T) in the products, H = X^T X. Columns are rounded in
groups from the last to the first. With H = L L^T, and U = L after each diagonal block is divided out, a group's best
target is W_k + E_later U_later,k: the minimum of that cost over all that is not rounded yet (Frantar et al., 2022,
arXiv 2210.17323; Chee et al., 2023, arXiv 2307.13304, section 3).

Limits: inputs are cut every 4,096 columns, and columns of two cuts don't make up for each other: the factor of 11,008
columns would be half a GiB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from metier.kernels.reference import product32

GROUP = 64
WIDEST = 4096
# Added to H's diagonal, as a share of its mean: the text's directions are not all that there are.
DAMPING = 0.01


def feedback_factors(inputs: torch.Tensor) -> list[torch.Tensor]:
    """U [C, C] fp32 (float64 stays) of each cut of inputs [M, I], I a multiple of 64."""
    return [_factor(cut) for cut in torch.split(inputs, WIDEST, dim=1)]


def _factor(inputs: torch.Tensor) -> torch.Tensor:
    wide = inputs if inputs.is_cuda else inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    moments = product32(wide.T, wide)
    diagonal = moments.diagonal()
    diagonal += DAMPING * diagonal.mean() + torch.finfo(moments.dtype).tiny
    lower = torch.linalg.cholesky(moments)
    del moments
    width = lower.shape[0]
    blocks = lower.view(width // GROUP, GROUP, width // GROUP, GROUP).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    ones = torch.eye(GROUP, dtype=lower.dtype, device=lower.device).expand_as(blocks)
    inverses = torch.linalg.solve_triangular(blocks, ones, upper=False)
    columns = lower.view(width, -1, GROUP).transpose(0, 1)
    return torch.bmm(columns, inverses).transpose(0, 1).reshape(width, width)


def made_up(
    weight: torch.Tensor, factors: list[torch.Tensor], rounded: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:  # fmt: skip
    """`weight` [O, I] in the factors' dtype, each column as it is to be rounded.

    `rounded(target, group)` is what rounding makes of target [O, 64], the group-th 64 columns.
    """
    targets = weight.to(factors[0].dtype, copy=True)
    start = 0
    for factor in factors:
        width = factor.shape[0]
        errors = torch.zeros_like(targets[:, start : start + width])
        for low in range(width - GROUP, -1, -GROUP):
            high = low + GROUP
            target = targets[:, start + low : start + high]
            own = target.clone()
            if high < width:
                target += errors[:, high:] @ factor[high:, low:high]
            errors[:, low:high] = own - rounded(target, (start + low) // GROUP)
        start += width
    return targets
