"""The weights of a convolution of codes: integers within int8 after their shifts, and floats in units of the codes it writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse import native
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.shiftquant.chains.ranges import Range
from normfuse.passes.quantize.shiftquant.coded import encode_product
from normfuse.passes.quantize.statistics import Statistics
from normfuse.quant.packing import pack_rows
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.spec import ShiftQuant

__all__ = ["CodedConv", "Integers", "floats", "integers"]

_WIDEST = 8  # bits of a code and different exponents: no shifted code is beyond 64, so that no pair is beyond `_PAIR`
_FEW = 8  # channels of an image whose kernel rows are read at once (native/codes/plan.cpp)
_PAIR = 128  # two weights of one sign beside each other: with codes up to 255 their products stay within 16 bits on AVX2


@dataclass(frozen=True, eq=False)
class Integers:
    """The weight of a convolution.

    Attributes:
        codes: int8 [O, taps · channels of a group].
        shifts: uint8 [channels].
        scale: float64 [O], of the shifted codes.
        bits: of a code.
    """

    codes: Tensor
    shifts: Tensor
    scale: Tensor
    bits: int

    def matrix(self, layer: Conv2d) -> Tensor:
        """What it is worth: float64 [groups, outputs, taps · channels of a group]."""
        codes = self.codes.double().reshape(layer.groups, -1, layer.taps, layer.channels)
        shifted = codes * (2.0 ** self.shifts.double()).reshape(layer.groups, 1, 1, layer.channels)
        return (shifted.flatten(2) * self.scale.reshape(layer.groups, -1, 1)).to(layer.weight.value.device)


@dataclass(frozen=True, eq=False)
class CodedConv:
    """A convolution of codes, but for what it reads.

    Attributes:
        folder: of its constants' names.
        integers: its weight.
        scale, bias: float32 [O], in units of the codes that it writes.
        table: uint8 [256], or None.
        limits: the least and the largest code.
        residual_scale: of a code of the residual.
        function, gain, offset: of `codes_conv2d`.
    """

    folder: str
    integers: Integers
    scale: Tensor
    bias: Tensor
    table: Tensor | None
    limits: tuple[int, int]
    residual_scale: float
    function: str = "none"
    gain: float = 1.0
    offset: float = 0.0

    @property
    def bits(self) -> int:
        return self.integers.bits

    @property
    def bytes(self) -> int:
        return sum(c.numel * c.dtype.itemsize for c in self.constants() if c is not None)

    def constants(self) -> tuple[Constant | None, ...]:
        """Weight, shifts, scale, bias and table."""
        named = {
            "codes": pack_rows(self.integers.codes, self.integers.bits), "shifts": self.integers.shifts, "scale": self.scale,
            "bias": self.bias, "table": self.table,
        }  # fmt: skip
        return tuple(None if t is None else Constant.of(t, f"{self.folder}.{name}") for name, t in named.items())


def integers(layer: Conv2d, found: Statistics | None, second: Tensor | None) -> Integers:
    """The weight as integers.

    Args:
        layer: the convolution.
        found: statistics of what it reads.
        second: its second moments, for rounding by them.

    Raises:
        Refuse: it must stay in float.
    """
    bits = layer.spec.weight_bits
    # what it reads has codes of its own: no scale is looked for
    groups = max(1, min(layer.spec.groups, _WIDEST - bits))
    spec = dataclasses.replace(layer.spec, groups=groups, observer="minmax", overrides=())
    if layer.channels == 1 and layer.groups > 1:
        return _depthwise(layer, spec)
    coded = encode_product(dataclasses.replace(layer, spec=spec), found, second, bits=bits)
    shifts = [w.groups - 1 - w.exponents[: layer.channels].int() for w in coded.weights]
    codes = torch.cat([w.codes for w in coded.weights])
    scale = torch.cat([w.scale for w in coded.weights]).double()
    given = Integers(codes, torch.cat(shifts).to(torch.uint8), scale, bits)
    return _paired(given, layer) if _in_pairs(spec) else given


def _depthwise(layer: Conv2d, spec: ShiftQuant) -> Integers:
    """All channels as the rows of one matrix."""
    spec = dataclasses.replace(spec, groups=1, block=0, exponents="range", rounding="nearest")
    weight = quantize_weight(layer.matrix().reshape(layer.outputs, -1), spec)
    given = Integers(weight.codes, torch.zeros(layer.groups, dtype=torch.uint8), weight.scale.double(), weight.bits)
    return _paired(given, layer) if _in_pairs(spec) else given


def _in_pairs(spec: ShiftQuant) -> bool:
    """Are weights to be kept within pairs? Only this machine's instruction set needs it, and only for its speed."""
    return bool(spec.prefer == "speed" and native.available() and native.isa() == "avx2")


def _paired(given: Integers, layer: Conv2d) -> Integers:
    """The same with no pair of weights beyond `_PAIR`: cut, or with a larger scale for the row, whichever errs less."""
    weight = layer.matrix().reshape(layer.outputs, -1)
    pairs = _pairs(layer, given.codes.double())
    beyond = (_same_sign(pairs) > _PAIR).flatten(1).any(1)
    if not bool(beyond.any()):
        return given
    larger = torch.maximum(given.scale, _same_sign(_pairs(layer, weight)).flatten(1).amax(1) / (_PAIR - 1))
    scale = torch.where(beyond, larger, given.scale).float().double()
    cut = _cut(given.codes, layer)
    again = _cut((weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), layer)
    errors = [(weight - c.double() * s[:, None]).square().sum(1) for c, s in ((cut, given.scale), (again, scale))]
    better = beyond & (errors[1] < errors[0])
    codes = torch.where(better[:, None], again, torch.where(beyond[:, None], cut, given.codes))
    return dataclasses.replace(given, codes=codes, scale=torch.where(better, scale, given.scale))


def _pairs(layer: Conv2d, rows: Tensor) -> Tensor:
    """The weights that kernels multiply in pairs (native/codes/plan.cpp): [outputs, count, 2], a copy."""
    height, width = layer.at.kernel
    rows = rows.reshape(len(rows), height, width, layer.channels)
    if layer.channels == 1 and layer.groups == layer.outputs > 1:
        rows = rows.permute(0, 2, 3, 1)  # rows of a column
    elif layer.groups == 1 and layer.at.dilation[1] == 1 and layer.channels <= _FEW:
        rows = rows.flatten(2)  # a row of the kernel at once
    even = torch.nn.functional.pad(rows, (0, rows.shape[-1] % 2))
    return even.reshape(len(rows), -1, 2).clone()


def _same_sign(pairs: Tensor) -> Tensor:
    """The larger sum of what is positive, or negative, of each pair."""
    return torch.maximum(pairs.clamp_min(0).sum(-1), -pairs.clamp_max(0).sum(-1))


def _cut(codes: Tensor, layer: Conv2d) -> Tensor:
    """The larger of two codes is cut to what the other leaves."""
    index = _pairs(layer, torch.arange(1, 1 + codes.shape[1], dtype=torch.float64).expand(1, -1))[0].long()
    pairs = _pairs(layer, codes.double())
    excess = (_same_sign(pairs) - _PAIR).clamp_min(0)
    first = pairs[..., 0].abs() >= pairs[..., 1].abs()
    pairs[..., 0] -= torch.where(first, excess * pairs[..., 0].sign(), torch.zeros_like(excess))
    pairs[..., 1] -= torch.where(first, torch.zeros_like(excess), excess * pairs[..., 1].sign())
    out = torch.zeros((len(codes), 1 + codes.shape[1]), dtype=torch.int8)
    out[:, index.flatten()] = pairs.flatten(1).to(torch.int8)
    return out[:, 1:]


def floats(
    given: Integers, bias: Tensor | None, reads: Range, writes: Range, residual: Range | None
) -> tuple[Tensor, Tensor, float]:
    """Scale, bias and the residual's scale in units of the codes that are written; the bias holds their zero points.

    `writes` is Range(1, 0, …) where what is computed is in units of the model.
    """
    scale = (given.scale * reads.scale / writes.scale).float()
    offset = torch.full((len(scale),), float(writes.zero), dtype=torch.float64)
    if bias is not None:
        offset = offset + bias.double() / writes.scale
    by = 0.0
    if residual is not None:
        by = float(torch.tensor(residual.scale / writes.scale, dtype=torch.float32))
        offset = offset - residual.zero * by
    if not bool((offset.abs() < 1e6).all()) or not bool(scale.isfinite().all()):
        raise Refuse("its bias is a million times larger than what it writes in the calibration data")
    return scale, offset.float(), by
