"""Packed weights as GPU kernels read them.

Codes are cut into planes of 8, or 4, 2 and 1 bits (`normfuse.quant.packing.planes`), and stand as

    [K tile][piece][N][channel]   bytes

A tile is `turns` blocks of `inner` channels, one product of the tensor cores each. A byte of a w-bit plane holds codes of one
output from 8 / w blocks that follow each other, the first in the lowest bits: block t of a tile is in piece t // (8 / w) of the
plane, at bit t % (8 / w) · w. So a block comes out of its bytes by a shift and a mask of whole registers; no code has to change
its thread.

Channels run fastest, because the tensor cores take four consecutive ones in a register. Outputs come next, and not the other tiles:
what one program reads of a piece is then one stretch of memory, 16 bytes a thread, whatever its share of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant import packing

if TYPE_CHECKING:
    import numpy as np

__all__ = ["GROUPS", "LARGEST_K", "Layout", "from_packed", "layout", "planes", "shifts"]

#: The most exponents: C << 7 still is two digits of 8 bits.
GROUPS = 8
#: 127 · 127 · K has to fit in the 32 bits of an accumulator, which saturates.
LARGEST_K = 1 << 17

# Wide blocks mean fewer, larger loads; narrow ones less padding of K where a tile has many of them.
_INNER = {8: 64, 4: 64}
_ODD_INNER = 32


@dataclass(frozen=True)
class Layout:
    """Where the bits of a code are.

    Attributes:
        inner: channels of a block.
        turns: blocks of a tile.
        pieces: of a tile, all planes together.
    """

    inner: int
    turns: int
    pieces: int

    @property
    def tile(self) -> int:
        """Channels of a tile."""
        return self.inner * self.turns


def layout(bits: int) -> Layout:
    """The layout for codes of 2 to 8 bits.

    Raises:
        UsageError: of other widths.
    """
    narrowest = packing.planes(bits)[-1][1]
    turns = max(2, 8 // narrowest)
    return Layout(_INNER.get(bits, _ODD_INNER), turns, turns * bits // 8)


def planes(codes: Tensor, bits: int) -> Tensor:
    """The bytes of codes, on their device. Below 8 bits a code is stored as C + 2^(bits−1); channels are padded with code 0.

    Args:
        codes: C, int8 [N, K], |C| ≤ 2^(bits−1) − 1.
        bits: of a code, 2 to 8.

    Returns:
        uint8 [ceil(K / tile) · pieces · N · inner].

    Raises:
        UsageError: codes are no matrix of int8.
    """
    if codes.ndim != 2 or codes.dtype != torch.int8 or not codes.numel():
        raise UsageError(f"planes: codes {tuple(codes.shape)} of {codes.dtype}; expected int8 [N, K]")
    shape, (n, k) = layout(bits), codes.shape
    tiles = -(-k // shape.tile)
    u = torch.nn.functional.pad(codes, (0, tiles * shape.tile - k)).view(torch.uint8)
    if bits < 8:
        u = (u + 2 ** (bits - 1)) & (2**bits - 1)
    u = u.view(n, tiles, shape.turns, shape.inner)
    found = []
    for low, width in packing.planes(bits):
        per = 8 // width
        parts = ((u >> low) & (2**width - 1)).view(n, tiles, shape.turns // per, per, shape.inner)
        piece = parts[:, :, :, 0].clone()
        for i in range(1, per):
            piece |= parts[:, :, :, i] << (i * width)
        found.append(piece)
    return torch.cat(found, 2).permute(1, 2, 0, 3).reshape(-1)


def shifts(exponents: Tensor) -> Tensor:
    """E − e, uint8 [K], E the largest exponent.

    Raises:
        UsageError: there are more exponents than `GROUPS`.
    """
    largest = int(exponents.max()) if exponents.numel() else 0
    if largest >= GROUPS:
        raise UsageError(
            f"shifts: exponents up to {largest}; GPU kernels take up to {GROUPS - 1}: quantize with groups <= {GROUPS}"
        )
    return (largest - exponents.to(torch.uint8)).to(torch.uint8)


def from_packed(
    weight: np.ndarray[Any, Any], exponents: np.ndarray[Any, Any], n: int, bits: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """`planes` and `shifts` of a weight as it stands in a graph or a file.

    Args:
        weight: as `normfuse.quant.packing.pack` gives it, uint8.
        exponents: e, uint8 [K].
        n: outputs, the size of the weight's scale.
        bits: of a code.

    Returns:
        uint8 bytes and uint8 [K].

    Raises:
        UsageError: the sizes do not belong together, or there are too many exponents.
    """
    e = torch.tensor(exponents)
    codes = packing.unpack(torch.tensor(weight).reshape(-1), bits, e, n)
    return planes(codes, bits).numpy(), shifts(e).numpy()
