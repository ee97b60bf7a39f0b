"""`ShiftQuantConv2d`: a convolution of codes; one scale an image, or a static one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from normfuse.export.ops.activations import ZERO, dynamic_codes, static_codes
from normfuse.export.ops.emitter import Emitter, Op, number
from normfuse.export.ops.products import finished, named, shifted
from normfuse.export.ops.weights import GROUPS, unpacked, weight_words
from normfuse.quant.packing import packed_bytes, unpack

__all__ = ["SHIFTQUANT_CONV2D", "conv_codes", "conv_parts"]


def conv_codes(
    packed: np.ndarray[Any, Any], exponents: np.ndarray[Any, Any], n: int, bits: int, group: int, kernel: tuple[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """C as int32 (N, C / group, kh, kw), and the shift E − e of each output and input channel, int32 (N, C / group, 1, 1)."""
    taps, each, start = kernel[0] * kernel[1], n // group, 0
    codes, shifts = [], []
    for e in np.split(exponents, group):
        columns = np.tile(e, taps)
        size = packed_bytes(each, bits, np.bincount(columns).tolist())
        c = unpack(torch.tensor(packed[start : start + size]), bits, torch.tensor(columns), each).numpy()
        codes.append(c.astype(np.int32).reshape(each, *kernel, e.size).transpose(0, 3, 1, 2))
        shifts.append(np.broadcast_to(e.max() - e.astype(np.int32), (each, e.size)))
        start += size
    return np.concatenate(codes), np.concatenate(shifts)[:, :, None, None]


def conv_parts(
    codes: np.ndarray[Any, Any], shifts: np.ndarray[Any, Any], bits: int
) -> tuple[tuple[np.ndarray[Any, Any], int], ...]:
    """C << (s − low) for the channels whose shift s lies in low … low + 8 − bits, else 0; and low, for each part that is not 0."""
    width, found = max(1, 9 - bits), []
    for low in range(0, int(shifts.max(initial=0)) + 1, width):
        mine = (shifts >= low) & (shifts < low + width)
        if mine.any():
            found.append((np.where(mine, codes << np.where(mine, shifts - low, 0), 0), low))
    return tuple(found)


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = act(s[image] · scale[n] · Σ_{c, taps} A · (C << (E − e[c])) + bias[n])"""
    x, weight, exponents, scale, bias = inputs
    static, double = facts["input_scale"], facts.get("double", False)
    x = at.op("Cast", x, to=1) if double else x
    if static is None:
        codes, image_scale = dynamic_codes(at, x, facts["activation_bits"], (1, 2, 3))
    else:
        codes, image_scale = static_codes(at, x, static, facts["activation_bits"]), static
    known, e, factors = at.known(weight), at.known(exponents), at.known(scale)
    if known is not None and e is not None and factors is not None:
        values = conv_codes(known, e, factors.size, facts["bits"], facts["group"], facts["kernel"])
        found = [(at.const((v + 128).astype(np.uint8)), shift) for v, shift in conv_parts(*values, facts["bits"])]
    else:
        found = _unpacked(at, weight, exponents, scale, facts)
    names = ("strides", "pads", "dilations", "group")
    acc = None
    for operand, shift in found:
        # ONNX Runtime multiplies a convolution as weights · columns: uint8 on both sides is what its kernels take exactly
        one = at.op("ConvInteger", codes, operand, at.const(ZERO), at.const(ZERO), **{k: facts[k] for k in names})
        one = shifted(at, one, shift)
        acc = one if acc is None else at.op("Add", acc, one)
    channels = at.const(np.array([-1, 1, 1], np.int64))
    scale = at.op("Reshape", scale, channels)
    bias = None if bias is None else at.op("Reshape", bias, channels)
    image_scale, scale = (at.op("Cast", s, to=11) if double else s for s in (image_scale, scale))
    return (finished(at, acc, at.op("Mul", image_scale, scale), bias, facts["epilogue"], double=double),)


def _unpacked(at: Emitter, weight: Any, exponents: Any, scale: Any, facts: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """The same for one group of channels, in nodes."""
    kernel, bits, groups = number(at, facts["kernel"]), facts["bits"], facts["groups"]
    taps = at.op("ReduceProd", kernel, keepdims=1)  # [1]
    columns = at.op("Tile", exponents, taps)
    codes = unpacked(at, weight, columns, at.op("Shape", scale), bits, groups)  # (taps · C, N)
    shape = at.op("Concat", kernel, at.const(np.array([-1], np.int64)), at.op("Shape", scale), axis=0)
    codes = at.op("Transpose", at.op("Reshape", codes, shape), perm=[3, 2, 0, 1])
    found, width = [], max(1, 9 - bits)
    for low in range(0, groups, width):
        shift = [groups - 1 - e - low for e in range(groups)]
        factor = np.array([2**s if 0 <= s < width else 0 for s in shift], np.int32).reshape(-1, 1, 1)
        value = at.op("Mul", codes, at.op("Gather", at.const(factor), at.op("Cast", exponents, to=6), axis=0))
        found.append((at.op("Cast", at.op("Add", value, at.const(np.int32(ZERO))), to=2), low))
    return found


SHIFTQUANT_CONV2D = Op(
    "ShiftQuantConv2d",
    ("shiftquant_conv2d",),
    ("x", "weight", "exponents", "scale", "bias?"),
    ("y",),
    {
        "bits": "INT",
        "activation_bits": "INT",
        "kernel": "INTS",
        "strides": "INTS",
        "pads": "INTS",
        "dilations": "INTS",
        "group": "INT",
        "epilogue": "STRING",
        "input_scale": "FLOAT",
    },
    _expand,
    facts={
        "strides": lambda call: call.attributes["stride"],
        "pads": lambda call: (call.attributes["padding"] * 2)[:4],
        "dilations": lambda call: call.attributes["dilation"],
        "group": lambda call: call.attributes["groups"],
    },
    structure=GROUPS,
    words=lambda facts: (*weight_words(facts), named(facts["epilogue"]), "static" if facts["input_scale"] else ""),
    told=("bits", "epilogue", "input_scale"),
)
