"""From the bytes of planes to operands of the tensor cores.

    v = C << s,   as int8 where it fits, else  v = 128 · high + low  with int8 digits, 0 ≤ low < 128

Four codes are in a register and stay there: each step is one instruction for all of them. Triton's own arithmetic on int8 takes
every byte out of its register and puts it back, several instructions for each.
"""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["PLAIN", "constraints", "cut", "decoded", "field", "fits", "instructions", "mask_instructions", "shift_bits", "width"]

#: The interpreter knows no instructions: there the same is computed byte by byte.
PLAIN = tl.constexpr(bool(triton.knobs.runtime.interpret))

_SELECT = "0xD8"  # c ? b : a, bit by bit


@triton.constexpr_function
def cut(bits):
    """`normfuse.quant.packing.planes`: (lowest bit, width) of each plane. Triton calls nothing but functions of its own kind."""
    wide = [w for w in (8, 4, 2, 1) if bits & w]
    return tuple((sum(wide[:i]), w) for i, w in enumerate(wide))


@triton.constexpr_function
def width(bits, i):
    """Bits of plane i, 0 where there is none."""
    found = cut(bits)
    return found[i][1] if i < len(found) else 0


@triton.constexpr_function
def field(bits, i, turn):
    """(what plane i is shifted to the right by in that turn, the lowest bit that it gives)."""
    low, wide = cut(bits)[i]
    return turn % (8 // wide) * wide, low


@triton.constexpr_function
def fits(bits, groups):
    """C << s fits in a byte."""
    return bits + groups <= 9


@triton.constexpr_function
def shift_bits(groups):
    """Bits of the largest shift."""
    return (groups - 1).bit_length()


@triton.constexpr_function
def constraints(bits, groups):
    """Registers out and in: the operand; planes, and a mask for each bit of a shift."""
    return ",".join(["=r", *["r"] * (len(cut(bits)) + shift_bits(groups))])


@triton.constexpr_function
def instructions(bits, groups, turn, high):
    """PTX for one register: $0 is the operand, or low or high; then come the planes, then the masks, where a byte of mask j is 255
    if bit j of the shift is set.

    One result each: what low and high have in common is found by the assembler, and where there are two Triton moves both through
    shared memory.
    """
    count = shift_bits(groups)
    masks = [f"${1 + len(cut(bits)) + j}" for j in range(count)]
    lines = _codes(bits, turn)
    if high:
        lines.append("prmt.b32 w, u, 0, 0xBA98;")  # the sign of each byte, in all its bits
        for j in range(3):  # to the right by 7 − s, whose bits are those of s turned over
            lines += [f"shr.u32 t, u, {1 << j};", f"lop3.b32 t, w, t, {_bytes(255 >> (1 << j))}, {_SELECT};"]
            lines.append(f"lop3.b32 u, t, u, {masks[j]}, {_SELECT};" if j < count else "mov.b32 u, t;")
    else:
        for j in range(count):
            lines += [f"shl.b32 t, u, {1 << j};", f"and.b32 t, t, {_bytes((255 << (1 << j)) & 255)};"]
            lines.append(f"lop3.b32 u, u, t, {masks[j]}, {_SELECT};")
        if not fits(bits, groups):
            lines.append(f"and.b32 u, u, {_bytes(127)};")
    # the result last: its register may be that of an input
    return "\n".join(["{", ".reg .b32 u, w, t;", *lines, "mov.b32 $0, u;", "}"])


@triton.constexpr_function
def _codes(bits, turn):
    """u = C in each byte."""
    if bits == 8:
        return ["mov.b32 u, $1;"]
    lines = []
    for i, plane in enumerate(cut(bits)):  # Triton before 3.8 takes no nested names in a loop
        low, wide = plane
        target, right = "u" if i == 0 else "t", turn % (8 // wide) * wide - low
        move = f"shr.u32 {target}, ${1 + i}, {right};" if right >= 0 else f"shl.b32 {target}, ${1 + i}, {-right};"
        lines += [move, f"and.b32 {target}, {target}, {_bytes((2**wide - 1) << low)};"]
        lines += ["or.b32 u, u, t;"] if i else []
    # u − 2^(bits−1) without a borrow from the next byte
    return [*lines, f"or.b32 u, u, {_bytes(128)};", f"sub.u32 u, u, {_bytes(2 ** (bits - 1))};", f"xor.b32 u, u, {_bytes(128)};"]


@triton.constexpr_function
def _bytes(value):
    return f"0x{value:02X}{value:02X}{value:02X}{value:02X}"


@triton.jit
def _plain(p0, p1, p2, BITS: tl.constexpr, TURN: tl.constexpr):
    """C in int32."""
    if BITS == 8:
        v = p0.to(tl.int8, bitcast=True).to(tl.int32)
    else:
        at: tl.constexpr = field(BITS, 0, TURN)
        v = ((p0.to(tl.int32) >> at[0]) & ((1 << width(BITS, 0)) - 1)) << at[1]
        if width(BITS, 1):
            at1: tl.constexpr = field(BITS, 1, TURN)
            v |= ((p1.to(tl.int32) >> at1[0]) & ((1 << width(BITS, 1)) - 1)) << at1[1]
        if width(BITS, 2):
            at2: tl.constexpr = field(BITS, 2, TURN)
            v |= ((p2.to(tl.int32) >> at2[0]) & ((1 << width(BITS, 2)) - 1)) << at2[1]
        v -= 1 << (BITS - 1)
    return v


@triton.constexpr_function
def mask_instructions(bit):
    """PTX for one register: a byte of $0 is 255 where that bit of the byte in $1 is set."""
    return f"{{\n.reg .b32 t;\nshr.u32 t, $1, {bit};\nand.b32 t, t, {_bytes(1)};\nmul.lo.u32 $0, t, 255;\n}}"


@triton.jit
def _mask(s, BIT: tl.constexpr):
    text: tl.constexpr = mask_instructions(BIT)
    return tl.inline_asm_elementwise(text, "=r,r", (s,), dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def decoded(p0, p1, p2, s, BITS: tl.constexpr, GROUPS: tl.constexpr, TURN: tl.constexpr):
    """The operands of block TURN of a tile: (v, v) if it fits in a byte, else (low, high).

    Args:
        p0, p1, p2: bytes of the planes, uint8 [outputs, channels]; None for planes that the width does not have.
        s: shifts, uint8 [1, channels]; None for one group.
    """
    if BITS == 8 and GROUPS == 1:  # bytes are codes: no instruction, and no register, stands between memory and the tensor cores
        low = p0.to(tl.int8, bitcast=True)
        high = low
    elif PLAIN:
        v = _plain(p0, p1, p2, BITS, TURN)
        if GROUPS > 1:
            v = v << s.to(tl.int32)
        if fits(BITS, GROUPS):
            low = v.to(tl.int8)
            high = low
        else:
            low, high = (v & 127).to(tl.int8), (v >> 7).to(tl.int8)
    else:
        text: tl.constexpr = instructions(BITS, GROUPS, TURN, False)
        registers: tl.constexpr = constraints(BITS, GROUPS)
        given = (p0,)
        if width(BITS, 1):
            given = given + (p1,)  # noqa: RUF005 (Triton has no stars)
        if width(BITS, 2):
            given = given + (p2,)  # noqa: RUF005
        for j in tl.static_range(shift_bits(GROUPS)):
            given = given + (_mask(s, j),)  # noqa: RUF005
        low = tl.inline_asm_elementwise(text, registers, given, dtype=tl.int8, is_pure=True, pack=4)
        high = low
        if not fits(BITS, GROUPS):
            other: tl.constexpr = instructions(BITS, GROUPS, TURN, True)
            high = tl.inline_asm_elementwise(other, registers, given, dtype=tl.int8, is_pure=True, pack=4)
    return low, high
