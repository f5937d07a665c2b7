"""Tries to pass a wrong kernel off as right: the bounds of the kernels' tests must see each seeded fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from metier.kernels import reference
from metier.kernels.reference import Rows
from tests.kernels.bounds import close, e4m3_close, rows_close, size_of_gradient, size_of_low, steps


def cancelling(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row and a column whose product cancels to a hundredth of its terms' size."""
    generator = torch.Generator().manual_seed(num)
    row, column = torch.randn(1, num, generator=generator).double(), torch.randn(num, 1, generator=generator).double()
    wanted = 0.01 * (row.square() @ column.square()).sqrt()
    column[-1] += (wanted[0] - row @ column[:, 0]) / row[0, -1]
    return row, column


def test_a_sum_that_cancels_may_err_as_its_terms_do() -> None:
    row, column = cancelling(96)
    rounded = (row.bfloat16().double() @ column.bfloat16().double()).bfloat16()
    exact = row @ column
    with pytest.raises(AssertionError):
        close(rounded, exact, torch.bfloat16)
    close(rounded, exact, torch.bfloat16, size_of_low(row, column, (96,)))


@pytest.mark.parametrize("num", [96, 4096])
def test_a_sum_without_its_largest_terms_is_seen(num: int) -> None:
    row, column = cancelling(num)
    left_out = (row[0] * column[:, 0]).abs().topk(2).indices
    shorter = row.clone()
    shorter[0, left_out[0]] = 0
    with pytest.raises(AssertionError):
        close(shorter @ column, row @ column, torch.bfloat16, size_of_low(row, column, (num,)))


def test_a_gradient_without_one_of_64_rows_is_seen() -> None:
    torch.manual_seed(0)
    dy, low = torch.randn(64, 40).double(), torch.randn(64, 5).double()
    fault = reference.rank_gradient(dy[:-1], low[:-1], (40,))
    with pytest.raises(AssertionError):
        close(fault, reference.rank_gradient(dy, low, (40,)), torch.bfloat16, size_of_gradient(dy, low, (40,)))


def test_a_projection_of_the_wrong_range_is_seen() -> None:
    torch.manual_seed(0)
    x, down = torch.randn(7, 96).double(), torch.randn(96, 3).double()
    want = reference.project_rows(x, down=down, segments=(32, 96))
    fault = reference.project_rows(x, down=down, segments=(33, 96))
    with pytest.raises(AssertionError):
        rows_close(fault, want, torch.bfloat16, size_of_low(x, down, (32, 96)))


def shifted(eight: torch.Tensor, by: int) -> torch.Tensor:
    codes = eight.view(torch.uint8).clone()
    codes[0, 0] += by
    return codes.view(eight.dtype)


def cut(eight: torch.Tensor) -> torch.Tensor:
    codes = eight.view(torch.uint8).clone()
    codes[:, -16:] = 0
    return codes.view(eight.dtype)


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, eight, scale: shifted(eight, 2),
        lambda x, eight, scale: (0.97 * x / scale).to(eight.dtype),
        lambda x, eight, scale: eight.view(torch.uint8).roll(1, 1).view(eight.dtype),
        lambda x, eight, scale: (-eight.float()).to(eight.dtype),
        lambda x, eight, scale: cut(eight),
    ],
    ids=["two steps", "3 % smaller", "rolled", "negative", "the last 16 columns unwritten"],
)
def test_a_quantised_row_that_is_wrong_is_seen(fault: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 96)
    eight, scale = reference.quantise_rows(x)
    rows_close(Rows(None, shifted(eight, 1), scale), Rows(None, eight, scale), torch.bfloat16)
    with pytest.raises(AssertionError):
        rows_close(Rows(None, fault(x, eight, scale), scale), Rows(None, eight, scale), torch.bfloat16)


def test_a_bf16_error_before_quantisation_stays_within_the_ties() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4096).double()
    e4m3_close(reference.quantise_rows(x.bfloat16())[0], reference.quantise_rows(x)[0], torch.bfloat16)


def test_e4m3_values_are_numbered_in_their_order() -> None:
    codes = torch.tensor([0xFE, 0x81, 0x80, 0x00, 0x01, 0x7E], dtype=torch.uint8)
    numbers = steps(codes.view(reference.FP8))
    assert numbers.tolist() == [-126, -1, 0, 0, 1, 126]
    assert codes.view(reference.FP8).float().sort().values.tolist() == codes.view(reference.FP8).float().tolist()
