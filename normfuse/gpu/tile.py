"""How rows are spread over programs and threads, for kernels that only wait for memory."""

from __future__ import annotations

from dataclasses import dataclass

from normfuse.errors import UsageError
from normfuse.gpu.launch import DTYPES

__all__ = ["FLOATS", "LONGEST", "Tile", "check_row", "tile"]

FLOATS = ("fp16", "bf16", "fp32")
#: Features of the longest row that one program keeps in registers.
LONGEST = 16384

# A thread has 16 elements, which are two (16 bits) or four (32 bits) loads of 16 bytes that wait for memory at the same time. An
# H100 needs about 15 KiB on their way in each multiprocessor (3.35 TB/s · 0.6 µs / 132); 1536 threads of 32 bytes are 48 KiB. Short
# rows share a program, so that every thread has those loads and one barrier serves all rows of it. 16 warps at most: a larger
# program would be alone on its multiprocessor, which then idles at each barrier; the longest rows take 32 elements a thread.
_ELEMENTS = 2048
_PER_WARP = 512
_WARPS = (4, 16)
_LONG_BLOCK = 4096


@dataclass(frozen=True)
class Tile:
    """Attributes: features and rows of one program, warps, and whether a row needs several turns."""

    block: int
    rows: int
    warps: int
    long: bool


def tile(d: int) -> Tile:
    """The tile for rows of d features."""
    long = d > LONGEST
    block = _LONG_BLOCK if long else max(16, 1 << (d - 1).bit_length())
    rows = max(1, _ELEMENTS // block)
    warps = min(max(block * rows // _PER_WARP, _WARPS[0]), _WARPS[1])
    return Tile(block, rows, warps, long)


def check_row(what: str, d: int, dtype: str) -> None:
    """Raises:
    UsageError: there are no features, or the dtype is no float.
    """
    if d < 1:
        raise UsageError(f"{what}: rows of {d} features; expected at least one")
    if dtype not in FLOATS:
        raise UsageError(f"{what}: {dtype!r}; expected one of {', '.join(FLOATS)} (of {', '.join(DTYPES)})")
