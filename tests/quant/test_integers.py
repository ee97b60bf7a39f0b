"""Integer arithmetic: exact, and what happens to values that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import NormfuseError, UsageError
from normfuse.quant.accumulator import accumulator_bits, check_accumulator
from normfuse.quant.integers import integer_matmul, quantize_rows, quantize_static
from normfuse.quant.weight import QuantizedWeight

NAN, INF = float("nan"), float("inf")


@given(st.integers(1, 6), st.integers(1, 50), st.integers(2, 8), st.integers(-60, 60), st.integers(0, 10_000))
def test_rows_are_those_of_ieee_arithmetic(rows: int, k: int, bits: int, power: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(rows, k)).astype(np.float32) * np.float32(2.0**power)
    q, scale = quantize_rows(torch.from_numpy(x), bits)
    top = np.float32(2 ** (bits - 1) - 1)
    largest = np.abs(x).max(1, keepdims=True)
    expected = np.clip(np.rint(x * (top / largest)), -top, top)
    assert q.dtype == torch.int8
    assert np.array_equal(q.numpy(), expected.astype(np.int8))
    assert np.array_equal(scale.numpy(), largest / top)
    assert int(q.abs().amax(1).min()) == top


def test_rows_of_zeros_nan_and_infinity() -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, NAN, 2.0], [1.0, INF, 2.0], [-INF, 0.0, NAN], [1.0, 2.0, -4.0]])
    q, scale = quantize_rows(x, 8)
    assert not q[:4].any()
    assert scale[0] == 1.0
    assert bool(scale[1:4].isnan().all())
    assert q[4].tolist() == [32, 64, -127]  # ties go to the even neighbour: 31.75, 63.5


@pytest.mark.parametrize("size", [pytest.param(s, id=f"{s:g}") for s in (1e-45, 1e-40, 1e-37, 3.4e38)])
def test_tiny_and_huge_rows_stay_finite(size: float) -> None:
    x = torch.tensor([[size, 0.0, -size]])
    q, scale = quantize_rows(x, 8)
    assert bool(scale.isfinite().all())
    assert q.tolist() == [[127, 0, -127]]


def test_dtypes_are_decided_in_float32() -> None:
    x = torch.randn(5, 33)
    q, scale = quantize_rows(x, 6)
    wide, wide_scale = quantize_rows(x.double(), 6)
    assert torch.equal(q, wide)
    assert torch.equal(scale, wide_scale)
    half = x.bfloat16()
    assert torch.equal(quantize_rows(half, 6)[0], quantize_rows(half.float(), 6)[0])
    assert quantize_rows(x[:0], 6)[0].shape == (0, 33)
    with pytest.raises(UsageError, match="at least one"):
        quantize_rows(torch.ones(3, 0), 6)


def test_static_scale_is_quantize_linear() -> None:
    x = torch.tensor([0.0, 0.25, 0.75, -0.75, 100.0, -100.0, NAN, INF, -INF])
    assert quantize_static(x, 0.5, 8).tolist() == [0, 0, 2, -2, 127, -127, 0, 127, -127]
    assert quantize_static(x, torch.tensor(0.5, dtype=torch.float64), 4).tolist() == [0, 0, 2, -2, 7, -7, 0, 7, -7]


@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 9), st.integers(0, 15), st.integers(0, 10_000))
def test_products_are_exact(m: int, k: int, n: int, shift: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    q = generator.integers(-127, 128, (m, k)).astype(np.int8)
    operand = (generator.integers(-127, 128, (n, k)) << generator.integers(0, shift + 1, k)).astype(np.int32)
    expected = q.astype(np.int64) @ operand.astype(np.int64).T
    assert np.abs(expected).max() < 2**31
    found = integer_matmul(torch.from_numpy(q), torch.from_numpy(operand))
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("k", [pytest.param(k, id=str(k)) for k in (1040, 1041, 20_000)])
def test_products_are_exact_at_the_limits_of_float32(k: int) -> None:
    q, operand = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, k), 127, dtype=torch.int32)
    q[0, -1] = 126
    assert int(integer_matmul(q, operand)) == 127 * 127 * k - 127


def test_a_sum_beyond_32_bits_is_an_error() -> None:
    q = torch.full((2, 4), 127, dtype=torch.int8)
    with pytest.raises(NormfuseError, match="32 bits"):
        integer_matmul(q, torch.full((3, 4), 1 << 23, dtype=torch.int32))
    with pytest.raises(UsageError, match="differ in K"):
        integer_matmul(q, torch.ones(3, 5, dtype=torch.int32))
    assert integer_matmul(q[:0], torch.ones(3, 4, dtype=torch.int32)).shape == (0, 3)


def _constant(n: int, k: int, bits: int, groups: int) -> QuantizedWeight:
    """The largest codes there are, all channels but the last shifted as far as can be."""
    exponents = torch.zeros(k, dtype=torch.uint8)
    exponents[-1] = groups - 1
    return QuantizedWeight(torch.full((n, k), 2 ** (bits - 1) - 1, dtype=torch.int8), exponents, torch.ones(n), bits)


@pytest.mark.parametrize(
    ("bits", "groups", "k"),
    [
        pytest.param(2, 1, 1, id="least"),
        pytest.param(4, 4, 768, id="usual"),
        pytest.param(6, 4, 4096, id="wide"),
        pytest.param(8, 1, 9, id="plain"),
    ],
)
def test_accumulator_is_as_wide_as_the_worst_sum(bits: int, groups: int, k: int) -> None:
    weight = _constant(3, k, bits, groups)
    worst = 127 * int(weight.operand().long().sum(1).max())
    needed = accumulator_bits(weight, 8)
    assert -(2 ** (needed - 1)) <= -worst < worst <= 2 ** (needed - 1) - 1
    assert worst > 2 ** (needed - 2) - 1
    q = torch.full((1, k), 127, dtype=torch.int8)
    assert int(integer_matmul(q, weight.operand()).max()) == worst
    assert check_accumulator(weight, 8, "blocks.0.fc1") == needed <= 32


def test_accumulator_counts_the_codes_that_are_there() -> None:
    weight = _constant(2, 4096, 8, 8)
    quiet = QuantizedWeight(weight.codes // 64, weight.exponents, weight.scale, 8)
    assert accumulator_bits(weight, 8) == 34
    assert accumulator_bits(quiet, 8) == 27


def test_an_accumulator_that_is_too_narrow_names_layer_bits_and_remedy() -> None:
    with pytest.raises(
        UsageError, match=r"blocks\.3\.fc2: .*\[2, 4096\].* need 34 bits; .*groups=6.*2 bits less.*'blocks\.3\.fc2'"
    ):
        check_accumulator(_constant(2, 4096, 8, 8), 8, "blocks.3.fc2")
    with pytest.raises(UsageError, match="1 bits less") as found:
        check_accumulator(_constant(1, 140_000, 8, 1), 8, "head")
    assert "groups=" not in str(found.value)
