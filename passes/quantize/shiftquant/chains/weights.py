"""The weights of a convolution of codes: integers within int8 after their shifts, and floats in units of the codes it writes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

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

_WIDEST = 9  # bits of a code and different exponents: int8 behind the shift


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
    """

    folder: str
    integers: Integers
    scale: Tensor
    bias: Tensor
    table: Tensor | None
    limits: tuple[int, int]
    residual_scale: float

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
    groups = min(layer.spec.groups, _WIDEST - bits)
    spec = dataclasses.replace(layer.spec, groups=groups, observer="minmax", overrides=())
    if layer.channels == 1 and layer.groups > 1:
        return _depthwise(layer, spec)
    coded = encode_product(dataclasses.replace(layer, spec=spec), found, second, bits=bits)
    shifts = [w.groups - 1 - w.exponents[: layer.channels].int() for w in coded.weights]
    codes = torch.cat([w.codes for w in coded.weights])
    scale = torch.cat([w.scale for w in coded.weights]).double()
    return Integers(codes, torch.cat(shifts).to(torch.uint8), scale, bits)


def _depthwise(layer: Conv2d, spec: ShiftQuant) -> Integers:
    """All channels as the rows of one matrix."""
    spec = dataclasses.replace(spec, groups=1, exponents="range", rounding="nearest")
    weight = quantize_weight(layer.matrix().reshape(layer.outputs, -1), spec)
    return Integers(weight.codes, torch.zeros(layer.groups, dtype=torch.uint8), weight.scale.double(), weight.bits)


def floats(
    given: Integers, bias: Tensor | None, reads: Range, writes: Range, residual: Range | None
) -> tuple[Tensor, Tensor, float]:
    """Scale, bias and the residual's scale in units of the codes that are written; the bias holds their zero points."""
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
