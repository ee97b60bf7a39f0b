"""`torch.ops.normfuse.quantize_rows`: floats to integers, one scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.gpu.rows import plan_rows
from normfuse.gpu.run import NAMES, run
from normfuse.ops._shapes import check_bits, float_dtype
from normfuse.ops.operator import Operator
from normfuse.quant import integers

__all__ = ["QUANTIZE_ROWS", "quantize_rows"]

_OP = "quantize_rows"


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """q = clamp(rne(x · (qmax / a)), ±qmax),   scale = a / qmax,   a = max|x| over the last axis.

    Decided in float32 whatever the dtype of x. A row of zeros has scale 1 and codes 0; a row that holds NaN or
    Inf has scale NaN and codes 0.

    Args:
        x: [..., K].
        bits: of a code, 2 to 8.

    Returns:
        q, int8 [..., K], and scale [..., 1], float32 (float64 for float64: the same numbers, so that what follows is computed
        in float64).

    Raises:
        UsageError: x has no last axis of at least one feature, or bits are out of range.
    """
    dtype = _check(x, bits)
    q, scale = integers.quantize_rows(x, bits)
    return q.contiguous(), scale.to(dtype).contiguous()


def _check(x: Tensor, bits: int) -> torch.dtype:
    if not x.ndim or not x.shape[-1]:
        raise UsageError(f"{_OP}: x {tuple(x.shape)}; expected at least one value a row")
    check_bits(_OP, bits)
    return float_dtype(_OP, x)


def _shapes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=float_dtype(_OP, x))


def _cpu(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    x = x.float().contiguous()
    k = x.shape[-1]
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1))
    native.call("nf_quantize_rows", x, x.numel() // k, k, bits, q, scale)
    return q, scale


def _gpu(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    q, scale = run(plan_rows(x.shape[-1], NAMES[x.dtype], bits, static=None), {"x": x.contiguous()})
    return q, scale


QUANTIZE_ROWS = Operator(
    quantize_rows,
    shapes=_shapes,
    check=_check,
    cpu=_cpu,
    gpu=_gpu,
    functions=(
        native.Function("nf_quantize_rows", native.F32, native.LONG, native.LONG, native.INT, native.I8, native.F32),
        native.Function("nf_quantize_static", native.F32, native.LONG, native.FLOAT, native.INT, native.I8),
    ),
)
