"""Floats to integer codes, in standard ops.

Codes are uint8 with zero point 128: the exact kernels of ONNX Runtime on x86 take unsigned activations (see `products`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, Reference

__all__ = ["ZERO", "dynamic_codes", "signed", "static_codes", "unsigned"]

#: Zero point of the codes.
ZERO = np.uint8(128)


#: Largest code by number of bits.
_TOPS = np.array([2 ** max(0, bits - 1) - 1 for bits in range(9)], np.float32)


def _top(at: Emitter, bits: Any) -> Any:
    """The largest code, float32."""
    if isinstance(bits, Reference):
        return at.op("Gather", at.const(_TOPS), bits, axis=0)
    return at.const(_TOPS[bits])


def dynamic_codes(at: Emitter, x: Any, bits: Any, axes: tuple[int, ...] = (-1,)) -> tuple[Any, Any]:
    """q = rne(x · (qmax / a)) + 128,   scale = a / qmax,   a = max|x| over `axes`

    A row so small that qmax / a is no finite number has scale 1 and codes 0; one with NaN or Inf has scale NaN, its codes mean
    nothing. The same roundings, one by one, as `normfuse.quant.integers.quantize_rows`.

    Args:
        x: float32.
        bits: of a code: a number, or an attribute.
        axes: what shares a scale.

    Returns:
        uint8 codes, and float32 scales that keep `axes` as 1.
    """
    over, top = at.const(np.array(axes, np.int64)), _top(at, bits)
    largest = at.op("ReduceMax", at.op("Abs", x), over, keepdims=1)
    inverse = at.op("Div", top, largest)
    tiny = at.op("IsInf", inverse)
    y = at.op("Mul", x, at.op("Where", tiny, at.const(np.float32(0)), inverse))
    # ReduceMax passes NaN over, a sum does not; of a row with Inf the inverse is 0, and 0 · Inf is NaN
    bad = at.op("IsNaN", at.op("ReduceSum", y, over, keepdims=1))
    scale = at.op("Where", tiny, at.const(np.float32(1)), at.op("Div", largest, top))
    scale = at.op("Where", bad, at.const(np.float32(np.nan)), scale)
    # |y| <= qmax up to rounding, so that it rounds, adds and casts in one op and never saturates
    return at.op("QuantizeLinear", y, at.const(np.float32(1)), at.const(ZERO)), scale


def static_codes(at: Emitter, x: Any, scale: Any, bits: Any) -> Any:
    """q = rne(clamp(x, ±qmax · scale) / scale) + 128 as uint8; NaN counts as 0, as in `normfuse.quant.integers.quantize_static`.

    The bound lies within half a code of qmax however it is rounded, so that it rounds to qmax, and nothing below it changes.
    """
    most = at.op("Mul", _top(at, bits), scale)
    # what QuantizeLinear and Clip make of NaN is up to the runtime
    x = at.op("Clip", at.op("Where", at.op("IsNaN", x), at.const(np.float32(0)), x), at.op("Neg", most), most)
    return at.op("QuantizeLinear", x, scale, at.const(ZERO))


def signed(at: Emitter, codes: Any) -> Any:
    """uint8 with zero point 128 as int8."""
    return at.op("Cast", at.op("Sub", at.op("Cast", codes, to=6), at.const(np.int32(ZERO))), to=3)


def unsigned(at: Emitter, codes: Any) -> Any:
    """int8 as uint8 with zero point 128."""
    return at.op("Cast", at.op("Add", at.op("Cast", codes, to=6), at.const(np.int32(ZERO))), to=2)
