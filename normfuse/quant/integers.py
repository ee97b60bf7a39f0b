"""Integer arithmetic in plain PyTorch: what every other implementation of it must give, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import NormfuseError, UsageError

__all__ = ["integer_matmul", "quantize_rows", "quantize_static", "top_code"]


def top_code(bits: int) -> int:
    """2^(bits−1) − 1, the largest code of symmetric integers of 2 to 8 bits."""
    if not 2 <= bits <= 8:
        raise UsageError(f"{bits} bits: expected 2 to 8")
    return int(2 ** (bits - 1) - 1)


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """q = clamp(rne(x · (qmax / a)), ±qmax),   scale = a / qmax,   a = max|x| over the last axis,   in float32.

    A row of zeros has scale 1 and codes 0. A row that holds NaN or Inf has scale NaN and codes 0, so that all that is computed
    from it is NaN. Where a is so small that qmax / a overflows (below about 127 · 2^-128), every value counts as ±a or 0.

    Args:
        x: [..., K] of any float dtype; the decision is made on its float32 value.
        bits: of a code, 2 to 8.

    Returns:
        int8 [..., K] and float32 [..., 1].
    """
    top = top_code(bits)
    x = x.float()
    if not x.shape[-1]:
        raise UsageError(f"quantize_rows: x {tuple(x.shape)}; expected at least one value a row")
    largest = x.abs().amax(-1, keepdim=True)  # NaN if the row has one
    # of a number PyTorch makes top / a into top · (1 / a), and on CUDA a / top into a · (1 / top): rounded twice
    tops = torch.full_like(largest, top)
    inverse = tops / largest
    # NaN, whose code is 0, comes from 0 · Inf (a row of zeros), from Inf · 0 (a row with Inf) and from NaN
    codes = _coded(x * inverse, top).to(torch.int8)
    return codes, torch.where(largest.isfinite(), torch.where(largest > 0, largest / tops, 1.0), torch.nan)


def quantize_static(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """q = clamp(rne(x / scale), ±qmax) in float32: QuantizeLinear with zero point 0. NaN gives code 0, ±Inf gives ±qmax.

    Args:
        x: of any shape and float dtype.
        scale: one positive number.
        bits: of a code, 2 to 8.

    Returns:
        int8, of the shape of x.
    """
    scale = scale.float() if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float32, device=x.device)
    return _coded(x.float() / scale, top_code(bits)).to(torch.int8)


def integer_matmul(q: Tensor, operand: Tensor) -> Tensor:
    """acc[..., n] = Σ_k q[..., k] · operand[n, k], exactly.

    Computed in floating point: as long as every partial sum is below 2^53 (2^24 for float32), a sum of integers has no
    rounding in any order.

    Args:
        q: int8 [..., K].
        operand: int32 [N, K].

    Returns:
        int32 [..., N].

    Raises:
        NormfuseError: a sum does not fit in 32 bits.
    """
    if q.shape[-1] != operand.shape[-1]:
        raise UsageError(f"integer_matmul: q {tuple(q.shape)} and operand {tuple(operand.shape)} differ in K")
    if not q.numel() or not operand.numel():
        return q.new_zeros((*q.shape[:-1], operand.shape[0]), dtype=torch.int32)
    bound = 127 * float(operand.abs().amax()) * q.shape[-1]
    # other devices may multiply float32 with fewer bits than it has
    dtype = torch.float32 if bound < 2**24 and q.device.type == "cpu" else torch.float64
    acc = q.to(dtype) @ operand.to(dtype).T
    if bound >= 2**31 and float(acc.abs().amax()) >= 2**31:
        raise NormfuseError(
            f"integer_matmul: a sum over K={q.shape[-1]} needs more than 32 bits; expected weights that passed check_accumulator"
        )
    return acc.to(torch.int32)


def _coded(y: Tensor, top: int) -> Tensor:
    return torch.where(y.isnan(), 0.0, y.round().clamp(-top, top))
