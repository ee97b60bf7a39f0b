"""`ShiftQuantLinear`: floats in, an integer product, floats out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normfuse.export.ops.activations import dynamic_codes, static_codes
from normfuse.export.ops.emitter import Emitter, Op
from normfuse.export.ops.products import finished, named, outer, sums
from normfuse.export.ops.weights import GROUPS_AND_BLOCKS, Packed, operands, weight_words

__all__ = ["SHIFTQUANT_LINEAR"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = act(s[m] · scale[n] · Σ_k A[m, k] · (C[n, k] << (E − e[k])) + bias[n]) + residual, or with C · m for C << (E − e)"""
    x, weight, exponents, scale, bias, residual, multipliers = inputs
    static, double = facts["input_scale"], facts.get("double", False)
    found = operands(at, Packed(weight, exponents, scale, multipliers), facts)
    x = at.op("Cast", x, to=1) if double else x
    if static is None:
        codes, row_scale = dynamic_codes(at, x, facts["activation_bits"])
    else:
        codes, row_scale = static_codes(at, x, static, facts["activation_bits"]), static
    acc = sums(at, codes, found)
    row_scale, scale = (at.op("Cast", s, to=11) if double else s for s in (row_scale, scale))
    factor = outer(at, row_scale, scale) if static is None else at.op("Mul", row_scale, scale)
    return (finished(at, acc, factor, bias, facts["epilogue"], residual, double=double),)


SHIFTQUANT_LINEAR = Op(
    "ShiftQuantLinear",
    ("shiftquant_linear",),
    ("x", "weight", "exponents", "scale", "bias?", "residual?", "multipliers?"),
    ("y",),
    {"bits": "INT", "activation_bits": "INT", "epilogue": "STRING", "input_scale": "FLOAT"},
    _expand,
    structure=GROUPS_AND_BLOCKS,
    words=lambda facts: (*weight_words(facts), named(facts["epilogue"]), "static" if facts["input_scale"] else ""),
    told=("bits", "epilogue", "input_scale"),
)
