"""The quantizer of ShiftQuant for any tensor and axis (arXiv 2411.10948)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.integers import top_code

__all__ = ["Shifted", "range_exponents", "rounded", "shift_quantize"]


@dataclass(frozen=True, eq=False)
class Shifted:
    """X̂ = codes · scale · 2^(−e),   e constant over all axes but `dim`.

    Attributes:
        codes: int8, of the shape of X.
        exponents: e, uint8 [K].
        scale: S0, 0-d, in the dtype of X (float32 for half precision).
        dim: the axis of e.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    dim: int

    def dequantized(self) -> Tensor:
        """X̂, in the dtype of the scale."""
        e = _along(self.exponents, self.codes.ndim, self.dim)
        return torch.ldexp(self.codes.to(self.scale.dtype) * self.scale, -e.to(torch.int32))


def range_exponents(r: Tensor, groups: int) -> Tensor:
    """e = clamp(⌊log2(max r / r)⌋, 0, groups − 1), so that r · 2^e ≤ max r; groups − 1 where r is 0.

    Taken from the binary exponents of the numbers, so that no logarithm rounds.

    Args:
        r: the range of each channel, [K], not negative, finite.
        groups: how many exponents there may be.

    Returns:
        uint8 [K].
    """
    if not r.numel():
        return torch.zeros(0, dtype=torch.uint8, device=r.device)
    mantissa, power = torch.frexp(r)
    top_mantissa, top_power = torch.frexp(r.amax())
    e = top_power - power - (mantissa > top_mantissa).int()
    return torch.where(r == 0, groups - 1, e).clamp(0, groups - 1).to(torch.uint8)


def shift_quantize(
    x: Tensor, bits: int, groups: int = 4, dim: int = -1, rounding: str = "nearest", generator: torch.Generator | None = None
) -> Shifted:
    """X̂ = q · S0 · 2^(−e[k]),   q = clamp(round(X · 2^e / S0), ±qmax),   S0 = max|X| / qmax.

    e[k] = clamp(⌊log2(r0 / r[k])⌋, 0, groups − 1) with r[k] the largest |X| of channel k and r0 the largest of all: every
    channel but those of the last exponent uses at least half of the codes. Zeros give S0 = 1. If X holds NaN or Inf, S0 is NaN
    and the codes are 0, so that X̂ is NaN.

    Source: Ma et al., ShiftQuant and L1 normalization, arXiv 2411.10948.

    Args:
        x: of any shape; float64 is computed in float64, everything else in float32.
        bits: of a code, 2 to 8.
        groups: how many exponents there may be, 1 to 16; 1 is plain symmetric quantization.
        dim: the axis of the channels, which is the one that a product sums over.
        rounding: "nearest" (ties to even) or "stochastic" (⌊y + u⌋, u uniform in [0, 1): without bias, for gradients).
        generator: of the random numbers.

    Raises:
        UsageError: an argument is out of range.
    """
    top = top_code(bits)
    if not 1 <= groups <= 16:
        raise UsageError(f"shift_quantize(groups={groups}): expected 1 to 16")
    if not -x.ndim <= dim < x.ndim:
        raise UsageError(f"shift_quantize(dim={dim}): x has shape {tuple(x.shape)}")
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    dim %= x.ndim
    others = [d for d in range(x.ndim) if d != dim]
    if not x.numel():
        none = torch.zeros(x.shape[dim], dtype=torch.uint8, device=x.device)
        return Shifted(torch.zeros_like(x, dtype=torch.int8), none, x.new_ones(()), dim)
    r = x.abs().amax(others) if others else x.abs()  # (K,)
    r0 = r.amax()
    finite = r0.isfinite()
    r = torch.where(finite, r, 0.0)
    exponents = range_exponents(r, groups)
    # a scale below the smallest normal number would have lost digits; codes are then small, and the error is too
    largest = torch.where(r0 == 0, top, r0.clamp(min=top * torch.finfo(x.dtype).tiny))
    scale = largest / top
    # x / r0 · qmax and not x / S0, which rounds twice: where the quotient is exact, so are ties
    y = torch.ldexp(x / largest * top, _along(exponents, x.ndim, dim).int())
    codes = torch.where(finite, rounded(y, rounding, generator).clamp(-top, top), 0.0).to(torch.int8)
    return Shifted(codes, exponents, torch.where(finite, scale, torch.nan), dim)


def rounded(y: Tensor, rounding: str, generator: torch.Generator | None = None) -> Tensor:
    """y to integers: to the nearest, ties to even, or up with the probability of its fraction ("stochastic")."""
    if rounding == "nearest":
        return y.round()
    if rounding != "stochastic":
        raise UsageError(f"rounding={rounding!r}: expected 'nearest' or 'stochastic'")
    return (y + torch.rand(y.shape, dtype=y.dtype, device=y.device, generator=generator)).floor()


def _along(e: Tensor, ndim: int, dim: int) -> Tensor:
    return e.reshape([-1 if d == dim else 1 for d in range(ndim)])
