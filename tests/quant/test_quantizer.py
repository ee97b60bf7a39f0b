"""Weights into integers: exponents by range and by search, and what cannot be quantized."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import ShiftQuant
from normfuse.quant.quantizer import quantize_weight, weighted_error
from normfuse.quant.shift import shift_quantize


def _relative(weight: Tensor, spec: ShiftQuant, moments: Tensor | None = None) -> float:
    m = torch.ones(weight.shape[1]) if moments is None else moments
    zero = float((weight.double().square() @ m.double()).sum())
    return float((weighted_error(weight, quantize_weight(weight, spec, moments=moments), m) / zero) ** 0.5)


def _outliers(n: int = 256, k: int = 400) -> Tensor:
    """2 % of the input channels are eight times larger than the others."""
    weight = torch.randn(n, k)
    weight[:, torch.randperm(k)[: k // 50]] *= 8
    return weight


def test_range_of_a_whole_tensor_is_the_published_quantizer() -> None:
    weight = torch.tensor([[8, -3, 0.9], [4, 1, -0.4]], dtype=torch.float64)
    spec = ShiftQuant(weight_bits=4, groups=3, granularity="per_tensor", exponents="range")
    found = quantize_weight(weight, spec)
    assert found.exponents.tolist() == [0, 1, 2]
    # 3.5 steps are a tie only as long as 8/7 is not rounded to float32, as a stored scale is
    assert found.codes.tolist() in ([[7, -5, 3], [4, 2, -1]], [[7, -5, 3], [3, 2, -1]])
    torch.testing.assert_close(found.scale, torch.full((2,), 8 / 7 / 4))  # S · 2^-E
    random = torch.randn(20, 30, dtype=torch.float64)
    again = quantize_weight(random, spec)
    assert torch.equal(again.codes, shift_quantize(random, 4, 3, 1).codes)


@pytest.mark.parametrize("granularity", [pytest.param(g, id=g) for g in ("per_channel", "per_tensor")])
@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in (2, 4, 8)])
def test_range_clips_nothing(bits: int, granularity: str) -> None:
    weight = _outliers(48, 100) * torch.exp2(torch.randn(48, 1))
    found = quantize_weight(weight, ShiftQuant(weight_bits=bits, exponents="range", granularity=granularity))
    step = found.scale.double()[:, None] * torch.exp2(found.groups - 1 - found.exponents.double())
    assert bool(((weight - found.dequantized()).abs() <= step / 2 * (1 + 1e-6)).all())


def test_fine_exponents_beat_coarse_ones_and_none_where_channels_stand_out() -> None:
    weight = _outliers()
    error = {
        name: _relative(weight, ShiftQuant(weight_bits=4, groups=groups, group_size=size))
        for name, groups, size in (("none", 1, 1), ("by32", 4, 32), ("by8", 4, 8), ("each", 4, 1))
    }
    assert error["each"] < 0.4 * error["none"]
    assert error["each"] < error["by8"] < error["by32"] <= error["none"] * (1 + 1e-9)
    assert error["each"] < 1.05 * _relative(torch.randn(256, 400), ShiftQuant(weight_bits=4))  # as if there were none


def test_search_beats_range() -> None:
    for weight in (torch.randn(64, 96), _outliers()):
        for bits, factor in ((2, 0.65), (3, 0.8), (4, 0.92)):
            searched = _relative(weight, ShiftQuant(weight_bits=bits))
            assert searched < factor * _relative(weight, ShiftQuant(weight_bits=bits, exponents="range"))


def test_moments_move_the_error_to_where_it_does_not_matter() -> None:
    weight, moments = torch.randn(64, 96), torch.ones(96)
    moments[:8] = 900.0
    spec = ShiftQuant(weight_bits=4)
    aware = _relative(weight, spec, moments)
    blind = quantize_weight(weight, spec)
    total = float((weight.double().square() @ moments.double()).sum())
    assert aware < 0.8 * (weighted_error(weight, blind, moments) / total) ** 0.5


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(2, 8),
    st.integers(1, 8),
    st.integers(1, 5),
    st.sampled_from(("per_channel", "per_tensor")),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_search_is_never_worse_than_range(
    n: int, k: int, bits: int, groups: int, size: int, granularity: str, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.exp2(3 * torch.randn(k, generator=generator))
    weight[:, torch.rand(k, generator=generator) < 0.1] = 0
    moments = torch.rand(k, generator=generator) if weighted else torch.ones(k)
    # the search's own measure: small moments count a little
    measure = moments.double() / moments.double().mean() + 1e-4 if weighted else moments.double()
    found = {}
    for exponents in ("range", "search"):
        spec = ShiftQuant(
            weight_bits=bits, groups=groups, group_size=size, granularity=granularity, exponents=exponents, activations="dynamic"
        )
        result = quantize_weight(weight, spec, moments=moments if weighted else None)
        found[exponents] = weighted_error(weight, result, measure)
        assert 1 <= result.groups <= groups
        assert int(result.exponents.min()) == 0
        neighbours = result.exponents.split(size)
        assert all(len(set(part.tolist())) == 1 for part in neighbours)
        if granularity == "per_tensor":
            assert len(set(result.scale.tolist())) == 1
    assert found["search"] <= found["range"] * (1 + 1e-12)


def test_columns_of_a_channel_share_their_exponent() -> None:
    weight = torch.randn(8, 4 * 9) * torch.tensor([1.0, 0.25, 4.0, 0.1]).repeat(9)
    channels = torch.arange(4).repeat(9)
    found = quantize_weight(weight, ShiftQuant(weight_bits=4), channel_groups=channels)
    assert torch.equal(found.exponents.view(9, 4), found.exponents[:4].expand(9, 4))
    assert found.groups > 1
    pairs = quantize_weight(weight, ShiftQuant(weight_bits=4, group_size=2), channel_groups=channels).exponents
    assert torch.equal(pairs[0::2], pairs[1::2])


def test_large_weights_are_searched_on_a_sample_of_rows() -> None:
    weight = _outliers(2500, 40)
    weight[:, 0] *= 8
    searched = _relative(weight, ShiftQuant())
    assert searched < 0.6 * _relative(weight, ShiftQuant(exponents="range"))


def test_rows_columns_and_matrices_of_zeros() -> None:
    weight = torch.randn(6, 10)
    weight[2] = 0
    weight[:, 3] = 0
    for exponents in ("range", "search"):
        found = quantize_weight(weight, ShiftQuant(weight_bits=4, exponents=exponents))
        assert not found.dequantized()[2].any()
        assert not found.dequantized()[:, 3].any()
        assert bool((found.scale > 0).all() & found.scale.isfinite().all())
        nothing = quantize_weight(torch.zeros(3, 5), ShiftQuant(exponents=exponents))
        assert nothing.groups == 1
        assert not nothing.codes.any()


@pytest.mark.parametrize("size", [pytest.param(s, id=f"{s:g}") for s in (1e-45, 1e-40, 1e-37, 1e30, 3e38)])
@pytest.mark.parametrize("exponents", [pytest.param(e, id=e) for e in ("range", "search")])
def test_tiny_and_huge_weights(exponents: str, size: float) -> None:
    weight = torch.tensor([[1.0, 0.5, -0.01], [0.3, -1.0, 0.002]], dtype=torch.float64) * size
    found = quantize_weight(weight.float(), ShiftQuant(weight_bits=8, exponents=exponents))
    assert bool((found.scale > 0).all() & found.scale.isfinite().all())
    # a stored scale is at least the smallest normal number, and a step up to eight of it
    assert float((found.dequantized() - weight).abs().max()) <= max(0.02 * size, 2.0**-124)


def test_one_input_and_one_output() -> None:
    for exponents in ("range", "search"):
        found = quantize_weight(torch.tensor([[-0.7]]), ShiftQuant(exponents=exponents))
        torch.testing.assert_close(found.dequantized(), torch.tensor([[-0.7]], dtype=torch.float64), rtol=1e-6, atol=0)
        assert quantize_weight(torch.randn(5, 1), ShiftQuant(exponents=exponents)).codes.shape == (5, 1)
        assert quantize_weight(torch.randn(1, 5), ShiftQuant(exponents=exponents)).codes.shape == (1, 5)


def test_stochastic_rounding_is_seeded() -> None:
    weight = torch.randn(16, 16)
    one, two, other = (quantize_weight(weight, ShiftQuant(rounding="stochastic", seed=s)).codes for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [
            quantize_weight(
                weight, ShiftQuant(weight_bits=8, exponents="range", rounding="stochastic"), generator=generator
            ).dequantized()
            for _ in range(400)
        ]
    )
    assert float((draws.mean(0) - weight).abs().max()) < 0.2 * float(draws.std(0).max()) + 1e-3


def test_half_precision_weights() -> None:
    weight = torch.randn(8, 12).bfloat16()
    assert torch.equal(quantize_weight(weight, ShiftQuant()).codes, quantize_weight(weight.double(), ShiftQuant()).codes)


@pytest.mark.parametrize(
    ("weight", "kwargs", "message"),
    [
        pytest.param(torch.tensor([[1.0, float("nan")]]), {}, "1 of 2 values are NaN or Inf", id="nan"),
        pytest.param(torch.tensor([[1.0, -float("inf")]]), {}, "1 of 2 values are NaN or Inf", id="inf"),
        pytest.param(torch.tensor([[1e200]], dtype=torch.float64), {}, "beyond float32", id="beyond-float32"),
        pytest.param(torch.ones(3), {}, r"shape \(3,\)", id="vector"),
        pytest.param(torch.ones(0, 3), {}, "not empty", id="empty"),
        pytest.param(torch.ones(2, 2, dtype=torch.int32), {}, "int32", id="integers"),
        pytest.param(torch.ones(2, 3), {"moments": torch.ones(2)}, "expected 3", id="moments-shape"),
        pytest.param(torch.ones(2, 3), {"moments": torch.tensor([1.0, -1, 1])}, "not negative", id="moments-negative"),
        pytest.param(torch.ones(2, 3), {"moments": torch.tensor([1.0, float("nan"), 1])}, "finite", id="moments-nan"),
        pytest.param(torch.ones(2, 3), {"hessian": torch.eye(2)}, r"\[3, 3\]", id="hessian-shape"),
        pytest.param(torch.ones(2, 3), {"channel_groups": torch.ones(3)}, "3 integers", id="channels-float"),
    ],
)
def test_what_cannot_be_quantized(weight: Tensor, kwargs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_weight(weight, ShiftQuant(), **kwargs)  # type: ignore[arg-type]


def test_moments_of_zero_leave_the_weight_as_important_as_it_was() -> None:
    weight = torch.randn(8, 12)
    dead = quantize_weight(weight, ShiftQuant(), moments=torch.zeros(12))
    assert torch.equal(dead.codes, quantize_weight(weight, ShiftQuant()).codes)
