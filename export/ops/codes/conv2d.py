"""`CodesConv2d`: a convolution from codes to codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from normfuse.export.ops.activations import ZERO
from normfuse.export.ops.codes._numbers import FIRST, LAST, as_type, coded, decimal
from normfuse.export.ops.emitter import Emitter, Op, number
from normfuse.export.ops.weights import bit_rows
from normfuse.ops.codes._codes import SILU
from normfuse.quant.packing import unpack_rows

__all__ = ["CODES_CONV2D"]

_FACTORS = 2 ** np.arange(8, dtype=np.int32)


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = T(clamp(rne(float(Σ (x − zero) · (C << shift)) · scale + bias + float(residual) · residual_scale), low, high))"""
    x, weight, shifts, scale, bias, residual, table = inputs
    stored, shifted = at.known(weight), at.known(shifts)
    in_nodes = stored is None or shifted is None
    operand = _operand(at, weight, shifts, facts) if in_nodes else at.const(_known(stored, shifted, facts))
    codes, channels = at.op("Transpose", x, perm=FIRST), at.const(np.array([-1, 1, 1], np.int64))
    names = ("strides", "pads", "dilations", "group")
    # uint8 on both sides: see ShiftQuantConv2d
    acc = at.op("ConvInteger", codes, operand, as_type(at, facts["zero"], 2), at.const(ZERO), **{k: facts[k] for k in names})
    y = at.op("Mul", at.op("Cast", acc, to=1), at.op("Reshape", scale, channels))
    y = at.op("Add", y, at.op("Reshape", bias, channels))
    if residual is not None:
        more = at.op("Cast", at.op("Transpose", residual, perm=FIRST), to=1)
        y = at.op("Add", y, at.op("Mul", more, decimal(at, facts["residual_scale"])))
    if facts["function"] != "none":
        y = _behind(at, y, facts)
    y = coded(at, y, facts["low"], facts["high"])
    if table is not None:
        y = at.op("Gather", table, at.op("Cast", y, to=6), axis=0)
    return (at.op("Transpose", y, perm=LAST),)


def _behind(at: Emitter, y: Any, facts: Mapping[str, Any]) -> Any:
    """`normfuse.ops.codes._codes.behind`, operation by operation."""
    gain, offset, half = decimal(at, facts["gain"]), decimal(at, facts["offset"]), at.const(np.float32(0.5))
    if facts["function"] == "hardswish":
        bounds = at.const(np.float32(0)), at.const(np.float32(1))
        gate = at.op("Clip", at.op("Add", at.op("Mul", y, at.const(np.float32(0.16666667))), half), *bounds)
        return at.op("Add", at.op("Mul", at.op("Mul", y, gate), gain), offset)
    a = at.op("Abs", y)
    steps = at.op("Sub", at.op("Mul", a, at.const(np.float32(1.6))), half)
    i = at.op("Cast", at.op("Round", at.op("Min", steps, at.const(np.float32(15)))), to=6)
    c0, c1, c2 = (at.op("Mul", at.const(np.array(c, np.float32)), gain) for c in SILU)
    even = at.op("Add", at.op("Mul", at.op("Gather", c2, i, axis=0), a), at.op("Gather", c1, i, axis=0))
    even = at.op("Add", at.op("Mul", even, a), at.op("Gather", at.op("Add", c0, offset), i, axis=0))
    return at.op("Add", at.op("Mul", y, at.op("Mul", gain, half)), even)


def _known(weight: Any, shifts: Any, facts: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """(C << shift) + 128 as uint8 [O, channels of a group, kh, kw]."""
    group, kernel = facts["group"], facts["kernel"]
    channels = shifts.size // group
    codes = unpack_rows(torch.tensor(weight), kernel[0] * kernel[1] * channels, facts["bits"]).numpy().astype(np.int32)
    w = codes.reshape(group, -1, kernel[0] * kernel[1], channels) << shifts.astype(np.int32).reshape(group, 1, 1, channels)
    found: np.ndarray[Any, Any] = (w.reshape(-1, *kernel, channels).transpose(0, 3, 1, 2) + int(ZERO)).astype(np.uint8)
    return found


def _operand(at: Emitter, weight: Any, shifts: Any, facts: Mapping[str, Any]) -> Any:
    """The same in nodes."""
    kernel, group, minus = number(at, facts["kernel"]), number(at, facts["group"]), at.const(np.array([-1], np.int64))
    one, rows = at.const(np.array([1], np.int64)), at.op("Shape", weight, start=0, end=1)
    group = at.op("Reshape", group, one)
    channels = at.op("Div", at.op("Shape", shifts), group)  # [1]
    taps = at.op("ReduceProd", kernel, keepdims=1)
    dim = at.op("Squeeze", at.op("Mul", taps, channels))
    codes = at.op("Cast", bit_rows(at, weight, weight, dim, facts["bits"]), to=6)
    codes = at.op("Reshape", codes, at.op("Concat", group, minus, taps, channels, axis=0))
    factors = at.op("Gather", at.const(_FACTORS), at.op("Cast", shifts, to=6), axis=0)
    w = at.op("Mul", codes, at.op("Reshape", factors, at.op("Concat", group, one, one, channels, axis=0)))
    w = at.op("Reshape", w, at.op("Concat", rows, kernel, channels, axis=0))
    return at.op("Cast", at.op("Add", at.op("Transpose", w, perm=[0, 3, 1, 2]), at.const(np.int32(ZERO))), to=2)


CODES_CONV2D = Op(
    "CodesConv2d",
    ("codes_conv2d",),
    ("x", "weight", "shifts", "scale", "bias", "residual?", "table?"),
    ("y",),
    {
        "bits": "INT",
        "kernel": "INTS",
        "strides": "INTS",
        "pads": "INTS",
        "dilations": "INTS",
        "group": "INT",
        "zero": "INT",
        "low": "INT",
        "high": "INT",
        "residual_scale": "FLOAT",
        "function": "STRING",
        "gain": "FLOAT",
        "offset": "FLOAT",
    },
    _expand,
    facts={
        "strides": lambda call: call.attributes["stride"],
        "pads": lambda call: call.attributes["padding"],
        "dilations": lambda call: call.attributes["dilation"],
        "group": lambda call: call.attributes["groups"],
    },
    words=lambda facts: (f"b{facts['bits']}", "" if facts["function"] == "none" else facts["function"]),
    told=("bits", "function"),
)
