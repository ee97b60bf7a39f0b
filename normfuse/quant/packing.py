"""Packed weights: the layout that the kernels read (native/normfuse.h, `nf_weight`), and the bit strings of embedding tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.weight import QuantizedWeight, block_of

__all__ = [
    "channel_order", "pack", "pack_groups", "pack_multipliers", "pack_rows", "packed_bytes", "planes", "row_bytes", "unpack",
    "unpack_multipliers", "unpack_rows",
]  # fmt: skip

_PANEL = 16  # outputs
_QUAD = 4  # channels
_UNIT = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}  # quads that fill whole blocks of every plane


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(lowest bit, width) of the planes that a code is cut into: 8, or 4, 2 and 1 bits, the lowest first."""
    if bits not in _UNIT:
        raise UsageError(f"packing of {bits} bits: expected 2 to 8")
    found, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((low, width))
            low += width
    return tuple(found)


def channel_order(exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Channels sorted by exponent, equal ones in their own order, and how many have each exponent.

    Args:
        exponents: uint8 [K].

    Returns:
        order, int32 [K]: the channel at each sorted position; sizes, int32 [groups], groups = max(e) + 1.
    """
    sizes = torch.bincount(exponents.int(), minlength=1) if exponents.numel() else torch.zeros(1)
    return exponents.argsort(stable=True).int(), sizes.int()


def packed_bytes(n: int, bits: int, sizes: Sequence[int]) -> int:
    """Bytes of a packed weight with n outputs and sizes[g] channels of exponent g: panels · quads · 8 · bits."""
    quads = sum(-(-size // _QUAD) for size in sizes)
    unit = _UNIT[bits]
    return -(-n // _PANEL) * (-(-quads // unit) * unit) * 8 * bits


def pack(weight: QuantizedWeight) -> Tensor:
    """The codes of a weight as uint8, in the order in which kernels stream them: [panel][plane][block][64 bytes].

    Channels are sorted by exponent, each exponent padded to quads of 4 channels; outputs are padded to panels of 16; padding is
    code 0. A code is stored as u = C + 2^(bits−1), cut into `planes`. A block of a plane of w bits is 64 bytes, (16 outputs × 4
    channels), each holding 8 / w consecutive quads, the first in the lowest bits.
    """
    n, _ = weight.codes.shape
    bits = weight.bits
    positions, quads = _positions(weight.exponents, bits)
    panels = -(-n // _PANEL)
    # one more channel and row, of code 0: what padding reads
    u = torch.full((panels * _PANEL, weight.codes.shape[1] + 1), 2 ** (bits - 1), dtype=torch.uint8)
    u[:n, :-1] = (weight.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    u = u.index_select(1, positions).view(panels, _PANEL, quads, _QUAD).transpose(1, 2)  # (panel, quad, column, channel)
    out = torch.empty((panels, quads * 8 * bits), dtype=torch.uint8)
    start = 0
    for low, width in planes(bits):
        per = 8 // width
        part = ((u >> low) & (2**width - 1)).reshape(panels, quads // per, per, _PANEL * _QUAD)
        block = part[:, :, 0].clone()
        for i in range(1, per):
            block |= part[:, :, i] << (i * width)
        size = quads // per * _PANEL * _QUAD
        out[:, start : start + size] = block.reshape(panels, size)
        start += size
    return out.reshape(-1)


def unpack(packed: Tensor, bits: int, exponents: Tensor, n: int) -> Tensor:
    """The codes that `pack` packed: int8 [n, K].

    Args:
        packed: uint8, 1-d.
        bits: of a code.
        exponents: uint8 [K].
        n: outputs.

    Raises:
        UsageError: the number of bytes is not what the shape needs.
    """
    exponents = exponents.cpu()
    positions, quads = _positions(exponents, bits)
    panels = -(-n // _PANEL)
    need = panels * quads * 8 * bits
    if packed.dtype != torch.uint8 or packed.numel() != need:
        raise UsageError(
            f"packed weight: {packed.numel()} values of {packed.dtype}; [{n}, {exponents.numel()}] in {bits} bits with these "
            f"exponents has {need} bytes"
        )
    data = packed.reshape(panels, -1)
    u = torch.zeros((panels, quads, _PANEL * _QUAD), dtype=torch.uint8, device=packed.device)
    start = 0
    for low, width in planes(bits):
        per = 8 // width
        size = quads // per * _PANEL * _QUAD
        block = data[:, start : start + size].reshape(panels, quads // per, _PANEL * _QUAD)
        for i in range(per):
            u[:, i::per] |= ((block >> (i * width)) & (2**width - 1)) << low
        start += size
    rows = u.view(panels, quads, _PANEL, _QUAD).transpose(1, 2).reshape(panels * _PANEL, -1)[:n]
    real = positions < exponents.numel()
    back = torch.empty(exponents.numel(), dtype=torch.long)
    back[positions[real]] = real.nonzero().flatten()
    codes: Tensor = rows.index_select(1, back.to(packed.device)).to(torch.int16) - 2 ** (bits - 1)
    return codes.to(torch.int8)


def pack_multipliers(multipliers: Tensor) -> Tensor:
    """int8 [N, blocks] in the order in which kernels stream them: int8 [panels, blocks, 16 outputs], padded with ones."""
    n, blocks = multipliers.shape
    padded = torch.nn.functional.pad(multipliers, (0, 0, 0, -n % _PANEL), value=1)
    return padded.view(-1, _PANEL, blocks).transpose(1, 2).contiguous()


def unpack_multipliers(packed: Tensor, n: int, k: int) -> tuple[Tensor, int]:
    """What `pack_multipliers` packed, int8 [n, blocks], and how many of k channels a block has.

    Raises:
        UsageError: they are not those of n outputs and k channels.
    """
    if packed.dtype != torch.int8 or packed.ndim != 3 or packed.shape[0] != -(-n // _PANEL) or packed.shape[2] != _PANEL:
        raise UsageError(
            f"multipliers {tuple(packed.shape)} of {packed.dtype}: expected int8 [{-(-n // _PANEL)}, blocks, {_PANEL}] for {n} "
            "outputs"
        )
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:n], block_of(k, packed.shape[1])


def pack_groups(weights: Sequence[QuantizedWeight], taps: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The packed bytes, exponents and scales of several weights, each concatenated: the groups of a convolution.

    Args:
        weights: one a group of channels, [O / groups, taps · channels], the channel running fastest.
        taps: of the kernel; exponents, which its taps share, are given once a channel.

    Returns:
        uint8, 1-d; uint8 [groups · channels]; float32 [O].

    Raises:
        UsageError: the weights differ in bits or shape, or the taps of a channel in their exponents.
    """
    if not weights or len({(w.bits, tuple(w.codes.shape)) for w in weights}) != 1:
        found = sorted({f"{tuple(w.codes.shape)} in {w.bits} bits" for w in weights})
        raise UsageError(f"pack_groups: {', '.join(found) or 'no weight'}; expected weights of one shape and width")
    k = weights[0].exponents.numel()
    if taps < 1 or k % taps:
        raise UsageError(f"pack_groups(taps={taps}): {k} columns are no multiple of it")
    by_tap = torch.stack([w.exponents.view(taps, -1) for w in weights], 1)  # (tap, group, channel)
    if not torch.equal(by_tap, by_tap[:1].expand_as(by_tap)):
        raise UsageError("pack_groups: the taps of a channel differ in their exponents; quantize with channel_groups")
    exponents = by_tap[0].reshape(-1).clone()
    return torch.cat([pack(w) for w in weights]), exponents, torch.cat([w.scale for w in weights])


def row_bytes(dim: int, bits: int) -> int:
    """⌈dim · bits / 8⌉."""
    return -(-dim * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Each row as one little-endian bit string of u = C + 2^(bits−1): int8 [rows, dim] to uint8 [rows, ⌈dim · bits / 8⌉]."""
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise UsageError(f"pack_rows: codes {tuple(codes.shape)} of {codes.dtype}; expected int8 [rows, dim]")
    rows, dim = codes.shape
    out = torch.zeros((rows, row_bytes(dim, bits) + 1), dtype=torch.uint8)
    u = codes.to(torch.int16) + 2 ** (bits - 1)
    period = 8  # eight codes are `bits` whole bytes
    for i in range(min(period, dim)):
        byte, shift = divmod(i * bits, 8)
        part = u[:, i::period] << shift
        count = part.shape[1]
        out[:, byte::bits][:, :count] |= (part & 255).to(torch.uint8)
        if shift + bits > 8:
            out[:, byte + 1 :: bits][:, :count] |= (part >> 8).to(torch.uint8)
    return out[:, :-1].contiguous()


def unpack_rows(packed: Tensor, dim: int, bits: int) -> Tensor:
    """The codes that `pack_rows` packed: uint8 [..., ⌈dim · bits / 8⌉] to int8 [..., dim]."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != row_bytes(dim, bits):
        raise UsageError(
            f"unpack_rows: packed {tuple(packed.shape)} of {packed.dtype}; {dim} codes of {bits} bits have "
            f"{row_bytes(dim, bits)} bytes"
        )
    if bits == 8:
        return (packed ^ 128).view(torch.int8)  # u − 128 in two's complement
    first, second, shift = (t.to(packed.device) for t in _bit_positions(dim, bits))
    low, high = packed.index_select(-1, first).to(torch.int16), packed.index_select(-1, second).to(torch.int16)
    # of 16 signed bits a shift to the right repeats the sign, which the mask drops
    codes: Tensor = (((low | (high << 8)) >> shift) & (2**bits - 1)) - 2 ** (bits - 1)
    return codes.to(torch.int8)


@functools.lru_cache(maxsize=16)
def _bit_positions(dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The byte in which each code starts, the one after it (or the last one), and the bit in it."""
    offset = torch.arange(dim) * bits
    first = offset // 8
    return first, (first + 1).clamp(max=row_bytes(dim, bits) - 1), (offset % 8).to(torch.int16)


def _positions(exponents: Tensor, bits: int) -> tuple[Tensor, int]:
    """The channel at each padded position, K for padding, and the number of quads."""
    order, sizes = channel_order(exponents)
    parts, start = [], 0
    for size in sizes.tolist():
        parts.append(torch.nn.functional.pad(order[start : start + size].long(), (0, -size % _QUAD), value=exponents.numel()))
        start += size
    positions = torch.cat(parts)
    unit = _UNIT[bits] * _QUAD
    positions = torch.nn.functional.pad(positions, (0, -positions.numel() % unit), value=exponents.numel())
    return positions, positions.numel() // _QUAD
