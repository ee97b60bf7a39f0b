"""`ShiftQuantEmbedding`: rows of a table of codes as floats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, Op, number
from normfuse.export.ops.weights import bit_rows

__all__ = ["SHIFTQUANT_EMBEDDING"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = scale[i] · C[i];   a row is a little-endian string of dim · bits bits, a code stored as C + 2^(bits−1)"""
    indices, codes, scale = inputs
    dim, bits = facts["dim"], facts["bits"]
    row = at.op("Gather", codes, indices, axis=0)
    c = at.op("Cast", bit_rows(at, row, codes, number(at, dim), bits), to=1)
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
