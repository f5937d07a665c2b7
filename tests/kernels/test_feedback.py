"""Tries to make rounding with feedback differ from its definition, or do worse than rounding to the nearest value."""

from __future__ import annotations

import pytest
import torch

from metier.kernels import feedback
from metier.kernels.feedback import DAMPING, feedback_factors, made_up
from metier.kernels.nf4 import dequantise_nf4, quantise_nf4


def drawn(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows: int, cols: int) -> torch.Tensor:
    """Inputs as layers have them: few directions carry most, and some columns are large."""
    return (drawn(rows, 24, 1) @ drawn(24, cols, 2) + 0.3 * drawn(rows, cols, 3)) * torch.logspace(-1, 1, cols)


def by_definition(weight: torch.Tensor, inputs: torch.Tensor, step: float) -> torch.Tensor:
    """What each group of 64 columns is to be rounded from: the best that can be done for those rounded already."""
    moments = inputs.T @ inputs
    moments += torch.eye(len(moments)).double() * DAMPING * moments.diagonal().mean()
    targets, errors = weight.clone(), torch.zeros_like(weight)
    for low in range(weight.shape[1] - 64, -1, -64):
        high = low + 64
        # min over e of |e_all L|: e = -E_later H_later,rest H_rest,rest^-1, and the target is W - e.
        rest = errors[:, high:] @ moments[high:, :high] @ torch.linalg.inv(moments[:high, :high])
        targets[:, low:high] += rest[:, low:high]
        errors[:, low:high] = weight[:, low:high] - (targets[:, low:high] / step).round() * step
    return targets


def test_targets_are_the_best_for_what_is_rounded_already() -> None:
    weight, inputs = drawn(7, 256), correlated(500, 256)
    got = made_up(weight, feedback_factors(inputs), lambda target, group: (target / 0.25).round() * 0.25)
    torch.testing.assert_close(got, by_definition(weight, inputs, 0.25), rtol=1e-8, atol=1e-8)
    assert torch.equal(got[:, -64:], weight[:, -64:]) and not torch.allclose(got[:, :64], weight[:, :64])


def test_wide_inputs_are_cut_and_each_cut_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "WIDEST", 128)
    weight, inputs = drawn(5, 192), correlated(300, 192)
    factors = feedback_factors(inputs)
    assert [tuple(f.shape) for f in factors] == [(128, 128), (64, 64)]
    groups: list[int] = []
    got = made_up(weight, factors, lambda target, group: groups.append(group) or target.round())
    assert groups == [1, 0, 2]
    torch.testing.assert_close(got[:, :128], by_definition(weight[:, :128], inputs[:, :128], 1.0))
    assert torch.equal(got[:, 128:], weight[:, 128:])


@pytest.mark.parametrize("rows", [40, 2000], ids=["fewer rows than columns", "more"])
def test_nf4_products_err_less_than_half_as_much_and_the_storage_is_the_same(rows: int) -> None:
    weight, inputs = drawn(96, 512).float() * 0.02, correlated(rows, 512).float()
    nearest, fed = quantise_nf4(weight), quantise_nf4(weight, feedback_factors(inputs))
    for name in ("absmax", "absmax_scale", "offset"):
        assert torch.equal(getattr(nearest, name), getattr(fed, name))
    assert fed.packed.shape == nearest.packed.shape and fed.packed.dtype == torch.uint8
    errors = [(inputs @ (dequantise_nf4(each, torch.float32) - weight).T).norm() for each in (nearest, fed)]
    assert errors[1] < 0.5 * errors[0]


def test_dead_inputs_and_zero_weights_leave_finite_codes() -> None:
    weight, inputs = drawn(16, 128).float(), torch.zeros(30, 128)
    weight[3], weight[:, 64:] = 0.0, 0.0
    found = dequantise_nf4(quantise_nf4(weight, feedback_factors(inputs)), torch.float32)
    nearest = dequantise_nf4(quantise_nf4(weight), torch.float32)
    assert float((found - weight).norm()) <= 1.01 * float((nearest - weight).norm())
    assert float(found[3].abs().max()) < 0.02 * float(weight.abs().max())
