"""How far a quantized layer is from the float one, on what it reads in the calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.numerics.compare import sqnr
from normfuse.passes.quantize.coded import Coded, CodedProduct
from normfuse.passes.quantize.layers.layer import Layer
from normfuse.passes.quantize.probe import accumulate

__all__ = ["Measured", "corrected", "measure"]

_BATCHES = 8  # each rank measures on so many of its batches: errors are averages over thousands of rows
_CHUNK = 1 << 22  # values of an output at a time
_SIGMAS = 2.0  # a mean error smaller than so many standard errors may be chance


@dataclass(frozen=True, eq=False)
class Measured:
    """The error of a layer's products, before bias and epilogue; N outputs.

    Attributes:
        count: rows (of a convolution: places).
        signal: Σ y².
        mean: mean of y − ŷ, float64 [N].
        noise: Σ (y − ŷ)² of each output, float64 [N].
        clipped: share of the values read that static integers clip.
    """

    count: int
    signal: float
    mean: Tensor
    noise: Tensor
    clipped: float

    @property
    def sqnr(self) -> float:
        """In dB."""
        return sqnr(self.signal, float(self.noise.sum()))


def measure(graph: Graph, samples: Samples, coded: Sequence[Coded]) -> dict[Layer, Measured]:
    """The errors of layers with activations; empty without samples."""
    layers = [c for c in coded if isinstance(c, CodedProduct)]
    sums = accumulate(graph, samples[:_BATCHES], [(c.layer.x, partial(_errors, coded=c)) for c in layers], label="measure")
    return {c.layer: _measured(t) for c, t in zip(layers, sums, strict=bool(sums))}


def corrected(coded: CodedProduct, found: Measured) -> tuple[CodedProduct, Measured]:
    """b + mean (y − ŷ): what quantization moved the mean of an output by goes into the bias, where it is more than chance."""
    if not coded.layer.spec.bias_correction or found.count < 2:
        return coded, found
    spread = (found.noise / found.count - found.mean.square()).clamp_min(0) / found.count
    shift = torch.where(found.mean.square() > _SIGMAS**2 * spread, found.mean, torch.zeros_like(found.mean))
    if not bool(shift.any()):
        return coded, found
    bias = shift if coded.bias is None else coded.bias.double() + shift
    better = dataclasses.replace(
        found, mean=found.mean - shift, noise=found.noise - found.count * (2 * shift * found.mean - shift.square())
    )
    return coded.with_bias(bias.float()), better


def _errors(x: Tensor, coded: CodedProduct) -> Tensor:
    """Rows, Σ y², values clipped, values, Σ (y − ŷ), Σ (y − ŷ)² in one vector.

    Rows of a linear are quantized each by itself, so that a few at a time give the same: a head writes as many values as a
    vocabulary has words.
    """
    layer = coded.layer
    weight = layer.matrix()
    total = torch.zeros(4 + 2 * layer.outputs, dtype=torch.float64)
    for part in layer.independent(x, _CHUNK):
        y = layer.reference(part, weight)
        d = (y - coded(part, bare=True)).double().movedim(layer.axis, -1).reshape(-1, layer.outputs)
        clipped = 0.0
        if coded.input_scale is not None:
            most = float(coded.input_scale) * (2 ** (coded.activation_bits - 1) - 0.5)
            clipped = float((part.abs() > most).sum())
        head = torch.tensor([len(d), float(y.double().square().sum()), clipped, part.numel()], dtype=torch.float64)
        total += torch.cat([head, d.sum(0).cpu(), d.square().sum(0).cpu()])
    return total


def _measured(t: Tensor) -> Measured:
    mean, noise = t[4:].chunk(2)
    count = int(t[0])
    return Measured(count, float(t[1]), mean / max(count, 1), noise, float(t[2] / t[3].clamp_min(1)))
