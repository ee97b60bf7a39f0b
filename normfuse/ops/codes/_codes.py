"""What all operators on codes have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.errors import UsageError

__all__ = ["check_codes", "check_range", "check_window", "coded", "function_of", "single", "window"]


def coded(value: Tensor, low: int, high: int) -> Tensor:
    """clamp(rne(value), low, high) as uint8; NaN counts as a million."""
    return value.nan_to_num(nan=1e6).round().clamp(low, high).to(torch.uint8)


def function_of(name: str, v: Tensor) -> Tensor:
    """v · clamp(v / 6 + 1/2, 0, 1), or v · σ(v), in float32, every operation rounded by itself: the kernels do the same ones."""
    if name == "hardswish":
        return v * (v * single(0.16666667) + 0.5).clamp(0, 1)
    a = (-v).clamp(-87, 87)
    n = (a * single(1.44269504)).round()
    r = a - n * single(0.693359375) + n * single(2.12194440e-4)
    p = torch.full_like(r, 0.001381446490995586)
    for c in (0.008368780836462975, 0.04166839271783829, 0.1666651964187622, 0.4999999403953552):
        p = p * r + single(c)
    p = p * r * r + r + 1.0
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)  # 2^n
    return v * (1.0 / (p * power + 1.0))


def single(value: float) -> Tensor:
    """A number, rounded to float32."""
    return torch.tensor(value, dtype=torch.float32)


def check_codes(op: str, x: Tensor, name: str = "x") -> None:
    """uint8 [batch, height, width, channels].

    Raises:
        UsageError: it is not.
    """
    if x.dtype is not torch.uint8 or x.ndim != 4:
        raise UsageError(f"{op}: {name} {tuple(x.shape)} of {x.dtype}; expected uint8 [batch, height, width, channels]")


def check_range(op: str, low: int, high: int, *zeros: int) -> None:
    """Bounds of codes, and zero points."""
    if not 0 <= low <= high <= 255:
        raise UsageError(f"{op}: low={low}, high={high}; expected 0 <= low <= high <= 255")
    for zero in zeros:
        if not 0 <= zero <= 255:
            raise UsageError(f"{op}: a zero point of {zero}; expected 0 to 255")


def check_window(op: str, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """(height, width), and (top, left, bottom, right)."""
    for name, value, count, least in (
        ("kernel", kernel, 2, 1), ("stride", stride, 2, 1), ("padding", padding, 4, 0), ("dilation", dilation, 2, 1),
    ):  # fmt: skip
        if len(value) != count or min(value) < least:
            raise UsageError(f"{op}: {name}={list(value)}; expected {count} integers of at least {least}")


def window(
    op: str, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the output of a convolution or pool.

    Raises:
        UsageError: the kernel is larger than the padded image.
    """
    sizes = []
    for axis in range(2):
        room = x.shape[1 + axis] + padding[axis] + padding[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1
        if isinstance(room, int) and room < 0:
            raise UsageError(f"{op}: kernel {list(kernel)} does not fit into x {tuple(x.shape)} with padding {list(padding)}")
        sizes.append(room // stride[axis] + 1)
    return sizes[0], sizes[1]
