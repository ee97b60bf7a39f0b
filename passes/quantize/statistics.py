"""What calibration remembers of the values that a layer reads: per channel, of constant size, and mergeable.

Absolute values are counted in 32 logarithmic bins an octave, so that one pass over the data gives percentiles and squared
errors to a few percent without knowing the range before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.layers.find import by_input
from normfuse.passes.quantize.layers.layer import Layer, Product
from normfuse.passes.quantize.probe import accumulate

__all__ = ["Statistics", "bin_tops", "collect", "second_moments"]

_BINS_AN_OCTAVE = 32
_LOWEST = -40  # log₂ of the smallest value with a bin of its own
_BINS = _BINS_AN_OCTAVE * 64
_HEAD = 2  # count and number of values that are not finite
_HESSIANS = 1 << 29  # bytes of second moments that are held at once


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the values that a layer reads, over the calibration data of all ranks; C channels.

    Attributes:
        count: values of each channel.
        bad: how many values were NaN or Inf.
        absmax: max |x| of each channel, float64 [C].
        mean: of each channel.
        power: mean x² of each channel.
        histogram: number of values in each logarithmic bin of |x|, float64; empty if it was not asked for.
    """

    count: int
    bad: int
    absmax: Tensor
    mean: Tensor
    power: Tensor
    histogram: Tensor

    def scaled(self, factor: Tensor) -> Statistics:
        """Of x · factor, factor [C] powers of two; the histogram is lost."""
        f = factor.double()
        return Statistics(self.count, self.bad, self.absmax * f, self.mean * f, self.power * f.square(), self.histogram[:0])


def collect(graph: Graph, samples: Samples, layers: Sequence[Layer], histograms: bool) -> dict[tuple[fx.Node, int], Statistics]:
    """Statistics of what the layers read, by value and channel axis; empty without samples."""
    keys = [key for key, _ in by_input(layers)]
    found = accumulate(
        graph,
        samples,
        [(node, partial(_measured, axis=axis, histogram=histograms)) for node, axis in keys],
        partial(_merged, bins=_BINS if histograms else 0),
        label="calibrate",
    )
    return {key: _unpacked(t, _BINS if histograms else 0) for key, t in zip(keys, found, strict=bool(found))}


def second_moments(graph: Graph, samples: Samples, layers: Sequence[Product]) -> dict[Product, Tensor]:
    """Σ x xᵀ / rows of what each output of a layer is a product of: float64 (conv groups, K, K).

    Layers are taken in turns when their matrices would not fit together into half a gigabyte.
    """
    found: dict[Product, Tensor] = {}
    for turn in _turns(layers):
        sums = accumulate(graph, samples, [(layer.x, partial(_outer, layer=layer)) for layer in turn], label="second moments")
        found |= {layer: t[:, :-1] / t[:, -1:, :1].clamp_min(1) for layer, t in zip(turn, sums, strict=bool(sums))}
    return found


def bin_tops() -> Tensor:
    """The largest |x| of each bin."""
    return torch.exp2((torch.arange(_BINS, dtype=torch.float64) + 1) / _BINS_AN_OCTAVE + _LOWEST)


def _measured(x: Tensor, axis: int, histogram: bool) -> Tensor:
    """count, bad, Σ x, Σ x², the histogram, max |x|, in one vector."""
    rows = x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()
    good = rows.isfinite()
    bad = int((~good).sum())
    rows = torch.where(good, rows, 0.0) if bad else rows
    absolute = rows.abs()
    head = torch.tensor([float(len(rows)), float(bad)], dtype=torch.float64, device=x.device)
    bins = [_histogram(absolute)] if histogram else []
    largest = absolute.amax(0) if len(rows) else rows.new_zeros(rows.shape[1])
    return torch.cat([head, rows.sum(0), rows.square().sum(0), *bins, largest])


def _histogram(absolute: Tensor) -> Tensor:
    index = ((absolute.log2() - _LOWEST) * _BINS_AN_OCTAVE).clamp(0, _BINS - 1).long()
    return torch.bincount(index.flatten(), minlength=_BINS).double()


def _merged(a: Tensor, b: Tensor, bins: int) -> Tensor:
    channels = (a.numel() - _HEAD - bins) // 3
    return torch.cat([(a + b)[:-channels], torch.maximum(a[-channels:], b[-channels:])])


def _unpacked(t: Tensor, bins: int) -> Statistics:
    t = t.cpu()
    c = (t.numel() - _HEAD - bins) // 3
    count, bad = int(t[0]), int(t[1])
    total, power, histogram, absmax = t[_HEAD:].split([c, c, bins, c])
    return Statistics(count, bad, absmax, total / max(count, 1), power / max(count, 1), histogram)


def _outer(x: Tensor, layer: Product) -> Tensor:
    """Σ x xᵀ over the rows, and a last line whose first number is how many there were."""
    rows = layer.rows(x).double()
    count = rows.new_zeros(rows.shape[0], 1, rows.shape[2])
    count[..., 0] = rows.shape[1]
    return torch.cat([rows.transpose(1, 2) @ rows, count], 1)


def _turns(layers: Sequence[Product]) -> list[list[Product]]:
    turns: list[list[Product]] = []
    room = 0
    for layer in layers:
        need = 8 * layer.groups * (layer.taps * layer.channels) ** 2
        if not turns or need > room:
            turns.append([])
            room = _HESSIANS
        turns[-1].append(layer)
        room -= need
    return turns
