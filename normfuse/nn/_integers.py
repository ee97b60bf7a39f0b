"""What layers share that train in integers: checked widths, numbered random draws, gradients without bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.nn._moments import recomputing
from normfuse.quant.shift import shift_quantize

__all__ = ["Draws", "integer", "stochastic", "width"]

_SEEDS = 1 << 31
_MASK = (1 << 63) - 1


def integer(layer: str, name: str, value: Any, low: int, high: int) -> int:
    """The value, if it is an integer in that range.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{layer}({name}={value!r}): expected an integer from {low} to {high}")
    return value


def width(layer: str, name: str, value: Any) -> int | None:
    """A number of bits from 2 to 8, or None for float."""
    return None if value is None else integer(layer, name, value, 2, 8)


class Draws:
    """Numbers for the random draws of a layer, one a forward; the same seed gives the same numbers.

    The numbers are no part of a state dict, and PyTorch's global generator is read at most once, for the seed.

    Args:
        layer: name of its class, for errors.
        seed: None takes one from PyTorch's global generator.
    """

    def __init__(self, layer: str, seed: int | None) -> None:
        self.seed = int(torch.randint(_SEEDS, ())) if seed is None else integer(layer, "seed", seed, 0, _SEEDS - 1)
        self.count = 0

    def next(self) -> int:
        """The next number; a forward that activation checkpointing repeats keeps that of the last. Ranks draw differently."""
        if not recomputing():
            self.count += 1
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return ((self.seed + rank * 0x9E37) * 0x9E3779B97F4A7C15 + self.count * 0x5851F42D4C957F2D) & _MASK


def stochastic(g: Tensor, bits: int | None, groups: int, dim: int, number: int) -> Tensor:
    """g rounded to `bits` without bias by the draw of that number; g itself for None."""
    if bits is None:
        return g
    generator = torch.Generator(g.device).manual_seed(number & _MASK)
    return shift_quantize(g, bits, groups, dim, "stochastic", generator).dequantized()
