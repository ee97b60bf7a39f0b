"""Powers of two move from what layers read into their weights: x 2^-m through the gain in front, W 2^m, exactly the same product.

    W x = (W · 2^m) (2^-m · x),   m an integer for each input channel

A channel with outliers costs all others their resolution where a row shares one scale; in the weight it costs little, because
there every channel has a power of two of its own. The gain of a norm takes 2^-m for nothing, and so do the rows of a linear or
convolution in front, with no function or a ReLU between. After Xiao et al., SmoothQuant, arXiv 2211.10438, with powers of two, and
with the strength chosen by the measured error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import dtype_of
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Rewriting
from normfuse.ir.views import LayerNorm, RmsNorm
from normfuse.numerics.compare import sqnr
from normfuse.passes.quantize.layers.find import by_input, products
from normfuse.passes.quantize.layers.layer import Layer, Product
from normfuse.passes.quantize.probe import accumulate
from normfuse.passes.quantize.shiftquant.coded import Integers, encode_product
from normfuse.passes.quantize.statistics import Statistics
from normfuse.reports.model import Site

__all__ = ["migrate"]

RULE = "range_migration"

_STRENGTHS = (0.25, 0.5, 0.75)
_FLAT = 4.0  # largest over median range of a channel below which there is nothing to move
_FARTHEST = 6  # octaves
_BATCHES = 4
_FREE_GAIN = 0.1  # dB that a migration must win where the gain is there already
_NEW_GAIN = 0.5  # and where a norm gets a gain for it

Key = tuple[fx.Node, int]
Found = dict[Key, Statistics]


@dataclass(frozen=True, eq=False)
class _Carrier:
    """A value whose channels can be scaled at its source, and the layers that read it: all of its readers."""

    node: fx.Node
    axis: int
    readers: list[Product]
    producer: Product | None  # None: the source is a norm
    has_gain: bool


def migrate(work: Rewriting, layers: Sequence[Layer], found: Found) -> tuple[list[Layer], list[Site]]:
    """The layers after migration, and where it was done; the graph computes the same function as before.

    Args:
        work: on the graph, in which gains and weights are replaced.
        layers: all layers that will be quantized.
        found: statistics of what they read; without any, nothing moves.
    """
    graph = work.graph
    now = {layer.node: layer for layer in products(layers)}
    sites: list[Site] = []
    for carrier in _carriers(graph, layers):
        key = (carrier.node, carrier.axis)
        if key not in found or found[key].bad or not all(layer.spec.migration for layer in carrier.readers):
            continue
        current = dataclasses.replace(
            carrier,
            readers=[now[r.node] for r in carrier.readers],
            producer=None if carrier.producer is None else now[carrier.producer.node],
        )
        shift, before, after = _best(work, current, found[key])
        if shift is None or after - before < (_FREE_GAIN if current.has_gain else _NEW_GAIN):
            continue
        if not work.permits(RULE, carrier.node):
            continue
        site = graph.site(
            RULE, carrier.node, note=f"{int((shift != 0).sum())} of {len(shift)} channels moved by powers of two: "
            f"SQNR of what reads them {before:.1f} -> {after:.1f} dB"
        )  # fmt: skip
        now |= _moved(graph, current, shift, now)
        sites.append(site)
    return [now.get(layer.node, layer) for layer in layers], sites


def _carriers(graph: Graph, layers: Sequence[Layer]) -> list[_Carrier]:
    producers = {layer.tail: layer for layer in products(layers)}
    carriers = []
    for (node, axis), readers in by_input(layers):
        if {layer.node for layer in readers} != set(node.users) or any(graph.shared(r.weight) or r.groups > 1 for r in readers):
            continue
        op = graph.view(node, 2)
        if isinstance(op, (LayerNorm, RmsNorm)) and len(op.normalized) == 1 and axis == -1:
            carriers.append(_Carrier(node, axis, readers, None, op.gamma is not None))
        elif (
            (producer := producers.get(node)) is not None
            and producer.axis == axis
            and producer.epilogue in ("none", "relu")
            and not graph.shared(producer.weight)
        ):
            carriers.append(_Carrier(node, axis, readers, producer, True))
    return carriers


def _best(work: Rewriting, carrier: _Carrier, found: Statistics) -> tuple[Tensor | None, float, float]:
    """The shift with the least error of all readers together, that error without and with it, as SQNR; None for no shift."""
    shifts = _candidates(carrier, found)
    if not shifts:
        return None, 0.0, 0.0
    channels = len(found.absmax)
    trials: list[tuple[Tensor, list[Integers]]] = []
    for shift in (torch.zeros(channels, dtype=torch.float64), *shifts):
        try:
            trials.append((shift, [_trial(layer, shift, found) for layer in carrier.readers]))
        except Refuse:
            if not len(trials):
                return None, 0.0, 0.0
    (errors,) = accumulate(
        work.graph,
        work.run.samples[:_BATCHES],
        [(carrier.node, partial(_relative_errors, trials=trials, readers=carrier.readers))],
    ) or (torch.empty(0),)
    if not errors.numel():
        return None, 0.0, 0.0
    signal, noise = errors[:, 0], errors[:, 1:]
    ratios = (noise / signal.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).sum(0)
    best = int(ratios.argmin())
    count = len(carrier.readers)
    return trials[best][0] if best else None, sqnr(count, float(ratios[0])), sqnr(count, float(ratios[best]))


def _candidates(carrier: _Carrier, found: Statistics) -> list[Tensor]:
    """m = round(log₂ (a^α / w^(1-α))), a and w the ranges of a channel in activations and weights, from the median on."""
    a = found.absmax
    used = a > 0
    if not bool(used.any()) or float(a.max()) < _FLAT * float(a[used].median()):
        return []
    w = torch.stack([layer.matrix().abs().amax((0, 1)).reshape(layer.taps, -1).amax(0) for layer in carrier.readers]).amax(0)
    used &= w > 0
    shifts: list[Tensor] = []
    for strength in _STRENGTHS:
        m = torch.zeros_like(a)
        m[used] = strength * a[used].log2() - (1 - strength) * w[used].log2()
        m[used] = (m[used] - m[used].median()).round().clamp(-_FARTHEST, _FARTHEST)
        if bool(m.any()) and not any(torch.equal(m, s) for s in shifts):
            shifts.append(m)
    return shifts


def _trial(layer: Product, shift: Tensor, found: Statistics) -> Integers:
    """The codes of the moved weight; by rounding and without a histogram, which do not decide."""
    spec = dataclasses.replace(layer.spec, rounding="nearest", observer="minmax")
    moved = dataclasses.replace(layer, weight=layer.scaled(torch.exp2(shift)), spec=spec)
    return encode_product(moved, found.scaled(torch.exp2(-shift)), bits=spec.weight_bits)


def _relative_errors(x: Tensor, trials: Sequence[tuple[Tensor, list[Integers]]], readers: Sequence[Product]) -> Tensor:
    """For each reader Σ y² and, for each trial, Σ (y − ŷ)²."""
    rows = []
    for i, layer in enumerate(readers):
        y = layer.reference(x, layer.matrix()).double()
        row = [y.square().sum()]
        for shift, coded in trials:
            scaled = x * torch.exp2(-shift).to(x.dtype).reshape([-1] + [1] * (0 if layer.axis == -1 else x.ndim - 2))
            row.append((y - coded[i](scaled, bare=True).double()).square().sum())
        rows.append(torch.stack(row))
    return torch.stack(rows).cpu()


# -- rewriting -----------------------------------------------------------------------------------------------------------


def _moved(graph: Graph, carrier: _Carrier, shift: Tensor, now: dict[fx.Node, Product]) -> dict[fx.Node, Product]:
    """The graph with 2^-m at the source and 2^m in the readers; the layers that have changed."""
    changed: dict[fx.Node, Product] = {}
    source = carrier.node
    down, up = torch.exp2(-shift), torch.exp2(shift)
    if carrier.producer is None:
        source = _scaled_norm(graph, carrier.node, down)
    else:
        producer = carrier.producer
        weight = producer.scaled(down, outputs=True)
        bias = None if producer.bias is None else producer.bias * down
        changed[producer.node] = _rewritten(graph, producer, weight, bias)
    for layer in carrier.readers:
        layer = changed.get(layer.node, layer)
        moved = _rewritten(graph, layer, layer.scaled(up), layer.bias)
        changed[layer.node] = dataclasses.replace(moved, x=source)
    return changed


def _scaled_norm(graph: Graph, node: fx.Node, down: Tensor) -> fx.Node:
    op = graph.view(node, 2)
    assert isinstance(op, (LayerNorm, RmsNorm))
    fresh = Constant.of(down, f"{graph.path(node)}.weight").cast(dtype_of(node) or torch.float32)
    gamma = fresh if op.gamma is None else op.gamma * down
    moved = dataclasses.replace(op, node=None, gamma=gamma)
    if isinstance(moved, LayerNorm) and moved.beta is not None:
        moved = dataclasses.replace(moved, beta=moved.beta * down)
    new = graph.replace(node, moved)
    graph.fx.erase_node(node)
    return new


def _rewritten(graph: Graph, layer: Product, weight: Constant, bias: Constant | None) -> Product:
    for old, new in ((layer.weight, weight), (layer.bias, bias)):
        if old is None or new is None or old is new:
            continue
        reader = next(n for n in layer.node.all_input_nodes if graph.constant(n) is old)
        layer.node.replace_input_with(reader, graph.emit_constant(new, layer.node))
    return dataclasses.replace(layer, weight=weight, bias=bias)
