"""The quantizer of ShiftQuant against its definition, a worked example and a table of errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.quant.shift import range_exponents, shift_quantize


@pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d)) for d in (torch.float32, torch.float64)])
def test_worked_example(dtype: torch.dtype) -> None:
    x = torch.tensor([[8, -3, 0.9], [4, 1, -0.4]], dtype=dtype)
    found = shift_quantize(x, bits=4, groups=3)
    assert found.exponents.tolist() == [0, 1, 2]
    assert found.codes.tolist() == [[7, -5, 3], [4, 2, -1]]  # 3.5 goes to the even neighbour
    assert float(found.scale) == pytest.approx(8 / 7, rel=1e-7)
    expected = [[8, -2.857143, 0.857143], [4.571429, 1.142857, -0.285714]]
    torch.testing.assert_close(found.dequantized(), torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)


# Relative error by bits and groups 1, 2, 4, 8, 16, and with a float scale for each channel; 32 Gaussian channels of 8 values,
# ranges spread over six powers of two.
TABLE = {
    4: (0.186, 0.126, 0.0974, 0.0967, 0.0967, 0.0711),
    6: (0.0506, 0.0309, 0.0241, 0.0239, 0.0239, 0.0176),
    8: (0.0126, 0.0071, 0.0053, 0.0053, 0.0053, 0.0040),
}


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in TABLE])
def test_error_falls_with_groups_as_published(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    sums = torch.zeros(6, dtype=torch.float64)
    repeats = 200
    for _ in range(repeats):
        spread = torch.exp2(-6 * torch.rand(32, generator=generator, dtype=torch.float64))
        x = torch.randn(8, 32, generator=generator, dtype=torch.float64) * spread
        step = x.abs().amax(0) / (2 ** (bits - 1) - 1)
        approximations = [
            *(shift_quantize(x, bits, groups, 1).dequantized() for groups in (1, 2, 4, 8, 16)),
            (x / step).round() * step,
        ]
        sums += torch.stack([(x - a).norm() / x.norm() for a in approximations])
    torch.testing.assert_close(sums / repeats, torch.tensor(TABLE[bits], dtype=torch.float64), rtol=0.12, atol=0)


@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 2), st.integers(0, 10_000))
def test_definition_holds(bits: int, groups: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) * torch.exp2(
        -8 * torch.rand(5, generator=generator).double()
    )
    x = x.movedim(2, dim)
    found = shift_quantize(x, bits, groups, dim)
    top = 2 ** (bits - 1) - 1
    r = x.abs().amax([d for d in range(3) if d != dim])
    e = found.exponents.double()
    assert bool((r * 2**e <= r.max()).all()), "a channel is clipped"
    assert bool(((r * 2 ** (e + 1) > r.max()) | (e == groups - 1)).all()), "a channel wastes half of its codes"
    assert found.codes.abs().max() == top
    shape = [-1 if d == dim else 1 for d in range(3)]
    half_step = float(found.scale) * 2.0**-e / 2
    assert bool(((x - found.dequantized()).abs() <= half_step.reshape(shape) * (1 + 1e-12)).all())


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        pytest.param(1.0, 0, id="equal"),
        pytest.param(0.5, 1, id="exact-half"),
        pytest.param(0.5000000000000001, 0, id="above-half"),
        pytest.param(0.125, 3, id="exact-eighth"),
        pytest.param(1e-30, 3, id="clamped"),
        pytest.param(0.0, 3, id="zero"),
    ],
)
def test_exponents_at_powers_of_two(ratio: float, expected: int) -> None:
    r = torch.tensor([3.0, 3.0 * ratio], dtype=torch.float64)
    assert range_exponents(r, 4).tolist() == [0, expected]


def test_stochastic_rounding_has_no_bias_and_follows_its_generator() -> None:
    x = torch.randn(16, 8)
    generator = torch.Generator().manual_seed(3)
    draws = torch.stack([shift_quantize(x, 4, 4, 1, "stochastic", generator).dequantized() for _ in range(2000)])
    assert float((draws.mean(0) - x).abs().max() / x.abs().max()) < 6e-3
    assert float((shift_quantize(x, 4, 4, 1).dequantized() - x).abs().max() / x.abs().max()) > 2e-2  # what bias looks like
    one, two = (shift_quantize(x, 4, 4, 1, "stochastic", torch.Generator().manual_seed(5)).codes for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("value", [pytest.param(v, id=str(v)) for v in (float("nan"), float("inf"), -float("inf"))])
def test_not_finite_is_nan(value: float) -> None:
    x = torch.ones(2, 3)
    x[1, 2] = value
    found = shift_quantize(x, 4)
    assert not found.codes.any()
    assert bool(found.dequantized().isnan().all())


@pytest.mark.parametrize("groups", [pytest.param(g, id=f"{g}groups") for g in (1, 4, 16)])
def test_zeros_denormals_and_huge_values(groups: int) -> None:
    zeros = shift_quantize(torch.zeros(3, 4), 4, groups)
    assert float(zeros.scale) == 1.0
    assert not zeros.codes.any()
    for size in (1e-45, 1e-42, 1e-38, 3.4e38):
        x = torch.tensor([[size, -size, 0.0], [size / 3, size, size]])
        back = shift_quantize(x, 8, groups).dequantized()
        assert bool(back.isfinite().all())
        assert float((back.double() - x.double()).abs().max()) <= max(size / 127, 2e-38)
    assert shift_quantize(torch.zeros(0, 4), 4, groups).codes.shape == (0, 4)


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.randn(4, 6).bfloat16()
    found = shift_quantize(x, 6)
    assert found.scale.dtype == torch.float32
    assert torch.equal(found.codes, shift_quantize(x.float(), 6).codes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"bits": 1}, "1 bits", id="bits"),
        pytest.param({"bits": 4, "groups": 0}, "groups=0", id="groups"),
        pytest.param({"bits": 4, "dim": 2}, "dim=2", id="dim"),
        pytest.param({"bits": 4, "rounding": "up"}, "rounding='up'", id="rounding"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shift_quantize(torch.ones(2, 3), **kwargs)  # type: ignore[arg-type]
