"""`torch.ops.normfuse.codes_max_pool2d` and `codes_mean`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops.codes._codes import check_codes, check_range, check_window, single, window
from normfuse.ops.operator import Operator

__all__ = ["CODES_MAX_POOL2D", "CODES_MEAN", "codes_max_pool2d", "codes_mean"]

_OP = "codes_max_pool2d"


def codes_max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The largest code of each window; what lies in the padding does not count.

    Args:
        x: uint8 [B, H, W, C].
        kernel, stride: (height, width).
        padding: (top, left, bottom, right), each less than the kernel.

    Returns:
        uint8 [B, H', W', C].

    Raises:
        UsageError: arguments do not belong together.
    """
    h, w = _check_pool(x, kernel, stride, padding)
    top, left, bottom, right = padding
    image = F.pad(x.permute(0, 3, 1, 2).float(), (left, right, top, bottom), value=-1.0)
    y = F.max_pool2d(image, tuple(kernel), tuple(stride)) if x.numel() else image.new_empty((*image.shape[:2], h, w))
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _check_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int]:
    check_codes(_OP, x)
    check_window(_OP, kernel, stride, padding, (1, 1))
    if any(p >= kernel[i % 2] for i, p in enumerate(padding)):
        raise UsageError(f"{_OP}: padding={list(padding)}; expected less than the kernel {list(kernel)}")
    return window(_OP, x, kernel, stride, padding, (1, 1))


def _pooled(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    h, w = _check_pool(x, kernel, stride, padding)
    return x.new_empty((x.shape[0], h, w, x.shape[3]))


def _cpu_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Any:
    y = _pooled(x, kernel, stride, padding)
    b, h, w, c = x.shape
    if y.numel():
        shape = native.CodesConv(
            b, c, h, w, c, *kernel, tuple(stride), tuple(padding[:2]), tuple(padding[2:]), (1, 1), 1, 0, 0, 255, 0.0, 0, 1.0, 0.0
        )
        native.call("nf_codes_max_pool", shape, x.contiguous(), y)
    return y


def codes_mean(x: Tensor, scale: float, zero: int) -> Tensor:
    """y[b, c] = float(Σ_p (u[b, p, c] − zero)) · (scale / float(pixels)): the mean over the pixels of an image, as a float.

    Args:
        x: uint8 [B, H, W, C].
        scale: of a code.
        zero: the code of 0.

    Returns:
        float32 [B, C, 1, 1].

    Raises:
        UsageError: x holds no codes, or a number is out of range.
    """
    _check_mean(x, scale, zero)
    pixels = x.shape[1] * x.shape[2]
    sums = (x.to(torch.int32) - zero).sum((1, 2), dtype=torch.int64).float()
    factor = single(scale) / single(float(pixels))
    return (sums * factor.to(x.device))[:, :, None, None]


def _check_mean(x: Tensor, scale: float, zero: int) -> None:
    check_codes("codes_mean", x)
    check_range("codes_mean", 0, 255, zero)
    if not 0 < scale < math.inf:
        raise UsageError(f"codes_mean: scale={scale}; expected a positive number")
    pixels = x.shape[1] * x.shape[2]
    if isinstance(pixels, int) and not 0 < pixels <= (2**31 - 1) // 255:
        raise UsageError(f"codes_mean: {pixels} pixels; expected 1 to {(2**31 - 1) // 255}, whose sums fit into 32 bits")


def _cpu_mean(x: Tensor, scale: float, zero: int) -> Any:
    b, h, w, c = x.shape
    y = torch.empty((b, c, 1, 1), dtype=torch.float32)
    if y.numel():
        native.call("nf_codes_mean", x.contiguous(), b, c, h * w, float(scale), zero, y)
    return y


CODES_MAX_POOL2D = Operator(
    codes_max_pool2d,
    shapes=_pooled,
    check=_check_pool,
    cpu=_cpu_pool,
    functions=(native.Function("nf_codes_max_pool", native.CODES_CONV, native.U8, native.U8),),
)
CODES_MEAN = Operator(
    codes_mean,
    shapes=lambda x, scale, zero: x.new_empty((x.shape[0], x.shape[3], 1, 1), dtype=torch.float32),
    check=_check_mean,
    cpu=_cpu_mean,
    functions=(
        native.Function("nf_codes_mean", native.U8, native.LONG, native.LONG, native.LONG, native.FLOAT, native.INT, native.F32),
    ),
)
