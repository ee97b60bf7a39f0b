"""GPTQ against an independent solution and against rounding to the nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from normfuse.errors import NormfuseError, UsageError
from normfuse.quant import ShiftQuant
from normfuse.quant.gptq import gptq_codes
from normfuse.quant.quantizer import quantize_weight


def _correlated(k: int, rows: int = 400) -> Tensor:
    x = torch.randn(rows, k, dtype=torch.float64) @ (torch.randn(k, k, dtype=torch.float64) / k**0.5 + 0.5 * torch.eye(k))
    return x.T @ x / rows


def _error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    d = weight.double() - approximation
    return ((d @ hessian) * d).sum(1)


@pytest.mark.parametrize("exponents", [pytest.param(e, id=e) for e in ("range", "search")])
def test_error_of_the_product_falls(exponents: str) -> None:
    weight, hessian = torch.randn(64, 160), _correlated(160)  # more than one block of columns
    error = {}
    for rounding in ("nearest", "gptq"):
        found = quantize_weight(weight, ShiftQuant(weight_bits=4, exponents=exponents, rounding=rounding), hessian=hessian)
        error[rounding] = _error(weight, found.dequantized(), hessian)
    assert bool((error["gptq"] <= error["nearest"] * (1 + 1e-9)).all()), "a row got worse"
    assert float(error["gptq"].sum()) < 0.7 * float(error["nearest"].sum())


def test_exponents_and_scales_are_those_of_nearest() -> None:
    weight, hessian = torch.randn(16, 24), _correlated(24)
    nearest, gptq = (quantize_weight(weight, ShiftQuant(weight_bits=4, rounding=r), hessian=hessian) for r in ("nearest", "gptq"))
    assert torch.equal(nearest.exponents, gptq.exponents)
    assert torch.equal(nearest.scale, gptq.scale)
    assert not torch.equal(nearest.codes, gptq.codes)


def test_two_columns_by_hand() -> None:
    """The first column that is rounded is that of the larger H[k, k]; the other takes over its error, H[0, 1] / H[1, 1] of it."""
    hessian = torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    for a, b in itertools.product((0.4, 1.3, -2.2), (0.1, 0.45, -0.3)):
        weight = torch.tensor([[a, b]])
        found = gptq_codes(weight, torch.ones(1, 2, dtype=torch.float64), hessian, -7, 7)
        first = round(a)
        damping = 0.01 * 2.5
        second = round(float(torch.tensor(b + (a - first) * 1.5 / (1.0 + damping))))
        candidates = [[first, second], [round(a), round(b)]]
        best = min(candidates, key=lambda c: float(_error(weight, torch.tensor([c], dtype=torch.float64), hessian)))
        assert found.tolist() == [best]


def test_channels_that_are_never_excited_are_rounded_to_the_nearest() -> None:
    weight, hessian = torch.randn(8, 12), _correlated(12)
    hessian[5] = 0
    hessian[:, 5] = 0
    spec = ShiftQuant(weight_bits=4, rounding="gptq")
    found = quantize_weight(weight, spec, hessian=hessian)
    step = found.scale.double() * 2.0 ** (found.groups - 1 - int(found.exponents[5]))
    assert torch.equal(found.codes[:, 5].double(), (weight[:, 5].double() / step).round().clamp(-7, 7))
    nothing = quantize_weight(weight, spec, hessian=torch.zeros(12, 12))
    assert torch.equal(nothing.codes, quantize_weight(weight, ShiftQuant(weight_bits=4), hessian=torch.zeros(12, 12)).codes)


def test_rank_deficient_moments() -> None:
    x = torch.randn(3, 40, dtype=torch.float64)
    found = quantize_weight(torch.randn(8, 40), ShiftQuant(rounding="gptq"), hessian=x.T @ x)
    assert int(found.codes.abs().max()) <= 7


def test_needs_moments() -> None:
    with pytest.raises(UsageError, match="gptq"):
        quantize_weight(torch.randn(4, 4), ShiftQuant(rounding="gptq"))
    with pytest.raises(NormfuseError, match="semidefinite"):
        gptq_codes(torch.randn(4, 2), torch.ones(4, 2), torch.tensor([[1.0, 50.0], [50.0, 1.0]]), -7, 7)
