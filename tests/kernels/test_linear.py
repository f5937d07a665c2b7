"""Tries to make the wide product on a CPU differ from PyTorch's own: shapes, biases, strides, types, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metier.kernels import linear as module
from metier.kernels.linear import linear


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 64), (7, 64), (3, 5, 64), (2, 3, 4, 64), (0, 64), (33, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_plain_product(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(48, 64, generator=generator)
    b = torch.randn(48, generator=generator) if bias else None
    with torch.no_grad():
        got, want = linear(x, weight, b), F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert got.shape == want.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def test_a_view_of_a_larger_tensor_is_read_right() -> None:
    wide, weight = torch.randn(6, 4, 128), torch.randn(96, 64)
    x = wide.transpose(0, 1)[..., 32:96]
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight[::2]), F.linear(x, weight[::2]), atol=2e-5, rtol=0)


def test_gradients_and_other_types_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("the forward-only operator was asked for")

    monkeypatch.setattr(module, "_onednn", never)
    x = torch.randn(3, 8, requires_grad=True)
    linear(x, torch.randn(4, 8)).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert linear(x.bfloat16(), torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16
        assert torch.equal(linear(x[:1], torch.ones(4, 8)), F.linear(x[:1], torch.ones(4, 8)))
