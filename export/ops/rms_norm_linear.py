"""`RmsNormLinear`: a linear layer behind an RMSNorm, whose scale is applied to the product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, Op
from normfuse.export.ops.products import activated, named

__all__ = ["RMS_NORM_LINEAR"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = act((W x) / ρ + b),   ρ = √(mean x² + ε)"""
    x, weight, bias = inputs
    square = at.op("ReduceMean", at.op("Mul", x, x), at.const(np.array([-1], np.int64)), keepdims=1)
    if facts["eps"] is not None:
        square = at.op("Add", square, at.op("CastLike", facts["eps"], x))
    y = at.op("Div", at.op("MatMul", x, at.op("Transpose", weight, perm=[1, 0])), at.op("Sqrt", square))
    return (activated(at, y if bias is None else at.op("Add", y, at.op("CastLike", bias, x)), facts["epilogue"]),)


RMS_NORM_LINEAR = Op(
    "RmsNormLinear",
    ("rms_norm_linear",),
    ("x", "weight", "bias?"),
    ("y",),
    {"eps": "FLOAT", "epilogue": "STRING"},
    _expand,
    words=lambda facts: (named(facts["epilogue"]),),
    told=("epilogue",),
)
