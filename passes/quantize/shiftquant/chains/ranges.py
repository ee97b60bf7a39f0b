"""What a code is worth: one scale and zero point for each value between the steps of a chain, from the calibration data.

Values that are never negative have the zero point 0 and all codes above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.probe import accumulate
from normfuse.passes.quantize.reach import reaches
from normfuse.passes.quantize.shiftquant.chains.functions import Bounds
from normfuse.quant.spec import ShiftQuant

__all__ = ["Extent", "Range", "common", "extents", "range_of", "single"]

_BINS = 2048
_LEAST = float(np.finfo(np.float64).tiny)
_CLIPS = 40  # clipping points that are tried at each end, from the whole range down to a quarter of it


def single(value: float) -> float:
    """Rounded to float32: what operators take."""
    return float(np.float32(value))


@dataclass(frozen=True)
class Range:
    """A code u is worth (u − zero) · scale; codes are 0 … top."""

    scale: float
    zero: int
    top: int

    def limits(self, bounds: Bounds) -> tuple[int, int]:
        """The codes of the bounds, as far as there are such codes."""
        low = 0 if bounds.low is None else self._code(bounds.low)
        high = self.top if bounds.high is None else self._code(bounds.high)
        return low, max(low, high)

    def _code(self, value: float) -> int:
        return min(max(round(value / self.scale) + self.zero, 0), self.top)

    def code(self, x: Tensor) -> Tensor:
        """uint8 codes of values."""
        return (torch.round(x / self.scale) + self.zero).clamp(0, self.top).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Extent:
    """Of a value in the calibration data: from `low` to `high`, and how many lie in each of equal parts of that."""

    low: float
    high: float
    counts: Tensor

    def merged(self, other: Extent) -> Extent:
        """Of both values together."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Extent(low, high, self._spread(low, high) + other._spread(low, high))

    def _spread(self, low: float, high: float) -> Tensor:
        middles = self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (self.high - self.low) / _BINS
        index = ((middles - low) / max(high - low, _LEAST) * _BINS).long().clamp(0, _BINS - 1)
        return torch.zeros_like(self.counts).index_add_(0, index, self.counts)


def extents(graph: Graph, samples: Samples, nodes: Sequence[fx.Node]) -> dict[fx.Node, Extent]:
    """How far the values of nodes reach, on the calibration data.

    Raises:
        Refuse: one is NaN or infinite there.
    """
    found = reaches(graph, samples, nodes)
    if not found:
        raise Refuse("ranges of codes need calibration data", remedy="pass calibration=")
    for node, reach in found.items():
        if not reach.finite:
            raise Refuse(
                "what it computes holds NaN or Inf in the calibration data", blocker=node, remedy="look for an overflow before it"
            )
    bounds = [(r.low, r.high) if r.known else (0.0, 0.0) for r in found.values()]
    probes = [(n, partial(_counts, low=low, high=high)) for n, (low, high) in zip(nodes, bounds, strict=True)]
    counts = accumulate(graph, samples, probes, label="histograms")
    return {n: Extent(*b, c) for n, b, c in zip(nodes, bounds, counts, strict=True)}


def _counts(x: Tensor, low: float, high: float) -> Tensor:
    if high <= low:
        return torch.zeros(_BINS, dtype=torch.float64)
    return torch.histc(x.detach().float().cpu(), _BINS, low, high).double()


def common(groups: Iterable[Sequence[fx.Node]], nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """One node for all that must have the same range."""
    from networkx.utils import UnionFind

    joined = UnionFind(nodes)
    for group in groups:
        joined.union(*group)
    return {n: joined[n] for n in nodes}


def range_of(extent: Extent, spec: ShiftQuant, bits: int) -> Range:
    """The range of codes of `bits` bits for values like these, as the observer of the specification has it."""
    top = (1 << bits) - 1
    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    if high <= low:
        return Range(1.0, 0, top)
    if spec.observer == "percentile":
        low, high = _percentile(extent, spec.percentile)
    elif spec.observer == "mse":
        low, high = _least(extent, top)
    zero = min(max(round(-low * top / (high - low)), 0), top)
    scales = [(-low / zero) if zero else 0.0, (high / (top - zero)) if zero < top else 0.0]
    return Range(max(single(max(scales)), float(np.finfo(np.float32).tiny)), zero, top)


def _percentile(extent: Extent, percent: float) -> tuple[float, float]:
    """What lies outside at each end is at most (100 − percent) / 2 percent of all."""
    share = extent.counts.cumsum(0) / extent.counts.sum().clamp_min(1)
    outside = (1 - percent / 100) / 2
    width = (extent.high - extent.low) / _BINS
    low = extent.low + width * int((share < outside).sum()) if extent.low < 0 else 0.0
    high = extent.low + width * (1 + int((share < 1 - outside).sum())) if extent.high > 0 else 0.0
    return min(low, 0.0), max(min(high, extent.high), 0.0)


def _least(extent: Extent, top: int) -> tuple[float, float]:
    """The ends with the least squared error, one after the other."""
    width = (extent.high - extent.low) / _BINS
    x = extent.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
    factors = [1 - 0.75 * i / _CLIPS for i in range(_CLIPS)]

    def error(low: float, high: float) -> float:
        if high <= low:
            return math.inf
        step = (high - low) / top
        off = (x - x.clamp(low, high)).square()
        return float((extent.counts * torch.where(off > 0, off, torch.full_like(off, step * step / 12))).sum())

    low, high = min(extent.low, 0.0), max(extent.high, 0.0)
    high = min((high * f for f in factors), key=lambda h: error(low, h)) if high > 0 else high
    low = min((low * f for f in factors), key=lambda v: error(v, high)) if low < 0 else low
    return low, high


def merged(extents: Mapping[fx.Node, Extent], roots: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, Extent]:
    """The extent of each group, by its root."""
    found: dict[fx.Node, Extent] = {}
    for node, root in roots.items():
        found[root] = extents[node] if root not in found else found[root].merged(extents[node])
    return found
