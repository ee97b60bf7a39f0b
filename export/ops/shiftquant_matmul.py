"""`ShiftQuantMatMul`, `ShiftQuantMatMulQuantize`: products of activations that are codes already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normfuse.export.ops.activations import dynamic_codes, signed, unsigned
from normfuse.export.ops.emitter import Emitter, Op
from normfuse.export.ops.products import finished, named, outer, sums
from normfuse.export.ops.weights import GROUPS_AND_BLOCKS, Packed, operands, weight_words

__all__ = ["SHIFTQUANT_MATMUL", "SHIFTQUANT_MATMUL_QUANTIZE"]

_INPUTS = ("q", "row_scale", "weight", "exponents", "scale", "bias?", "residual?", "multipliers?")


def _product(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = act(s[m] · scale[n] · Σ_k q[m, k] · (C[n, k] << (E − e[k])) + bias[n]) + residual"""
    q, row_scale, weight, exponents, scale, bias, *residual, multipliers = inputs
    found = operands(at, Packed(weight, exponents, scale, multipliers), facts)
    acc = sums(at, unsigned(at, q), found)
    one = row_scale.shape is not None and not len(row_scale.shape)
    factor = at.op("Mul", row_scale, scale) if one else outer(at, row_scale, scale)
    return (finished(at, acc, factor, bias, facts["epilogue"], *residual),)


def _product_codes(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any, Any]:
    """The same, quantized again by rows."""
    codes, scale = dynamic_codes(at, _product(at, inputs, facts)[0], facts["out_bits"])
    return signed(at, codes), scale


def _words(facts: Mapping[str, Any]) -> tuple[str, ...]:
    return (*weight_words(facts), named(facts["epilogue"]))


SHIFTQUANT_MATMUL = Op(
    "ShiftQuantMatMul",
    ("shiftquant_matmul",),
    _INPUTS,
    ("y",),
    {"bits": "INT", "epilogue": "STRING"},
    _product,
    structure=GROUPS_AND_BLOCKS,
    words=_words,
    told=("bits", "epilogue"),
)
SHIFTQUANT_MATMUL_QUANTIZE = Op(
    "ShiftQuantMatMulQuantize",
    ("shiftquant_matmul_quantize",),
    tuple(name for name in _INPUTS if name != "residual?"),
    ("q", "row_scale"),
    {"bits": "INT", "epilogue": "STRING", "out_bits": "INT"},
    _product_codes,
    structure=GROUPS_AND_BLOCKS,
    words=_words,
    told=("bits", "epilogue"),
)
