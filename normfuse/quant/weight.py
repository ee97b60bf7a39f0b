"""`QuantizedWeight`: integer codes, exponents and float scales of one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.errors import UsageError

__all__ = ["QuantizedWeight"]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Ŵ[n, k] = scale[n] · (C[n, k] << (E − e[k])),   E = groups − 1.

    With S = scale · 2^E that is S[n] · 2^(−e[k]) · C[n, k]: the shift of a channel goes into the integer, the smallest power
    of two into the scale.

    Attributes:
        codes: C, int8 [N, K], |C| ≤ 2^(bits−1) − 1.
        exponents: e, uint8 [K], one an input channel.
        scale: float32 [N], finite and positive.
        bits: of a code, 2 to 8.

    Raises:
        UsageError: shapes or dtypes do not fit, or a code needs more bits.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    bits: int

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.int8:
            raise UsageError(f"QuantizedWeight: codes {tuple(self.codes.shape)} of {self.codes.dtype}; expected int8 [N, K]")
        n, k = self.codes.shape
        if tuple(self.exponents.shape) != (k,) or self.exponents.dtype != torch.uint8:
            raise UsageError(
                f"QuantizedWeight: exponents {tuple(self.exponents.shape)} of {self.exponents.dtype}; expected uint8 [{k}]"
            )
        if tuple(self.scale.shape) != (n,) or self.scale.dtype != torch.float32:
            raise UsageError(f"QuantizedWeight: scale {tuple(self.scale.shape)} of {self.scale.dtype}; expected float32 [{n}]")
        if not 2 <= self.bits <= 8:
            raise UsageError(f"QuantizedWeight(bits={self.bits}): expected 2 to 8")
        top = 2 ** (self.bits - 1) - 1
        if self.codes.numel() and (int(self.codes.min()) < -top or int(self.codes.max()) > top):
            raise UsageError(f"QuantizedWeight(bits={self.bits}): codes beyond ±{top}")

    @property
    def groups(self) -> int:
        """max(e) + 1."""
        return int(self.exponents.max()) + 1 if self.exponents.numel() else 1

    def operand(self) -> Tensor:
        """C << (E − e): int32 [N, K], what an integer product multiplies with."""
        return self.codes.int() << (self.groups - 1 - self.exponents.int())

    def dequantized(self) -> Tensor:
        """Ŵ in float64 [N, K], exactly."""
        return self.operand().double() * self.scale.double()[:, None]
