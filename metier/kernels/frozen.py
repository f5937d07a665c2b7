"""A frozen weight W [O, I] in the form in which it is kept, with its two products: Y = X W^T and dX = dY W.

`dense`: the model's own dtype. `fp8`: e4m3, quantised once, one scale for each output channel. Forward, the scale is
applied to the product; backward it stands on the axis that is summed over, so it is folded into dY before dY is
quantised, and both directions use the same bytes. Hopper's units read both operands along the summed axis, so
dX reads W transposed: a second copy, or a transpose each time. `nf4`: 4 bits, turned into e4m3 (or into the dense
dtype on a card without FP8 units) each time a product needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from metier.kernels import nf4
from metier.kernels.reference import FP8, FP8_MAX, Rows, quantise_rows

Storage = Literal["dense", "fp8", "nf4"]


@dataclass(slots=True)
class DenseWeight:
    """weight [O, I]."""

    weight: torch.Tensor
    column_scale: torch.Tensor | None = None
    eats_fp8: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def matmul(self, x: Rows) -> torch.Tensor:
        assert x.dense is not None
        return x.dense @ self.weight.T

    def matmul_t(self, grad: Rows) -> torch.Tensor:
        assert grad.dense is not None
        return grad.dense @ self.weight

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)

    def rows(self, start: int, stop: int) -> DenseWeight:
        return DenseWeight(self.weight[start:stop])

    def tensors(self) -> list[torch.Tensor]:
        return [self.weight]


def scaled_mm(rows: Rows, weight: torch.Tensor, column_scale: torch.Tensor) -> torch.Tensor:
    """rows [M, I] x weight [O, I]^T in bf16: both e4m3, scales for each row of either; column_scale [O] fp32."""
    assert rows.quantised is not None and rows.scale is not None
    return torch._scaled_mm(
        rows.quantised, weight.T, scale_a=rows.scale, scale_b=column_scale[None, :], out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


@dataclass(slots=True)
class Fp8Weight:
    """quantised [O, I] e4m3 and column_scale [O] fp32; transposed [I, O] is the second copy, where there is one."""

    quantised: torch.Tensor
    column_scale: torch.Tensor
    transposed: torch.Tensor | None = None
    ones: torch.Tensor | None = None
    eats_fp8: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.quantised.shape[0], self.quantised.shape[1]

    def matmul(self, x: Rows) -> torch.Tensor:
        return scaled_mm(x, self.quantised, self.column_scale)

    def matmul_t(self, grad: Rows) -> torch.Tensor:
        transposed = self.transposed if self.transposed is not None else _transposed(self.quantised)
        if self.ones is None:
            self.ones = torch.ones(self.shape[1], device=transposed.device)
        return scaled_mm(grad, transposed, self.ones)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.quantised.float() * self.column_scale[:, None]).to(dtype)

    def rows(self, start: int, stop: int) -> Fp8Weight:
        return Fp8Weight(self.quantised[start:stop], self.column_scale[start:stop])

    def tensors(self) -> list[torch.Tensor]:
        return [self.quantised, self.column_scale]

    def keep_transposed(self) -> None:
        """Stores the second copy."""
        self.transposed = _transposed(self.quantised)


def _transposed(weight: torch.Tensor) -> torch.Tensor:
    if weight.is_cuda:
        from metier.kernels.triton_weights import transpose_bytes

        return transpose_bytes(weight)
    return weight.view(torch.uint8).T.contiguous().view(FP8)


@dataclass(slots=True)
class Nf4Weight:
    """One weight, or several stacked by rows; `column_scale` [O] fp32 makes rows fit e4m3, where there are units."""

    parts: tuple[nf4.Nf4, ...]
    dtype: torch.dtype
    column_scale: torch.Tensor | None
    ones: torch.Tensor | None = None

    @property
    def eats_fp8(self) -> bool:
        return self.column_scale is not None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def matmul(self, x: Rows) -> torch.Tensor:
        if self.column_scale is None:
            assert x.dense is not None
            return x.dense @ self.dequantised(self.dtype).T
        return scaled_mm(x, self._to_fp8(transposed=False), self.column_scale)

    def matmul_t(self, grad: Rows) -> torch.Tensor:
        if self.column_scale is None:
            assert grad.dense is not None
            return grad.dense @ self.dequantised(self.dtype)
        if self.ones is None:
            self.ones = torch.ones(self.shape[1], device=self.column_scale.device)
        return scaled_mm(grad, self._to_fp8(transposed=True), self.ones)

    def _to_fp8(self, *, transposed: bool) -> torch.Tensor:
        assert self.column_scale is not None
        rows, cols = self.shape
        out = torch.empty((cols, rows) if transposed else (rows, cols), device=self.column_scale.device, dtype=FP8)
        start = 0
        for part in self.parts:
            stop = start + part.shape[0]
            target = out[:, start:stop] if transposed else out[start:stop]
            _dequantise_into(target, part, self.column_scale[start:stop], transposed)
            start = stop
        return out

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(self.shape, device=self.parts[0].packed.device, dtype=dtype)
        start = 0
        for part in self.parts:
            _dequantise_into(out[start : start + part.shape[0]], part, None, False)
            start += part.shape[0]
        return out

    def tensors(self) -> list[torch.Tensor]:
        scales = [] if self.column_scale is None else [self.column_scale]
        return [*(t for p in self.parts for t in (p.packed, p.absmax, p.absmax_scale, p.offset)), *scales]


def _dequantise_into(out: torch.Tensor, part: nf4.Nf4, scales: torch.Tensor | None, transposed: bool) -> None:
    if out.is_cuda:
        from metier.kernels.triton_weights import dequantise_nf4_into

        dequantise_nf4_into(out, part, scales, transposed)
        return
    values = nf4.dequantise_nf4(part, torch.float32)
    if scales is not None:
        values = (values / scales[:, None]).clamp(-FP8_MAX, FP8_MAX)
    out.copy_((values.T if transposed else values).to(out.dtype))


FrozenWeight = DenseWeight | Fp8Weight | Nf4Weight


def freeze(
    weight: torch.Tensor, storage: Storage, *, eats_fp8: bool = True, factors: list[torch.Tensor] | None = None
) -> FrozenWeight:  # fmt: skip
    """`weight` [O, I] as it is to be kept; `eats_fp8` says whether the device multiplies e4m3 (for nf4).

    `factors` are what nf4 rounds by, where its inputs are known (`metier.kernels.feedback`).
    """
    if storage == "fp8":
        quantised, scale = quantise_rows(weight)
        return Fp8Weight(quantised, scale[:, 0].contiguous())
    if storage == "nf4":
        part = nf4.quantise_nf4(weight, factors)
        scales = nf4.row_scales(nf4.block_magnitudes(part)) if eats_fp8 else None
        return Nf4Weight((part,), weight.dtype, scales)
    return DenseWeight(weight)


def moved(weight: FrozenWeight, device: torch.device) -> FrozenWeight:
    """`weight` copied to `device`."""
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight.to(device))
    if isinstance(weight, Fp8Weight):
        return Fp8Weight(weight.quantised.to(device), weight.column_scale.to(device))
    parts = [
        nf4.Nf4(*(t.to(device) for t in (part.packed, part.absmax, part.absmax_scale, part.offset)))
        for part in weight.parts
    ]
    scale = None if weight.column_scale is None else weight.column_scale.to(device)
    return Nf4Weight(tuple(parts), weight.dtype, scale)


def stack(weights: list[FrozenWeight]) -> FrozenWeight:
    """Weights of one input as one, by rows. Dense and fp8 ones are `joined`; nf4 ones stay where they are."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, DenseWeight):
        return DenseWeight(joined([w.weight for w in weights if isinstance(w, DenseWeight)]))
    if isinstance(first, Fp8Weight):
        eights = [w for w in weights if isinstance(w, Fp8Weight)]
        scales = joined([w.column_scale for w in eights])
        return Fp8Weight(joined([w.quantised.view(torch.uint8) for w in eights]).view(FP8), scales)
    fours = [w for w in weights if isinstance(w, Nf4Weight)]
    scales4 = [w.column_scale for w in fours if w.column_scale is not None]
    return Nf4Weight(tuple(p for w in fours for p in w.parts), first.dtype, joined(scales4) if scales4 else None)


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors one below the other: a view where they lie so in one storage (`metier.model.shards`), else a copy."""
    first, end = tensors[0], tensors[0].storage_offset()
    for tensor in tensors:
        is_next = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (is_next and tensor.storage_offset() == end and tensor.is_contiguous()):
            return torch.cat(tensors)
        end += tensor.numel()
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())
