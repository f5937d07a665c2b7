"""4-bit NormalFloat weights in bitsandbytes' storage (Dettmers et al., 2023, arXiv 2305.14314, section 3).

A weight is cut into blocks of 64; each value is a 4-bit index into 16 quantiles of the normal distribution, scaled by
the block's largest magnitude. Those magnitudes are stored in 8 bits themselves (double quantisation): 0.516 bytes a
weight.
Byte order, tables and rounding are bitsandbytes', so its packed tensors can be read and written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from metier.kernels.feedback import made_up
from metier.kernels.reference import FP8_MAX, SCALE_FLOOR

BLOCK = 64
ABSMAX_BLOCK = 256
# Dettmers et al., 2023, appendix E.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Nf4:
    """A weight [N, K], K a multiple of 64.

    packed [N, K / 2] uint8, the first of two values in the high half; absmax [N * K / 64] uint8 indices into
    `scale_code`; absmax_scale fp32, one for 256 of them; offset, their mean, fp32 scalar.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_scale: torch.Tensor
    offset: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 2


@functools.cache
def code_table(device: torch.device) -> torch.Tensor:
    """The 16 values, fp32."""
    return torch.tensor(CODE, device=device)


@functools.cache
def scale_code(device: torch.device) -> torch.Tensor:
    """The 256 values of the signed dynamic 8-bit map, sorted (Dettmers et al., 2021, arXiv 2110.02861, section 2.2)."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (exponent - 6) * means).tolist()
        values += (-(10.0 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), device=device)


def _nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """uint8 indices of the table's values that lie nearest."""
    middles = (table[:-1] + table[1:]) / 2
    return torch.bucketize(x, middles).to(torch.uint8)


def quantise_nf4(weight: torch.Tensor, factors: list[torch.Tensor] | None = None) -> Nf4:
    """weight [N, K] of any float dtype, K a multiple of 64 -> `Nf4` on its device, a slice of rows at a time.

    With `factors` (`feedback_factors` of its inputs) the magnitudes are the same, and errors in the products smaller.
    """
    num_rows, num_cols = weight.shape
    step = max(1, (1 << 24) // num_cols)
    absmax = torch.cat([rows.float().view(-1, BLOCK).abs().amax(1) for rows in torch.split(weight, step)])
    packed = torch.empty(num_rows, num_cols // 2, dtype=torch.uint8, device=weight.device)
    found = Nf4(packed, *_store(absmax))
    magnitudes = absmax.view(num_rows, -1)
    if factors is not None:
        magnitudes = block_magnitudes(found).clamp(min=0)
        weight = made_up(weight, factors, lambda target, group: _rounded(target, magnitudes[:, group, None]))
    for start in range(0, num_rows, step):
        blocks = weight[start : start + step].float().view(-1, num_cols // BLOCK, BLOCK)
        index = _indices(blocks, magnitudes[start : start + step, :, None]).flatten(1)
        packed[start : start + step] = (index[:, ::2] << 4) | index[:, 1::2]
    return found


def _indices(values: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return _nearest(values / magnitudes.clamp(min=SCALE_FLOOR), code_table(values.device))


def _rounded(values: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    return code_table(values.device)[_indices(values, magnitudes).long()] * magnitudes


def _store(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Magnitudes, one a block -> their codes, the codes' scales and the offset, as in `Nf4`."""
    offset = absmax.mean()
    centred = absmax - offset
    pad = -len(centred) % ABSMAX_BLOCK
    groups = torch.nn.functional.pad(centred, (0, pad)).view(-1, ABSMAX_BLOCK)
    scale = groups.abs().amax(1)
    table = scale_code(absmax.device)
    codes = _nearest(groups / scale.clamp(min=SCALE_FLOOR)[:, None], table).flatten()[: len(centred)]
    return codes, scale, offset


def block_magnitudes(weight: Nf4) -> torch.Tensor:
    """The blocks' largest magnitudes as stored, fp32 [N, K / 64]."""
    scale = weight.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: len(weight.absmax)]
    magnitudes = scale_code(weight.absmax.device)[weight.absmax.long()] * scale + weight.offset
    return magnitudes.view(weight.shape[0], -1)


def dequantise_nf4(weight: Nf4, dtype: torch.dtype, magnitudes: torch.Tensor | None = None) -> torch.Tensor:
    """[N, K] in `dtype`. This is the definition; `metier.kernels.triton_weights` has it as a kernel."""
    table = code_table(weight.packed.device)
    index = torch.stack([weight.packed >> 4, weight.packed & 15], -1).flatten(1).long()
    blocks = table[index].view(weight.shape[0], -1, BLOCK)
    magnitudes = block_magnitudes(weight) if magnitudes is None else magnitudes
    return (blocks * magnitudes[:, :, None]).view(weight.shape).to(dtype)


def row_scales(magnitudes: torch.Tensor) -> torch.Tensor:
    """fp32 [N]: what a row is divided by to fit e4m3. A block's largest value is its magnitude or its negative."""
    return magnitudes.abs().amax(1).clamp(min=SCALE_FLOOR) / FP8_MAX
