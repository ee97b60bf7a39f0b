"""By how much the integers of a convolution move the mean of each output: what bias correction adds to its bias."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.probe import accumulate
from normfuse.passes.quantize.shiftquant.chains.ranges import Range
from normfuse.passes.quantize.shiftquant.chains.weights import Integers

__all__ = ["mean_errors"]

_BATCHES = 8  # each rank measures on so many of its batches
_SIGMAS = 2.0  # a mean error smaller than so many standard errors may be chance


def mean_errors(graph: Graph, samples: Samples, coded: Mapping[Conv2d, tuple[Integers, Range]]) -> dict[Conv2d, Tensor]:
    """The mean of y − ŷ of each output, float64 [O], 0 where it may be chance; ŷ reads codes and multiplies integers.

    Both read what the float model computes, so that each layer answers for its own error alone.

    Args:
        graph: in float; it is not changed.
        samples: the batches of this rank.
        coded: the weight of each convolution, and what a code of its input is worth.
    """
    probes: list[tuple[fx.Node, partial[Tensor]]] = [(layer.x, partial(_sums, layer=layer, coded=c)) for layer, c in coded.items()]
    sums = accumulate(graph, samples[:_BATCHES], probes, label="bias correction")
    return {layer: _mean(t) for layer, t in zip(coded, sums, strict=bool(sums))}


def _sums(x: Tensor, layer: Conv2d, coded: tuple[Integers, Range]) -> Tensor:
    """Places, Σ (y − ŷ), Σ (y − ŷ)²: float64 [1 + 2 O]."""
    weight, reads = coded
    codes = (reads.code(x).to(x.dtype) - reads.zero) * reads.scale
    d = (layer.reference(x, layer.matrix()) - layer.reference(codes, weight.matrix(layer))).movedim(1, -1)
    d = d.reshape(-1, layer.outputs).double().cpu()
    return torch.cat([torch.tensor([float(len(d))], dtype=torch.float64), d.sum(0), d.square().sum(0)])


def _mean(sums: Tensor) -> Tensor:
    count = float(sums[0].clamp_min(1))
    mean, square = (sums[1:] / count).chunk(2)
    spread = (square - mean.square()).clamp_min(0) / count
    return torch.where(mean.square() > _SIGMAS**2 * spread, mean, torch.zeros_like(mean))
