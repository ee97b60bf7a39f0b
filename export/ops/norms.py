"""`NormQuantize`, `RmsNorm`, `CrmsNorm`, `L1Norm`: normalizations over the last axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.activations import dynamic_codes, signed
from normfuse.export.ops.emitter import Emitter, Op

__all__ = ["CRMS_NORM", "L1_NORM", "NORM_QUANTIZE", "RMS_NORM"]


def _normalized(at: Emitter, x: Any, kind: str, facts: Mapping[str, Any]) -> Any:
    """The norm without gain and shift."""
    last = at.const(np.array([-1], np.int64))
    if kind in ("layer", "l1"):
        x = at.op("Sub", x, at.op("ReduceMean", x, last, keepdims=1))
    if kind == "l1":
        spread = at.op("ReduceMean", at.op("Abs", x), last, keepdims=1)
        spread = at.op("Mul", spread, at.op("CastLike", facts["scale_const"], x))
        return at.op("Div", x, _plus_eps(at, spread, facts))
    square = at.op("Mul", x, x)
    if kind == "crms":  # d + 1 features, of which the last is minus the sum of the others
        total = at.op("ReduceSum", x, last, keepdims=1)
        size = at.op("CastLike", at.op("Shape", x, start=-1), x)
        square = at.op("Add", at.op("ReduceSum", square, last, keepdims=1), at.op("Mul", total, total))
        square = at.op("Div", square, at.op("Add", size, at.op("CastLike", at.const(np.float32(1)), x)))
    else:
        square = at.op("ReduceMean", square, last, keepdims=1)
    return at.op("Div", x, at.op("Sqrt", _plus_eps(at, square, facts)))


def _plus_eps(at: Emitter, x: Any, facts: Mapping[str, Any]) -> Any:
    return x if facts["eps"] is None else at.op("Add", x, at.op("CastLike", facts["eps"], x))


def _affine(at: Emitter, y: Any, gain: Any, shift: Any) -> Any:
    y = y if gain is None else at.op("Mul", y, gain)
    return y if shift is None else at.op("Add", y, shift)


def _norm_quantize(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """sum = x + residual;   q, scale = QuantizeRows(norm(sum) · gain + shift)"""
    x, gain, shift, residual = inputs
    total = at.op("Identity", x) if residual is None else at.op("Add", x, residual)
    codes, scale = dynamic_codes(at, _affine(at, _normalized(at, total, facts["kind"], facts), gain, shift), facts["bits"])
    return signed(at, codes), scale, total


def _norm(kind: str) -> Callable[[Emitter, tuple[Any, ...], Mapping[str, Any]], tuple[Any, Any]]:
    def expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any, Any]:
        """sum = x + residual;   y = norm(sum) · gain + shift"""
        x, gain, *rest, residual = inputs
        total = at.op("Identity", x) if residual is None else at.op("Add", x, residual)
        return _affine(at, _normalized(at, total, kind, facts), gain, rest[0] if rest else None), total

    return expand


_SCALED, _SHIFTED = ("x", "gain?", "residual?"), ("x", "gain?", "shift?", "residual?")
_FLOATS = {"eps": "FLOAT", "scale_const": "FLOAT"}
NORM_QUANTIZE = Op(
    "NormQuantize",
    ("norm_quantize",),
    _SHIFTED,
    ("q", "scale", "sum?"),
    {"kind": "STRING", "bits": "INT", **_FLOATS},
    _norm_quantize,
    words=lambda facts: (facts["kind"],),
    told=("kind",),
)
RMS_NORM = Op("RmsNorm", ("rms_norm", "add_rms_norm"), _SCALED, ("y", "sum?"), {"eps": "FLOAT"}, _norm("rms"))
CRMS_NORM = Op("CrmsNorm", ("crms_norm", "add_crms_norm"), _SCALED, ("y", "sum?"), {"eps": "FLOAT"}, _norm("crms"))
L1_NORM = Op("L1Norm", ("l1_norm",), _SHIFTED, ("y", "sum?"), _FLOATS, _norm("l1"))
