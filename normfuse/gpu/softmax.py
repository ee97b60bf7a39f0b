"""Softmax over the last axis as a launch."""

from __future__ import annotations

import functools

from normfuse.gpu.launch import Launch, Operand, Result
from normfuse.gpu.tile import check_row, tile

__all__ = ["plan_softmax"]


@functools.lru_cache(maxsize=1024)
def plan_softmax(d: int, dtype: str) -> Launch:
    """y = exp(x) / Σ exp(x) over the last axis, in float32. A row of −Inf and a row that holds NaN or +Inf are NaN, as in PyTorch.

    A row of up to `tile.LONGEST` features is read once; a longer one twice: maximum and sum come from one pass.

    Args:
        d: features.
        dtype: of x and y: "fp16", "bf16" or "fp32".

    Returns:
        Input x; output y.

    Raises:
        UsageError: d or the dtype is not one of those.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
    """
    check_row("softmax kernel", d, dtype)
    shape = tile(d)
    return Launch(
        kernel="softmax.softmax_long" if shape.long else "softmax.softmax",
        inputs=(Operand("x", dtype),),
        outputs=(Result("y", dtype, d),),
        constants={"D": d, "BLOCK": shape.block} | ({} if shape.long else {"ROWS": shape.rows}),
        rows_each=shape.rows,
        warps=shape.warps,
    )
