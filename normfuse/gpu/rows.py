"""Quantization of rows as a launch."""

from __future__ import annotations

import functools
import math
import struct

from normfuse.errors import UsageError
from normfuse.gpu.launch import Launch, Operand, Result
from normfuse.gpu.tile import check_row, tile
from normfuse.quant.integers import top_code

__all__ = ["plan_rows"]


@functools.lru_cache(maxsize=1024)
def plan_rows(d: int, dtype: str, bits: int, *, static: float | None) -> Launch:
    """q = clamp(rne(x · (qmax / a)), ±qmax),   scale = a / qmax,   a = max|x| over the last axis, in float32.

    With a static scale q = clamp(rne(x / static), ±qmax). The same bits as `normfuse.quant.integers`, also where a row holds zeros
    only, NaN or Inf.

    Args:
        d: features.
        dtype: of x: "fp16", "bf16" or "fp32".
        bits: of a code, 2 to 8.
        static: the scale of every row, or None for one from the row itself.

    Returns:
        Input x; outputs q (int8) and scale (float32, one a row).

    Raises:
        UsageError: d, the dtype or the bits are not one of those, or the scale is no positive float32.
    """
    check_row("quantization kernel", d, dtype)
    top = top_code(bits)
    if static is not None:
        if not 0 < static < math.inf or not 0 < (rounded := _float32(static)) < math.inf:
            raise UsageError(f"quantization kernel: a static scale of {static}; expected a positive float32")
        static = rounded
    shape = tile(d)
    return Launch(
        kernel="rows.quantize_long" if shape.long else "rows.quantize",
        inputs=(Operand("x", dtype),),
        outputs=(Result("q", "i8", d), Result("scale", "fp32", 1)),
        constants={"D": d, "BLOCK": shape.block} | ({} if shape.long else {"ROWS": shape.rows}) | {"TOP": top, "STATIC": static},
        rows_each=shape.rows,
        warps=shape.warps,
    )


def _float32(value: float) -> float:
    """The float32 nearest to value, Inf where it is too large."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.inf
