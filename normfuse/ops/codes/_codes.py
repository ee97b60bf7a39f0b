"""What all operators on codes have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.errors import UsageError

__all__ = ["SILU", "behind", "check_codes", "check_range", "check_window", "coded", "single", "window"]


def coded(value: Tensor, low: int, high: int) -> Tensor:
    """clamp(rne(value), low, high) as uint8; NaN counts as a million."""
    return value.nan_to_num(nan=1e6).round().clamp(low, high).to(torch.uint8)


#: Of |v| (σ(|v|) − 1/2), c0 + c1 |v| + c2 |v|² in each stretch of 1 / 1.6, the last of which never ends; within 0.0004.
SILU = (
    (
        -0.00014257902512326837, -0.033098332583904266, -0.17242813110351562, -0.3729270398616791, -0.5233765840530396,
        -0.5733018517494202, -0.5388281345367432, -0.45812684297561646, -0.3634868562221527, -0.27430805563926697,
        -0.19931159913539886, -0.1405748873949051, -0.09678906202316284, -0.06532367318868637, -0.043348778039216995,
        -0.00039999998989515007,
    ),
    (
        0.003957410342991352, 0.10333067178726196, 0.3266145586967468, 0.5432249307632446, 0.6657127141952515,
        0.6986931562423706, 0.680647075176239, 0.643791913986206, 0.6058743000030518, 0.5740906596183777,
        0.5500292778015137, 0.5328972935676575, 0.5211910605430603, 0.5134265422821045, 0.5083917379379272, 0.5,
    ),
    (
        0.23678146302700043, 0.1606065183877945, 0.07068879902362823, 0.01205824501812458, -0.012898020446300507,
        -0.018344232812523842, -0.0159821268171072, -0.01177254319190979, -0.007973396219313145, -0.005140732973814011,
        -0.0032104142010211945, -0.0019609699957072735, -0.0011784379603341222, -0.0006993768620304763,
        -0.00041096005588769913, 0.0,
    ),
)  # fmt: skip


def behind(name: str, v: Tensor, gain: float, offset: float) -> Tensor:
    """f(v) · gain + offset in float32, every operation rounded by itself: the kernels do the same ones.

    f is v · clamp(v / 6 + 1/2, 0, 1), or v · σ(v), which is v / 2 and an even function that polynomials stand for.
    """
    by, more = single(gain).to(v.device), single(offset).to(v.device)
    if name == "hardswish":
        return v * (v * single(0.16666667) + 0.5).clamp(0, 1) * by + more
    c0, c1, c2 = (torch.tensor(SILU, dtype=torch.float32, device=v.device) * by).unbind()
    a = v.abs()
    i = (a * single(1.6) - 0.5).clamp_max(15).round().long()
    return v * (by * 0.5) + ((c2[i] * a + c1[i]) * a + (c0 + more)[i])


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
