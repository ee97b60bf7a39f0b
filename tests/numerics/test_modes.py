"""What runs in float64 computes what it computes."""

import torch

import normfuse.ops  # noqa: F401 -- registers the operators
from normfuse.numerics.modes import Float64


def test_integers_that_are_numbers_are_computed_in_float64() -> None:
    with Float64():
        y = torch.tensor([1]) / torch.tensor([3])
    assert y.dtype is torch.float64
    assert y.item() == 1 / 3


def test_integers_of_an_operator_of_our_own_are_codes() -> None:
    codes = torch.tensor([0, 3, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    expected = torch.ops.normfuse.dequantize_codes(codes, 0.1, 3)
    with Float64():
        y = torch.ops.normfuse.dequantize_codes(codes, 0.1, 3)
    assert y.dtype is torch.float64
    assert torch.equal(y, expected.double())
