"""What is packed comes back, and stands where native/normfuse.h says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.packing import (
    channel_order,
    pack,
    pack_groups,
    pack_rows,
    packed_bytes,
    planes,
    row_bytes,
    unpack,
    unpack_rows,
)
from normfuse.quant.weight import QuantizedWeight


def _weight(n: int, k: int, bits: int, groups: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (n, k), generator=generator, dtype=torch.int8)
    exponents = torch.randint(0, groups, (k,), generator=generator).to(torch.uint8)
    return QuantizedWeight(codes, exponents, torch.ones(n), bits)


_UNIT = {8: 1, 4: 2, 6: 4, 2: 4, 3: 8, 5: 8, 7: 8}


def _by_hand(weight: QuantizedWeight) -> list[int]:
    """The layout, byte by byte, as the header's comment says it."""
    n, k = weight.codes.shape
    bits, codes, e = weight.bits, weight.codes.tolist(), weight.exponents.tolist()
    channels: list[int | None] = []
    for exponent in range(max(e) + 1):
        channels += [c for c in range(k) if e[c] == exponent]
        channels += [None] * (-len(channels) % 4)
    channels += [None] * (-len(channels) % (4 * _UNIT[bits]))
    out = []
    for panel in range(0, n, 16):
        low = 0
        for width in (w for w in (8, 4, 2, 1) if bits & w):
            per = 8 // width
            for first in range(0, len(channels) // 4, per):
                for column in range(16):
                    for lane in range(4):
                        byte = 0
                        for i in range(per):
                            channel, row = channels[(first + i) * 4 + lane], panel + column
                            code = codes[row][channel] if channel is not None and row < n else 0
                            byte |= (((code + 2 ** (bits - 1)) >> low) & (2**width - 1)) << (i * width)
                        out.append(byte)
            low += width
    return out


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in range(2, 9)])
@pytest.mark.parametrize(
    ("n", "k", "groups"), [pytest.param(1, 1, 1, id="one"), pytest.param(17, 9, 3, id="odd"), pytest.param(16, 32, 1, id="even")]
)
def test_layout_is_that_of_the_header(n: int, k: int, groups: int, bits: int) -> None:
    weight = _weight(n, k, bits, groups)
    assert pack(weight).tolist() == _by_hand(weight)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(2, 8), st.integers(1, 16), st.integers(0, 10_000))
def test_what_is_packed_comes_back(n: int, k: int, bits: int, groups: int, seed: int) -> None:
    weight = _weight(n, k, bits, groups, seed)
    packed = pack(weight)
    order, sizes = channel_order(weight.exponents)
    assert packed.numel() == packed_bytes(n, bits, sizes.tolist())
    assert torch.equal(unpack(packed, bits, weight.exponents, n), weight.codes)
    assert sorted(order.tolist()) == list(range(k))
    assert weight.exponents[order.long()].tolist() == sorted(weight.exponents.tolist())


def test_channels_of_an_exponent_keep_their_order() -> None:
    order, sizes = channel_order(torch.tensor([2, 0, 2, 0, 0], dtype=torch.uint8))
    assert order.tolist() == [1, 3, 4, 0, 2]
    assert sizes.tolist() == [3, 0, 2]


def test_four_bits_take_half_a_byte() -> None:
    assert packed_bytes(3072, 4, [500, 268]) == 3072 * 768 // 2
    assert [width for _, width in planes(7)] == [4, 2, 1]
    assert planes(6) == ((0, 4), (4, 2))


@given(st.integers(1, 12), st.integers(1, 40), st.integers(2, 8), st.integers(0, 10_000))
def test_rows_are_little_endian_bit_strings(rows: int, dim: int, bits: int, seed: int) -> None:
    codes = _weight(rows, dim, bits, 1, seed).codes
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, row_bytes(dim, bits))
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = sum((c + 2 ** (bits - 1)) << (i * bits) for i, c in enumerate(row))
        assert bytes(found) == whole.to_bytes(len(found), "little")
    assert torch.equal(unpack_rows(packed, dim, bits), codes)
    assert torch.equal(unpack_rows(packed[None, :1], dim, bits), codes[None, :1])


def test_groups_of_a_convolution_follow_each_other() -> None:
    taps, channels = 3, 5
    weights = []
    for seed in range(2):
        w = _weight(4, taps * channels, 4, 3, seed)
        weights.append(QuantizedWeight(w.codes, w.exponents[:channels].repeat(taps), w.scale, 4))
    packed, exponents, scale = pack_groups(weights, taps)
    assert packed.tolist() == pack(weights[0]).tolist() + pack(weights[1]).tolist()
    assert exponents.tolist() == [*weights[0].exponents[:channels].tolist(), *weights[1].exponents[:channels].tolist()]
    assert scale.shape == (8,)


def test_wrong_arguments() -> None:
    weight = _weight(4, 6, 4, 2)
    with pytest.raises(UsageError, match="bytes"):
        unpack(pack(weight)[:-1], 4, weight.exponents, 4)
    with pytest.raises(UsageError, match="one shape"):
        pack_groups([weight, _weight(4, 6, 5, 2)])
    with pytest.raises(UsageError, match="taps of a channel differ"):
        pack_groups([QuantizedWeight(weight.codes, torch.arange(6, dtype=torch.uint8), weight.scale, 4)], 2)
    with pytest.raises(UsageError, match="multiple"):
        pack_groups([weight], 4)
    with pytest.raises(UsageError, match="2 to 8"):
        planes(9)
    with pytest.raises(UsageError, match="int8"):
        pack_rows(torch.zeros(2, 2), 4)
    with pytest.raises(UsageError, match="bytes"):
        unpack_rows(torch.zeros(2, 2, dtype=torch.uint8), 9, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"codes": torch.full((2, 3), 8, dtype=torch.int8)}, "beyond", id="range"),
        pytest.param({"codes": torch.zeros(2, 3)}, "int8", id="codes"),
        pytest.param({"exponents": torch.zeros(2, dtype=torch.uint8)}, "exponents", id="exponents"),
        pytest.param({"scale": torch.ones(2, dtype=torch.float64)}, "scale", id="scale"),
        pytest.param({"bits": 9}, "bits=9", id="bits"),
    ],
)
def test_a_weight_that_does_not_fit_together(fields: dict[str, Tensor], message: str) -> None:
    codes, exponents = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, dtype=torch.uint8)
    good = {"codes": codes, "exponents": exponents, "scale": torch.ones(2), "bits": 4}
    assert QuantizedWeight(**good).groups == 1  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        QuantizedWeight(**(good | fields))  # type: ignore[arg-type]
