"""`ShiftQuantEmbedding`: rows of a table of codes as floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, Op, number

__all__ = ["SHIFTQUANT_EMBEDDING"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = scale[i] · C[i];   a row is a little-endian string of dim · bits bits, a code stored as C + 2^(bits−1)"""
    indices, codes, scale = inputs
    dim, bits = facts["dim"], facts["bits"]
    row = at.op("Gather", codes, indices, axis=0)
    if bits == 8:
        u = row
    else:
        zero, one, eight = (at.const(np.int64(i)) for i in (0, 1, 8))
        places = at.op("Mul", at.op("Range", zero, number(at, dim), one), at.const(np.int64(bits)))
        first = at.op("Div", places, eight)
        last = at.op("Sub", at.op("Shape", codes, start=1), one)  # [1]
        second = at.op("Min", at.op("Add", first, one), last)
        low, high = (at.op("Cast", at.op("Gather", row, byte, axis=-1), to=12) for byte in (first, second))
        both = at.op("BitwiseOr", low, at.op("BitShift", high, at.const(np.uint32(8)), direction="LEFT"))
        u = at.op("BitShift", both, at.op("Cast", at.op("Mod", places, eight), to=12), direction="RIGHT")
        u = at.op("BitwiseAnd", u, at.const(np.uint32(2**bits - 1)))
    c = at.op("Sub", at.op("Cast", u, to=1), at.const(np.float32(2 ** (bits - 1))))
    factor = at.op("Unsqueeze", at.op("Gather", scale, indices, axis=0), at.const(np.array([-1], np.int64)))
    return (at.op("Mul", c, factor),)


SHIFTQUANT_EMBEDDING = Op(
    "ShiftQuantEmbedding",
    ("shiftquant_embedding",),
    ("indices", "codes", "scale"),
    ("y",),
    {"dim": "INT", "bits": "INT"},
    _expand,
    words=lambda facts: (f"b{facts['bits']}",),
    told=("bits",),
)
