"""Weights as bit planes, and the instructions that decode them."""

from __future__ import annotations

import functools
import operator
import re
from typing import Any

import numpy as np
import pytest
import torch

from normfuse.errors import UsageError
from normfuse.gpu.planes import GROUPS, from_packed, layout, planes, shifts
from normfuse.quant.packing import pack
from normfuse.quant.packing import planes as cut
from normfuse.quant.weight import QuantizedWeight

pytest.importorskip("triton", reason="the kernels are written in Triton")

BITS = range(2, 9)


def random_weight(n: int, k: int, bits: int, groups: int, seed: int = 0) -> QuantizedWeight:
    """All codes and all exponents occur, the largest of both too."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (n, k), generator=generator, dtype=torch.int8)
    exponents = torch.randint(0, groups, (k,), generator=generator).to(torch.uint8)
    exponents[0], exponents[k // 2] = groups - 1, 0
    codes[0, : k // 2 + 1], codes[-1, 0] = top, -top
    return QuantizedWeight(codes, exponents, torch.rand(n, generator=generator) * 1e-3 + 1e-4, bits)


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in BITS])
def test_codes_are_where_the_layout_says(bits: int) -> None:
    weight, shape = random_weight(3, 300, bits, 1, bits), layout(bits)
    data = planes(weight.codes, bits).view(-1, shape.pieces, 3, shape.inner)
    assert data.shape[0] == -(-300 // shape.tile)
    for n, k in ((0, 0), (2, 31), (1, 32), (0, 129), (2, 255), (1, 299)):
        (tile, inside), code, first = divmod(k, shape.tile), 0, 0
        turn, lane = divmod(inside, shape.inner)
        for low, width in cut(bits):
            per = 8 // width
            byte = int(data[tile, first + turn // per, n, lane])
            code |= (byte >> turn % per * width & (2**width - 1)) << low
            first += shape.turns // per
        assert (code - 2 ** (bits - 1) if bits < 8 else code - 256 * (code >> 7)) == weight.codes[n, k]
    packed, e = from_packed(pack(weight).numpy(), weight.exponents.numpy(), 3, bits)
    assert np.array_equal(packed, planes(weight.codes, bits).numpy())
    assert packed.dtype == e.dtype == np.uint8


def test_shifts_and_refusals() -> None:
    assert shifts(torch.tensor([0, 3, 1], dtype=torch.uint8)).tolist() == [3, 0, 2]
    with pytest.raises(UsageError, match="groups <= 8"):
        shifts(torch.tensor([0, GROUPS], dtype=torch.uint8))
    with pytest.raises(UsageError, match="int8"):
        planes(torch.zeros(3, dtype=torch.int8), 4)
    weight = random_weight(5, 9, 4, 2)
    with pytest.raises(UsageError, match="bytes"):
        from_packed(pack(weight).numpy()[:-1], weight.exponents.numpy(), 5, 4)


# -- instructions ------------------------------------------------------------------------------------------------------


def _executed(text: str, given: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """What the PTX leaves in $0, of 32-bit registers as uint32 arrays; only the instructions that decoding needs."""
    registers: dict[str, np.ndarray[Any, Any]] = {f"${1 + i}": v for i, v in enumerate(given)}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    two = {"and.b32": operator.and_, "or.b32": operator.or_, "xor.b32": operator.xor, "sub.u32": operator.sub}
    two |= {"shl.b32": operator.lshift, "shr.u32": operator.rshift, "mul.lo.u32": operator.mul}
    for line in text.splitlines():
        if not (found := re.fullmatch(r"([\w.]+) (\S+), (.*);", line)) or found[1] == ".reg":
            continue
        name, target, rest = found[1], found[2], [value(v.strip()) for v in found[3].split(",")]
        if name in two:
            registers[target] = two[name](*rest)
        elif name == "mov.b32":
            registers[target] = rest[0]
        elif name == "lop3.b32":
            a, b, c, table = rest
            terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
            registers[target] = functools.reduce(operator.or_, terms)
        elif name == "prmt.b32":
            a, b, selector = rest
            pool = [(v >> 8 * i) & 255 for v in (a, b) for i in range(4)]
            picked = [(pool[int(s) & 7], int(s) & 8) for s in (selector >> 4 * i & 15 for i in range(4))]
            parts = [(np.where(v & 128, 255, 0) if sign else v).astype(np.uint32) << 8 * i for i, (v, sign) in enumerate(picked)]
            registers[target] = functools.reduce(operator.or_, parts)
        else:
            raise AssertionError(line)
    return registers["$0"]


@pytest.mark.parametrize("bits", [pytest.param(b, id=f"{b}bit") for b in BITS])
@pytest.mark.parametrize("groups", [pytest.param(g, id=f"{g}groups") for g in range(1, GROUPS + 1)])
def test_instructions_decode_what_the_planes_hold(bits: int, groups: int) -> None:
    from normfuse.gpu.kernels import decode

    shape = layout(bits)
    weight = random_weight(40, shape.tile, bits, groups, bits)
    data = planes(weight.codes, bits).numpy().reshape(shape.pieces, 40, shape.inner)
    s = shifts(weight.exponents).numpy().reshape(shape.turns, 1, shape.inner)
    operand = (weight.codes.numpy().astype(np.int32) << shifts(weight.exponents).numpy()).reshape(40, shape.turns, shape.inner)
    for turn in range(shape.turns):
        first, given = 0, []
        for _, width in cut(bits):
            given.append(data[first + turn * width // 8].view(np.uint32))
            first += shape.turns * width // 8
        exponent = np.ascontiguousarray(s[turn]).view(np.uint32)
        given += [_executed(decode.mask_instructions(j), [exponent]) for j in range((groups - 1).bit_length())]
        assert decode.constraints(bits, groups).split(",") == ["=r"] + ["r"] * len(given)
        low, high = (
            np.ascontiguousarray(np.broadcast_to(v, (40, shape.inner // 4))).view(np.int8).astype(np.int32)
            for v in (_executed(decode.instructions(bits, groups, turn, high), given) for high in (False, True))
        )
        if bits + groups <= 9:
            assert np.array_equal(low, operand[:, turn])
        else:
            assert np.array_equal(128 * high + low, operand[:, turn])
            assert low.min() >= 0
