"""`QuantizedWeight`: integer codes, exponents and float scales of one weight matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.integers import top_code

__all__ = ["BLOCKS", "BLOCK_BITS", "QuantizedWeight", "are_multipliers", "block_of", "largest_multiplier"]

#: How many neighbouring input channels may share a multiplier, and the most bits that their codes may have.
BLOCKS = (32, 64, 128, 256)
BLOCK_BITS = 4


def largest_multiplier(bits: int) -> int:
    """The largest |m| with |C · m| ≤ 127 for every code: what a product reads is an integer of 8 bits."""
    return 127 // (top_code(bits) + 1)


def are_multipliers(m: Tensor, bits: int) -> bool:
    """Is every one of them within 1 ≤ |m| ≤ `largest_multiplier`?"""
    size = m.short().abs()
    return not m.numel() or (int(size.min()) >= 1 and int(size.max()) <= largest_multiplier(bits))


def block_of(k: int, blocks: int) -> int:
    """The block size that cuts k channels into so many blocks: one that is smaller gives more, one that is larger gives fewer, and
    where all give one block they mean the same.

    Raises:
        UsageError: no size does.
    """
    for block in BLOCKS:
        if -(-k // block) == blocks:
            return block
    raise UsageError(f"{blocks} blocks of {k} input channels: expected blocks of {', '.join(map(str, BLOCKS))} channels")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Ŵ[n, k] = scale[n] · (C[n, k] << (E − e[k])),   E = groups − 1,   or   Ŵ[n, k] = scale[n] · m[n, ⌊k / block⌋] · C[n, k].

    With S = scale · 2^E the first is S[n] · 2^(−e[k]) · C[n, k]: the shift of a channel goes into the integer, the smallest power
    of two into the scale. In the second a block of neighbouring channels of an output has a small integer of its own.

    Attributes:
        codes: C, int8 [N, K], |C| ≤ 2^(bits−1) − 1; with multipliers −2^(bits−1) as well.
        exponents: e, uint8 [K], one an input channel.
        scale: float32 [N], finite and positive.
        bits: of a code, 2 to 8.
        multipliers: m, int8 [N, ⌈K / block⌉], 1 ≤ |m| ≤ `largest_multiplier`; exponents are then 0 and codes have up to 4 bits.
        block: channels that share a multiplier, one of `BLOCKS`; 0 without multipliers.

    Raises:
        UsageError: shapes or dtypes do not fit, or a code needs more bits.
    """

    codes: Tensor
    exponents: Tensor
    scale: Tensor
    bits: int
    multipliers: Tensor | None = None
    block: int = 0

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
        low, top = self.code_range
        if self.codes.numel() and (int(self.codes.min()) < low or int(self.codes.max()) > top):
            raise UsageError(f"QuantizedWeight(bits={self.bits}): codes beyond {low} … {top}")
        if self.multipliers is not None:
            self._check_multipliers(self.multipliers)

    def _check_multipliers(self, m: Tensor) -> None:
        n, k = self.codes.shape
        if self.block not in BLOCKS or m.dtype != torch.int8 or tuple(m.shape) != (n, -(-k // self.block)):
            raise UsageError(
                f"QuantizedWeight: multipliers {tuple(m.shape)} of {m.dtype} for blocks of {self.block} of [{n}, {k}]; expected "
                f"int8, one for each output and block of {', '.join(map(str, BLOCKS))} channels"
            )
        if self.bits > BLOCK_BITS or self.groups > 1:
            raise UsageError(
                f"QuantizedWeight(bits={self.bits}): multipliers are for codes of up to {BLOCK_BITS} bits and exponents of 0"
            )
        most = largest_multiplier(self.bits)
        if not are_multipliers(m, self.bits):
            raise UsageError(f"QuantizedWeight(bits={self.bits}): multipliers outside ±1 … ±{most}")

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code that there may be."""
        top = top_code(self.bits)
        return (-top if self.multipliers is None else -top - 1), top

    @property
    def groups(self) -> int:
        """max(e) + 1."""
        return int(self.exponents.max()) + 1 if self.exponents.numel() else 1

    def units(self) -> Tensor:
        """What a code is multiplied with, 2^(E − e[k]) or m: int32 [1, K] or [N, K]."""
        if self.multipliers is not None:
            return self.multipliers.int().repeat_interleave(self.block, 1)[:, : self.codes.shape[1]]
        return (1 << (self.groups - 1 - self.exponents.int())).unsqueeze(0)

    def operand(self) -> Tensor:
        """C << (E − e), or C · m: int32 [N, K], what an integer product multiplies with."""
        return self.codes.int() * self.units()

    def dequantized(self) -> Tensor:
        """Ŵ in float64 [N, K], exactly."""
        return self.operand().double() * self.scale.double()[:, None]
