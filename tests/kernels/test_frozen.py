"""Tries to make a quantised weight differ from its definition, or NF4's storage from bitsandbytes'."""

from __future__ import annotations

import pytest
import torch

from metier.errors import ModelError
from metier.kernels.frozen import DenseWeight, freeze, stack
from metier.kernels.nf4 import dequantise_nf4, quantise_nf4, scale_code
from metier.kernels.reference import quantise_rows
from metier.model.quantise import check_storage

CPU = torch.device("cpu")


def weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_nf4_costs_half_a_byte_and_errs_by_nine_per_cent() -> None:
    w = weight(512, 512)
    parts = quantise_nf4(w)
    stored = sum(t.numel() * t.element_size() for t in (parts.packed, parts.absmax, parts.absmax_scale, parts.offset))
    assert stored / w.numel() == pytest.approx(0.516, abs=0.001)
    assert 0.08 < float((dequantise_nf4(parts, torch.float32) - w).norm() / w.norm()) < 0.10


def test_nf4_of_zeros_is_zero_and_of_one_spike_keeps_it() -> None:
    assert not dequantise_nf4(quantise_nf4(torch.zeros(16, 64)), torch.float32).any()
    spike = torch.zeros(4, 64)
    spike[2, 5] = -3.0
    assert float(dequantise_nf4(quantise_nf4(spike), torch.float32)[2, 5]) == pytest.approx(-3.0, rel=0.02)


@pytest.mark.parametrize("shape", [(16, 64), (96, 192), (256, 1024)])
def test_nf4_is_bitsandbytes_storage(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(*shape)
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    mine = quantise_nf4(w)
    torch.testing.assert_close(scale_code(CPU), state.state2.code, atol=1e-6, rtol=0)
    theirs = functional.dequantize_4bit(packed, state)
    # A magnitude between two of the 256 codes may fall either way.
    assert (mine.packed.flatten() == packed.flatten()).float().mean() > 0.999
    assert (dequantise_nf4(mine, torch.float32) - theirs).norm() <= 0.01 * theirs.norm()


def test_e4m3_rows_err_by_three_per_cent_whatever_their_size() -> None:
    x = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]
    values, scale = quantise_rows(x)
    error = (values.float() * scale - x).norm(dim=1) / x.norm(dim=1)
    assert (error < 0.035).all() and (error > 0.01).all()
    assert torch.equal(values.float().abs().amax(1), torch.full((64,), 448.0))


def test_weights_are_stacked_by_rows() -> None:
    ws = [weight(32, 64, seed) for seed in range(3)]
    for storage in ("dense", "fp8", "nf4"):
        parts = [freeze(w, storage) for w in ws]
        whole = stack(parts)
        assert whole.shape == (96, 64)
        expected = torch.cat([part.dequantised(torch.float32) for part in parts])
        assert torch.equal(whole.dequantised(torch.float32), expected)
        assert isinstance(whole, DenseWeight) == (storage == "dense")


@pytest.mark.parametrize("storage", ["fp8", "nf4"])
def test_a_cpu_refuses_what_it_cannot_multiply_and_says_what_works(storage: str) -> None:
    with pytest.raises(ModelError, match=f"precision: {storage}.*needs a CUDA GPU") as caught:
        check_storage(storage, CPU)  # type: ignore[arg-type]
    assert "auto" in str(caught.value)
