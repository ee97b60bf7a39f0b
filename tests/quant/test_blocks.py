"""Multipliers of blocks: how they are chosen, laid out, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import ShiftQuant
from normfuse.quant.accumulator import accumulator_bits
from normfuse.quant.packing import pack_multipliers, unpack_multipliers
from normfuse.quant.quantizer import quantize_weight, weighted_error
from normfuse.quant.weight import BLOCKS, QuantizedWeight, block_of, largest_multiplier


def _spec(bits: int = 4, block: int = 32, **other: Any) -> ShiftQuant:
    return ShiftQuant(weight_bits=bits, block=block, rounding="nearest", **other)


def _uneven(n: int = 48, k: int = 320) -> Tensor:
    """Blocks of 32 whose sizes differ by up to eight times, for each output another way."""
    return torch.randn(n, k) * torch.exp2(3 * torch.rand(n, k // 32)).repeat_interleave(32, 1)


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in (2, 3, 4)])
def test_what_can_be_written_exactly_is(bits: int) -> None:
    top, most = 2 ** (bits - 1) - 1, largest_multiplier(bits)
    codes = torch.randint(-top, top + 1, (20, 160), dtype=torch.int8)
    codes[:, ::32], codes[:, 1::32] = -top - 1, top  # every block uses its scale
    m = torch.randint(1, most + 1, (20, 5)).to(torch.int8)
    m[:, 2], m[:, 3] = most, -(most // 2)
    given_ = QuantizedWeight(codes, torch.zeros(160, dtype=torch.uint8), torch.rand(20) + 0.1, bits, m, 32)
    found = quantize_weight(given_.dequantized().float(), _spec(bits))
    torch.testing.assert_close(found.dequantized(), given_.dequantized(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in (2, 3, 4)])
def test_blocks_beat_one_scale_an_output(bits: int) -> None:
    """By as much as float scales of blocks would, to a few percent."""
    weight = _uneven()
    error = {block: weighted_error(weight, quantize_weight(weight, _spec(bits, block, groups=1))) for block in (0, 32, 64)}
    assert error[32] < error[64] < error[0]
    each = weight.unflatten(1, (-1, 32)).flatten(0, 1)  # every block a row with the best float scale
    ideal = weighted_error(each, quantize_weight(each, _spec(bits, 0, groups=1)))
    assert error[32] < 1.12 * ideal


def test_moments_say_what_counts() -> None:
    weight, moments = _uneven(), torch.logspace(-2, 2, 320)[torch.randperm(320)]
    plain, weighted = (quantize_weight(weight, _spec(3), moments=m) for m in (None, moments))
    assert weighted_error(weight, weighted, moments) < weighted_error(weight, plain, moments)


def test_gptq_keeps_the_scales_and_lowers_the_error_of_the_product() -> None:
    x = torch.randn(900, 40).double() @ torch.randn(40, 96).double() + 0.1 * torch.randn(900, 96).double()
    weight, hessian = torch.randn(24, 96), x.T @ x / 900
    nearest, better = (
        quantize_weight(weight, dataclasses.replace(_spec(), rounding=rounding), hessian=hessian)
        for rounding in ("nearest", "gptq")
    )
    assert torch.equal(nearest.scale, better.scale)
    assert nearest.multipliers is not None
    assert better.multipliers is not None
    assert torch.equal(nearest.multipliers, better.multipliers)
    cost = [float(((e @ hessian) * e).sum()) for e in (weight.double() - q.dequantized() for q in (nearest, better))]
    assert cost[1] < 0.7 * cost[0]


@given(st.integers(1, 40), st.integers(1, 300), st.integers(2, 4), st.sampled_from(BLOCKS), st.integers(0, 999))
def test_any_weight_has_valid_integers(n: int, k: int, bits: int, block: int, seed: int) -> None:
    """Zeros, tiny and huge numbers among others; `QuantizedWeight` refuses what would not be valid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * torch.exp2(torch.randint(-140, 100, (n, 1), generator=generator).float())
    weight[:, ::3] = 0
    found = quantize_weight(weight, _spec(bits, block))
    assert bool(found.dequantized().isfinite().all())
    assert found.multipliers is not None
    packed = pack_multipliers(found.multipliers)
    again, size = unpack_multipliers(packed, n, k)
    assert torch.equal(again, found.multipliers)
    assert -(-k // size) == -(-k // block)


@given(st.integers(1, 4000), st.sampled_from(BLOCKS))
def test_the_number_of_blocks_tells_their_size(k: int, block: int) -> None:
    found = block_of(k, -(-k // block))
    assert found == block or (found < block and -(-k // found) == 1)


def test_the_accumulator_is_that_of_the_operands() -> None:
    found = quantize_weight(_uneven(), _spec())
    assert accumulator_bits(found, 8) == (int(found.operand().abs().sum(1).max()) * 127).bit_length() + 1


def test_wide_codes_and_convolutions_keep_exponents() -> None:
    weight = _uneven()
    assert quantize_weight(weight, _spec(5)).multipliers is None
    assert quantize_weight(weight, _spec(), channel_groups=torch.arange(320) % 160).multipliers is None


def _weight(**changes: Any) -> QuantizedWeight:
    values: dict[str, Any] = {
        "codes": torch.zeros(3, 70, dtype=torch.int8), "exponents": torch.zeros(70, dtype=torch.uint8), "scale": torch.ones(3),
        "bits": 4, "multipliers": torch.ones(3, 3, dtype=torch.int8), "block": 32,
    }  # fmt: skip
    return QuantizedWeight(**values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"block": 48}, "for blocks of 48", id="size"),
        pytest.param({"multipliers": torch.ones(3, 2, dtype=torch.int8)}, "multipliers \\(3, 2\\)", id="shape"),
        pytest.param({"multipliers": torch.ones(3, 3)}, "of torch.float32", id="dtype"),
        pytest.param({"multipliers": torch.full((3, 3), -16, dtype=torch.int8)}, "outside ±1 … ±15", id="large"),
        pytest.param({"multipliers": torch.zeros(3, 3, dtype=torch.int8)}, "outside ±1 … ±15", id="zero"),
        pytest.param({"bits": 5}, "codes of up to 4 bits", id="bits"),
        pytest.param({"exponents": torch.arange(70, dtype=torch.uint8) % 2}, "exponents of 0", id="exponents"),
    ],
)
def test_what_is_no_weight_in_blocks(changes: dict[str, Any], message: str) -> None:
    assert _weight().operand().shape == (3, 70)
    with pytest.raises(UsageError, match=message):
        _weight(**changes)


@pytest.mark.parametrize("block", [16, 48, True, 512, "32"])
def test_sizes_that_there_are_not(block: Any) -> None:
    with pytest.raises(UsageError, match="expected 0 \\(none\\), 32, 64, 128, 256"):
        ShiftQuant(block=block)


def test_a_scale_of_the_whole_weight_has_no_blocks() -> None:
    with pytest.raises(UsageError, match="blocks are parts of the scale of an output"):
        ShiftQuant(block=32, granularity="per_tensor")
