"""Quantized weights for the tests of operators, and the native kernels against the definitions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from normfuse import native
from normfuse.quant.packing import pack, pack_groups, pack_multipliers
from normfuse.quant.weight import QuantizedWeight, largest_multiplier

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


@dataclass(frozen=True)
class Packed:
    """The arguments that an operator takes, and the integers behind them."""

    weight: Tensor
    exponents: Tensor
    scale: Tensor
    bias: Tensor
    bits: int
    operand: Tensor  # int64 [N, K]; of a convolution [groups, N / groups, K]
    multipliers: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.exponents, self.scale, self.bias


def random_weight(n: int, k: int, bits: int, groups: int, seed: int = 0, channels: int | None = None) -> QuantizedWeight:
    """Random codes; columns that are `channels` apart share their exponent."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (n, k), generator=generator, dtype=torch.int8)
    channels = k if channels is None else channels
    exponents = torch.randint(0, groups, (channels,), generator=generator).to(torch.uint8).repeat(k // channels)
    scale = torch.rand(n, generator=generator) / (top * 2.0 ** (groups - 1) * k**0.5) + 1e-6
    return QuantizedWeight(codes, exponents, scale, bits)


def linear(n: int, k: int, bits: int = 4, groups: int = 4, seed: int = 0) -> Packed:
    weight = random_weight(n, k, bits, groups, seed)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1))
    return Packed(pack(weight), weight.exponents, weight.scale, bias, bits, weight.operand().long())


def in_blocks(n: int, k: int, bits: int = 4, block: int = 32, seed: int = 0) -> Packed:
    """A weight whose blocks have multipliers; its codes are all that their bits can say."""
    plain = random_weight(n, k, bits, 1, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    most, shape = largest_multiplier(bits), (n, -(-k // block))
    m = torch.randint(1, most + 1, shape, generator=generator) * (1 - 2 * torch.randint(0, 2, shape, generator=generator))
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=generator, dtype=torch.int8)
    weight = dataclasses.replace(plain, codes=codes, multipliers=m.to(torch.int8), block=block)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1))
    packed = pack_multipliers(m.to(torch.int8))
    return Packed(pack(weight), weight.exponents, weight.scale / most, bias, bits, weight.operand().long(), packed)


def convolution(
    out: int, channels: int, kernel: tuple[int, int], bits: int = 4, exponents: int = 4, groups: int = 1, seed: int = 0
) -> Packed:
    taps, each = kernel[0] * kernel[1], channels // groups
    weights = [random_weight(out // groups, taps * each, bits, exponents, seed + 17 * g, each) for g in range(groups)]
    bias = torch.randn(out, generator=torch.Generator().manual_seed(seed + 1))
    return Packed(*pack_groups(weights, taps), bias, bits, torch.stack([w.operand().long() for w in weights]))


def rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """q, int64, and scale, written out for finite x that is not zero."""
    top = 2 ** (bits - 1) - 1
    largest = x.float().abs().amax(-1, keepdim=True)
    return (x.float() * (top / largest)).round().clamp(-top, top).long(), (largest / top).double()
