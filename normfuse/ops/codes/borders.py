"""`torch.ops.normfuse.quantize_codes` and `dequantize_codes`: where a chain of codes begins and ends."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops.codes._codes import check_codes, check_range, single
from normfuse.ops.operator import Operator

__all__ = ["DEQUANTIZE_CODES", "QUANTIZE_CODES", "dequantize_codes", "quantize_codes"]


def quantize_codes(x: Tensor, scale: float, zero: int, top: int) -> Tensor:
    """u[b, y, x, c] = clamp(rne(x[b, c, y, x] / scale) + zero, 0, top), in float32. NaN counts as 0.

    Args:
        x: [B, C, H, W], any float dtype.
        scale: positive.
        zero: the code of 0.
        top: the largest code.

    Returns:
        uint8 [B, H, W, C].

    Raises:
        UsageError: x is no image of floats, or a number is out of range.
    """
    _check_in(x, scale, zero, top)
    steps = (x.float() / single(scale).to(x.device)).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    codes = steps.round().clamp(-zero, top - zero) + zero
    return codes.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _check_in(x: Tensor, scale: float, zero: int, top: int) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise UsageError(f"quantize_codes: x {tuple(x.shape)} of {x.dtype}; expected floats [batch, channels, height, width]")
    _check_scale("quantize_codes", scale)
    check_range("quantize_codes", 0, top, zero)
    if zero > top:
        raise UsageError(f"quantize_codes: zero={zero} above top={top}")


def _check_scale(op: str, scale: float) -> None:
    if not 0 < scale < math.inf:
        raise UsageError(f"{op}: scale={scale}; expected a positive number")


def _quantized(x: Tensor, scale: float, zero: int, top: int) -> Tensor:
    b, c, h, w = x.shape
    return x.new_empty((b, h, w, c), dtype=torch.uint8)


def _cpu_in(x: Tensor, scale: float, zero: int, top: int) -> Any:
    b, c, h, w = x.shape
    y = torch.empty((b, h, w, c), dtype=torch.uint8)
    if y.numel():
        native.call("nf_codes_quantize", x.float().contiguous(), b, c, h * w, float(scale), zero, top, y)
    return y


def dequantize_codes(x: Tensor, scale: float, zero: int) -> Tensor:
    """y[b, c, y, x] = float(u[b, y, x, c] − zero) · scale, in float32.

    Args:
        x: uint8 [B, H, W, C].
        scale: of a code.
        zero: the code of 0.

    Returns:
        float32 [B, C, H, W].

    Raises:
        UsageError: x holds no codes, or a number is out of range.
    """
    _check_out(x, scale, zero)
    return ((x.to(torch.int32) - zero).float() * single(scale).to(x.device)).permute(0, 3, 1, 2).contiguous()


def _check_out(x: Tensor, scale: float, zero: int) -> None:
    check_codes("dequantize_codes", x)
    _check_scale("dequantize_codes", scale)
    check_range("dequantize_codes", 0, 255, zero)


def _dequantized(x: Tensor, scale: float, zero: int) -> Tensor:
    b, h, w, c = x.shape
    return x.new_empty((b, c, h, w), dtype=torch.float32)


def _cpu_out(x: Tensor, scale: float, zero: int) -> Any:
    b, h, w, c = x.shape
    y = torch.empty((b, c, h, w), dtype=torch.float32)
    if y.numel():
        native.call("nf_codes_dequantize", x.contiguous(), b, c, h * w, float(scale), zero, y)
    return y


QUANTIZE_CODES = Operator(
    quantize_codes,
    shapes=_quantized,
    check=_check_in,
    cpu=_cpu_in,
    functions=(
        native.Function(
            "nf_codes_quantize", native.F32, native.LONG, native.LONG, native.LONG, native.FLOAT, native.INT, native.INT, native.U8
        ),
    ),
)
DEQUANTIZE_CODES = Operator(
    dequantize_codes,
    shapes=_dequantized,
    check=_check_out,
    cpu=_cpu_out,
    functions=(
        native.Function(
            "nf_codes_dequantize", native.U8, native.LONG, native.LONG, native.LONG, native.FLOAT, native.INT, native.F32
        ),
    ),
)
