"""`QuantizeCodes`, `DequantizeCodes`, and what stands between convolutions of codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.codes._numbers import FIRST, LAST, as_float, as_type, coded, decimal
from normfuse.export.ops.emitter import Emitter, Op, number

__all__ = [
    "CODES_ADD", "CODES_GATE", "CODES_MAX_POOL2D", "CODES_MEAN", "CODES_TAKE", "CODES_UPSAMPLE", "DEQUANTIZE_CODES",
    "QUANTIZE_CODES",
]  # fmt: skip


def _quantize(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """u = clamp(rne(x / scale) + zero, 0, top), channels last; NaN counts as 0"""
    (x,) = inputs
    x = at.op("Where", at.op("IsNaN", x), at.const(np.float32(0)), x)
    codes = at.op("QuantizeLinear", x, facts["scale"], as_type(at, facts["zero"], 2))
    codes = at.op("Clip", codes, at.const(np.uint8(0)), as_type(at, facts["top"], 2))
    return (at.op("Transpose", codes, perm=LAST),)


def _dequantize(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = float(u − zero) · scale, channels first"""
    codes = at.op("Transpose", inputs[0], perm=FIRST)
    return (at.op("DequantizeLinear", codes, facts["scale"], as_type(at, facts["zero"], 2)),)


def _add(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """clamp(rne(float(a) · a_scale + float(b) · b_scale + bias), low, high)"""
    a, b = (
        at.op("Mul", at.op("Cast", v, to=1), decimal(at, facts[k])) for v, k in zip(inputs, ("a_scale", "b_scale"), strict=True)
    )
    y = at.op("Add", at.op("Add", a, b), decimal(at, facts["bias"]))
    return (coded(at, y, facts["low"], facts["high"]),)


def _gate(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """clamp(rne(float(x − zero) · (gate · scale) + bias), low, high); NaN gives the largest code"""
    x, gate = inputs
    factor = at.op("Transpose", at.op("Mul", gate, decimal(at, facts["scale"])), perm=LAST)
    y = at.op("Add", at.op("Mul", as_float(at, x, facts["zero"]), factor), decimal(at, facts["bias"]))
    y = at.op("Where", at.op("IsNaN", y), at.const(np.float32(1e6)), y)
    return (coded(at, y, facts["low"], facts["high"]),)


def _max_pool(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """The largest code of each window."""
    x = at.op("Transpose", inputs[0], perm=FIRST)
    y = at.op("MaxPool", x, kernel_shape=facts["kernel"], strides=facts["strides"], pads=facts["pads"])
    return (at.op("Transpose", y, perm=LAST),)


def _mean(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = float(Σ_p (u − zero)) · (scale / float(pixels))"""
    (x,) = inputs
    values = at.op("Sub", at.op("Cast", x, to=6), as_type(at, facts["zero"], 6))
    sums = at.op("Cast", at.op("ReduceSum", values, at.const(np.array([1, 2], np.int64)), keepdims=1), to=1)
    pixels = at.op("ReduceProd", at.op("Shape", x, start=1, end=3), keepdims=0)
    factor = at.op("Div", facts["scale"], at.op("Cast", pixels, to=1))
    return (at.op("Transpose", at.op("Mul", sums, factor), perm=FIRST),)


def _take(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y[…, j · groups + i] = x[…, first + i · (count / groups) + j]"""
    one, first, count, groups = at.const(np.array([1], np.int64)), *(number(at, facts[k]) for k in ("first", "count", "groups"))
    first, groups = at.op("Reshape", first, one), at.op("Reshape", groups, one)
    last = at.op("Add", first, at.op("Reshape", count, one))
    taken = at.op("Slice", inputs[0], first, last, at.const(np.array([3], np.int64)))
    shape = at.op("Concat", at.op("Shape", taken, start=0, end=3), groups, at.const(np.array([-1], np.int64)), axis=0)
    dealt = at.op("Transpose", at.op("Reshape", taken, shape), perm=[0, 1, 2, 4, 3])
    return (at.op("Reshape", dealt, at.op("Shape", taken)),)


def _upsample(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y[b, i, j] = x[b, i // times[0], j // times[1]]"""
    x, one = inputs[0], at.const(np.array([1], np.int64))
    rows, columns, channels = (at.op("Shape", x, start=i, end=i + 1) for i in (1, 2, 3))
    batch, times = at.op("Shape", x, start=0, end=1), number(at, facts["times"])
    tall, wide = (at.op("Slice", times, at.const(np.array([i])), at.const(np.array([i + 1]))) for i in (0, 1))
    lone = at.op("Reshape", x, at.op("Concat", batch, rows, one, columns, one, channels, axis=0))
    copies = at.op("Expand", lone, at.op("Concat", batch, rows, tall, columns, wide, channels, axis=0))
    sizes = at.op("Mul", rows, tall), at.op("Mul", columns, wide)
    return (at.op("Reshape", copies, at.op("Concat", batch, *sizes, channels, axis=0)),)


_RANGE = {"low": "INT", "high": "INT"}

QUANTIZE_CODES = Op(
    "QuantizeCodes", ("quantize_codes",), ("x",), ("y",), {"scale": "FLOAT", "zero": "INT", "top": "INT"}, _quantize
)
DEQUANTIZE_CODES = Op("DequantizeCodes", ("dequantize_codes",), ("x",), ("y",), {"scale": "FLOAT", "zero": "INT"}, _dequantize)
CODES_ADD = Op(
    "CodesAdd", ("codes_add",), ("a", "b"), ("y",), {"a_scale": "FLOAT", "b_scale": "FLOAT", "bias": "FLOAT", **_RANGE}, _add
)
CODES_GATE = Op(
    "CodesGate", ("codes_gate",), ("x", "gate"), ("y",), {"scale": "FLOAT", "zero": "INT", "bias": "FLOAT", **_RANGE}, _gate
)
CODES_MAX_POOL2D = Op(
    "CodesMaxPool2d",
    ("codes_max_pool2d",),
    ("x",),
    ("y",),
    {"kernel": "INTS", "strides": "INTS", "pads": "INTS"},
    _max_pool,
    facts={"strides": lambda call: call.attributes["stride"], "pads": lambda call: call.attributes["padding"]},
)
CODES_MEAN = Op("CodesMean", ("codes_mean",), ("x",), ("y",), {"scale": "FLOAT", "zero": "INT"}, _mean)
CODES_TAKE = Op("CodesTake", ("codes_take",), ("x",), ("y",), {"first": "INT", "count": "INT", "groups": "INT"}, _take)
CODES_UPSAMPLE = Op("CodesUpsample", ("codes_upsample",), ("x",), ("y",), {"times": "INTS"}, _upsample)
