"""Packed weights as operands of integer products.

    Σ_k A[k] · (C[n, k] << (E − e[k]))  =  Σ_parts  (Σ_{k in part} A[k] · (C[n, k] << (h − e[k])))  << (E − h)

A part holds the channels whose exponents lie in one stretch, h the largest of them, such that its shifted codes fit in a byte.
With bits + groups <= 9 there is one part. Codes times the multipliers of their blocks fit in a byte, too, and are one part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from normfuse.export.ops.emitter import Emitter, Marker
from normfuse.quant.packing import planes, unpack, unpack_multipliers
from normfuse.quant.weight import block_of

__all__ = [
    "GROUPS",
    "GROUPS_AND_BLOCKS",
    "SAFE",
    "Operand",
    "Packed",
    "bit_rows",
    "linear_parts",
    "operands",
    "parts",
    "stored",
    "stretches",
    "unit_of",
    "unpacked",
    "weight_words",
]

#: Signed operands up to this are exact with unsigned activations on AVX2 and AVX-512 without VNNI: their kernels add two
#: products in 16 bits with saturation, and 2 · 255 · 64 < 2^15.
SAFE = 64


@dataclass(frozen=True)
class Operand:
    """One part of a weight.

    Attributes:
        value: [K, N], int8 or uint8.
        zero: its zero point: 0 or 128.
        shift: of the sums, to the left.
        columns: the input channels that it holds; None: all of them.
    """

    value: Any
    zero: int
    shift: int
    columns: np.ndarray[Any, np.dtype[np.int64]] | None = None


class Packed(NamedTuple):
    """The weight of a linear layer: values of the graph, or numbers.

    Attributes:
        weight: packed, uint8.
        exponents: uint8 [K].
        scale: [N].
        multipliers: of blocks, packed, or None.
    """

    weight: Any
    exponents: Any
    scale: Any
    multipliers: Any = None


#: Codes [K, N], factors that broadcast to them, the shift of the sums, and the channels.
Part = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int, np.ndarray[Any, Any]]


def stretches(bits: int, groups: int) -> tuple[tuple[int, int], ...]:
    """First and last exponent of each part."""
    width = max(1, 9 - bits)
    return tuple((low, min(low + width, groups) - 1) for low in range(0, groups, width))


def linear_parts(w: Packed, bits: int) -> tuple[Part, ...]:
    """Of each part that has channels: its codes int32 [K, N], their factors [K, 1] or [K, N], the shift of its sums, and its
    channels; `w` are numbers."""
    n, k = w.scale.size, w.exponents.size
    if w.multipliers is None:
        return tuple((codes, 1 << shift, after, columns) for codes, shift, after, columns in parts(w.weight, w.exponents, n, bits))
    codes = unpack(torch.tensor(w.weight), bits, torch.tensor(w.exponents), n).numpy().astype(np.int32).T
    m, block = unpack_multipliers(torch.tensor(w.multipliers), n, k)
    factors = m.repeat_interleave(block, 1)[:, :k].numpy().astype(np.int32).T
    return ((codes, factors, 0, np.arange(k)),)


def parts(packed: np.ndarray[Any, Any], exponents: np.ndarray[Any, Any], n: int, bits: int) -> tuple[Part, ...]:
    """Of each part that has channels: its codes int32 [K, N], their shifts [K, 1], the shift of its sums, and its channels."""
    codes = unpack(torch.tensor(packed), bits, torch.tensor(exponents), n).numpy().astype(np.int32).T
    groups = int(exponents.max()) + 1
    found = []
    for low, high in stretches(bits, groups):
        columns = np.flatnonzero((exponents >= low) & (exponents <= high))
        if columns.size:
            shift = (high - exponents[columns].astype(np.int32))[:, None]
            found.append((codes[columns], shift, groups - 1 - high, columns))
    return tuple(found)


def stored(at: Emitter, codes: np.ndarray[Any, Any], factors: np.ndarray[Any, Any], zero: int, *, int4: bool = False) -> Any:
    """codes · factors with a zero point, as bytes; `int4`: as INT4 and factors, from which a runtime makes the bytes when it loads.

    By Cast and Mul: ONNX Runtime computes these once, and a DequantizeLinear on every call.
    """
    if not int4:
        return at.const((codes * factors + zero).astype(np.uint8 if zero else np.int8))
    import ml_dtypes

    wide = at.op("Cast", at.const(codes.astype(ml_dtypes.int4)), to=6)
    if (factors != 1).any():
        wide = at.op("Mul", wide, at.const(factors.astype(np.int32)))
    return at.op("Cast", at.op("Add", wide, at.const(np.int32(zero))) if zero else wide, to=2 if zero else 3)


def unit_of(scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One scale for a whole weight, a power of two where scales differ; the rest of each output's is multiplied behind the product.

    TensorRT would cut a weight with a scale for each output where q, k and v are cut from its product, and then unpack it first.
    The sums are at most as large as they are with their own scales, but for outputs with a thousandth of the largest scale; and a
    half holds codes times a power of two exactly.
    """
    if (scale == scale.flat[0]).all():
        return np.asarray(scale.flat[0])
    least = max(float(scale[scale > 0].min(initial=np.inf)), float(scale.max()) * 2.0**-10, 2.0**-14)
    return np.asarray(np.exp2(np.floor(np.log2(least))), scale.dtype)


def operands(at: Emitter, w: Packed, facts: Mapping[str, Any]) -> tuple[Operand, ...]:
    """The operands of a weight: numbers if they are known now, else nodes that unpack it where the file is loaded.

    Args:
        at: where nodes go.
        w: the weight; of its scale only the size is read.
        facts: bits of a code, groups (the largest exponent and one more), block (0 without multipliers), and int4: weights of up to
            4 bits as INT4 in the file.
    """
    bits = facts["bits"]
    known = Packed(*(None if value is None else at.known(value) for value in w))
    if known.weight is None or known.exponents is None or known.scale is None or (facts["block"] and known.multipliers is None):
        return _in_blocks(at, w, bits, facts["block"]) if facts["block"] else _unpacked(at, *w[:3], bits, facts["groups"])
    found = linear_parts(known, bits)
    out = []
    for codes, factors, shift, columns in found:
        zero = 0 if np.abs(codes * factors).max(initial=0) <= SAFE else 128
        value = stored(at, codes, factors, zero, int4=bool(facts.get("int4")) and bits <= 4)
        out.append(Operand(value, zero, shift, columns if len(found) > 1 else None))
    return tuple(out)


def _unpacked(at: Emitter, weight: Any, exponents: Any, scale: Any, bits: int, groups: int) -> tuple[Operand, ...]:
    codes = unpacked(at, weight, exponents, at.op("Shape", scale), bits, groups)
    found = []
    for low, high in stretches(bits, groups):
        factor = np.array([2 ** (high - e) if low <= e <= high else 0 for e in range(groups)], np.int32)
        factors = at.op("Gather", at.const(factor[:, None]), at.op("Cast", exponents, to=6), axis=0)  # (K, 1)
        value = at.op("Mul", codes, factors)
        zero = 0 if (2 ** (bits - 1) - 1) << (high - low) <= SAFE else 128
        value = at.op("Cast", at.op("Add", value, at.const(np.int32(zero))), to=2) if zero else at.op("Cast", value, to=3)
        found.append(Operand(value, zero, groups - 1 - high))
    return tuple(found)


def _in_blocks(at: Emitter, w: Packed, bits: int, block: int) -> tuple[Operand, ...]:
    """C · m, with the multipliers of each block repeated for its channels."""
    outputs = at.op("Shape", w.scale)
    codes = unpacked(at, w.weight, w.exponents, outputs, bits, 1)
    zero, one = (at.const(np.array([i], np.int64)) for i in (0, 1))
    m = at.op("Transpose", at.op("Cast", w.multipliers, to=6), perm=[1, 0, 2])  # (block, panel, output)
    m = at.op("Slice", at.op("Reshape", m, at.const(np.array([0, -1], np.int64))), zero, outputs, one)
    channels = at.op("Squeeze", at.op("Shape", w.exponents), zero)
    places = at.op("Range", at.const(np.int64(0)), channels, at.const(np.int64(1)))
    factors = at.op("Gather", m, at.op("Div", places, at.const(np.int64(block))), axis=0)  # (K, N)
    value = at.op("Add", at.op("Mul", codes, factors), at.const(np.int32(128)))
    return (Operand(at.op("Cast", value, to=2), 128, 0),)


def unpacked(at: Emitter, weight: Any, exponents: Any, outputs: Any, bits: int, groups: int) -> Any:
    """C as int32 [K, N], by the same steps as `normfuse.quant.packing.unpack`.

    Every value here follows from constants: ONNX Runtime computes it once, when it loads the file.

    Args:
        weight: packed, uint8.
        exponents: uint8 [K].
        outputs: int64 [1], N.
        bits: of a code.
        groups: largest exponent and one more.
    """
    one, panel = at.const(np.array([1], np.int64)), at.const(np.array([16], np.int64))
    panels = at.op("Div", at.op("Add", outputs, at.const(np.array([15], np.int64))), panel)
    # the planes take bytes in proportion to their widths
    cut = at.op("Reshape", weight, at.op("Concat", panels, at.const(np.array([bits, -1], np.int64)), axis=0))
    u = None
    for low, width in planes(bits):
        part = at.op("Slice", cut, at.const(np.array([low], np.int64)), at.const(np.array([low + width], np.int64)), one)
        block = at.op("Reshape", part, at.op("Concat", panels, at.const(np.array([-1, 1, 64], np.int64)), axis=0))
        if width < 8:
            shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
            block = at.op("BitShift", block, at.const(shifts), direction="RIGHT")
            block = at.op("BitwiseAnd", block, at.const(np.uint8(2**width - 1)))
        if low:
            block = at.op("BitShift", block, at.const(np.uint8(low)), direction="LEFT")
        block = at.op("Reshape", block, at.op("Concat", panels, at.const(np.array([-1, 16, 4], np.int64)), axis=0))
        u = block if u is None else at.op("BitwiseOr", u, block)
    columns = at.op("Transpose", u, perm=[1, 3, 0, 2])  # (quad, channel, panel, output)
    shape = at.op("Concat", at.const(np.array([-1], np.int64)), at.op("Mul", panels, panel), axis=0)
    columns = at.op("Slice", at.op("Reshape", columns, shape), at.const(np.array([0], np.int64)), outputs, one)
    columns = at.op("Gather", columns, _places(at, exponents, groups), axis=0)
    # sums and products in int32: older runtimes have none of bytes
    return at.op("Sub", at.op("Cast", columns, to=6), at.const(np.int32(2 ** (bits - 1))))


def _places(at: Emitter, exponents: Any, groups: int) -> Any:
    """Where each channel stands: behind the channels of lower exponents, padded to quads, and those before it of its own."""
    each = at.const(np.arange(groups, dtype=np.int32)[:, None])
    mine = at.op("Cast", at.op("Equal", at.op("Cast", exponents, to=6), each), to=7)  # (groups, K)
    last, four = at.const(np.array([1], np.int64)), at.const(np.array([4], np.int64))
    sizes = at.op("ReduceSum", mine, last, keepdims=1)
    quads = at.op("Div", at.op("Add", sizes, at.const(np.array([3], np.int64))), four)
    starts = at.op("CumSum", at.op("Mul", quads, four), at.const(np.int64(0)), exclusive=1)
    before = at.op("CumSum", mine, at.const(np.int64(1)), exclusive=1)
    return at.op("ReduceSum", at.op("Mul", mine, at.op("Add", starts, before)), at.const(np.array([0], np.int64)), keepdims=0)


def _groups(call: Marker) -> int:
    return int(call.array("exponents").max(initial=0)) + 1


#: The largest exponent and one: a body has a part for each stretch of them.
GROUPS = {"groups": _groups}


def _block(call: Marker) -> int:
    return block_of(call.size("exponents", 0), call.size("multipliers", 1)) if call.has("multipliers") else 0


#: The same, and the channels that share a multiplier, 0 for none.
GROUPS_AND_BLOCKS = {**GROUPS, "block": _block}


def weight_words(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What the unpacking of a weight depends on, in the name of a variant."""
    return f"b{facts['bits']}", f"g{facts['groups']}", f"m{facts['block']}" if facts.get("block") else ""


def bit_rows(at: Emitter, row: Any, packed: Any, dim: Any, bits: int) -> Any:
    """C, int32, of rows that are little-endian strings of dim · bits bits, a code stored as C + 2^(bits−1).

    Args:
        row: uint8 [..., ⌈dim · bits / 8⌉].
        packed: the matrix that the rows are of.
        dim: a value, int64 without an axis.
        bits: of a code.
    """
    if bits == 8:
        u = at.op("Cast", row, to=6)
    else:
        zero, one, eight = (at.const(np.int64(i)) for i in (0, 1, 8))
        places = at.op("Mul", at.op("Range", zero, dim, one), at.const(np.int64(bits)))
        first = at.op("Div", places, eight)
        last = at.op("Sub", at.op("Shape", packed, start=1), one)  # [1]
        second = at.op("Min", at.op("Add", first, one), last)
        low, high = (at.op("Cast", at.op("Gather", row, byte, axis=-1), to=12) for byte in (first, second))
        both = at.op("BitwiseOr", low, at.op("BitShift", high, at.const(np.uint32(8)), direction="LEFT"))
        u = at.op("BitShift", both, at.op("Cast", at.op("Mod", places, eight), to=12), direction="RIGHT")
        u = at.op("Cast", at.op("BitwiseAnd", u, at.const(np.uint32(2**bits - 1))), to=6)
    return at.op("Sub", u, at.const(np.int32(2 ** (bits - 1))))
