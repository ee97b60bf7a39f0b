"""Rows of a quantized table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.quant import ShiftQuant
from normfuse.quant.packing import pack_rows
from normfuse.quant.quantizer import quantize_weight
from tests.ops.quantized import random_weight

op = torch.ops.normfuse.shiftquant_embedding


@given(st.integers(1, 20), st.integers(1, 40), st.integers(2, 8), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 999))
def test_rows_are_those_of_the_table(rows: int, dim: int, bits: int, shape: list[int], seed: int) -> None:
    weight = random_weight(rows, dim, bits, 1, seed)
    indices = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(seed))
    found = op(indices, pack_rows(weight.codes, bits), weight.scale, dim, bits)
    assert torch.equal(found, (weight.codes.float() * weight.scale[:, None])[indices])
    assert torch.equal(op(indices.int(), pack_rows(weight.codes, bits), weight.scale, dim, bits), found)


def test_a_real_table() -> None:
    table = torch.randn(50, 33)
    spec = ShiftQuant()
    weight = quantize_weight(table, dataclasses.replace(spec, weight_bits=8, groups=1, exponents="range"))
    found = op(torch.arange(50), pack_rows(weight.codes, 8), weight.scale, 33, 8)
    assert float((found - table).abs().max()) <= float(weight.scale.max()) / 2 * 1.001


def test_dtype_is_that_of_the_scale() -> None:
    weight = random_weight(5, 6, 4, 1)
    codes, indices = pack_rows(weight.codes, 4), torch.tensor([[1, 4]])
    for dtype in (torch.float64, torch.bfloat16):
        assert op(indices, codes, weight.scale.to(dtype), 6, 4).dtype == dtype
    assert op(indices[:, :0], codes, weight.scale, 6, 4).shape == (1, 0, 6)


@pytest.mark.parametrize("index", [pytest.param(i, id=str(i)) for i in (-1, 5)])
def test_an_index_that_is_no_row(index: int) -> None:
    weight = random_weight(5, 6, 4, 1)
    with pytest.raises(IndexError):
        op(torch.tensor([0, index]), pack_rows(weight.codes, 4), weight.scale, 6, 4)


def test_arguments_that_do_not_belong_together() -> None:
    weight = random_weight(5, 6, 4, 1)
    codes, i = pack_rows(weight.codes, 4), torch.tensor([1])
    for arguments, message in (
        ((i.float(), codes, weight.scale, 6, 4), "indices"),
        ((i, codes, weight.scale, 8, 4), "3\\].*expected uint8|expected uint8 \\[rows, 4\\]"),
        ((i, codes.int(), weight.scale, 6, 4), "int32"),
        ((i, codes, weight.scale[1:], 6, 4), "one for each of 5"),
        ((i, codes, weight.scale, 6, 1), "1 bits"),
        ((i, codes, weight.scale, 0, 4), "dim=0"),
    ):
        with pytest.raises(UsageError, match=message):
            op(*arguments)
