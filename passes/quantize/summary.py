"""What the report says about each layer: bits, shifts, errors, bytes and speed, and what stayed in float."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.passes.quantize.coded import Coded
from normfuse.passes.quantize.measure import Measured
from normfuse.passes.quantize.speed import Speed
from normfuse.reports.model import LayerQuantization

__all__ = ["PACKED", "Sensitivity", "constant_bytes", "kept", "packed_surplus", "quantized", "whole"]

Sensitivity = tuple[tuple[int, float], ...]
"""(bits, SQNR of the outputs with the layer alone quantized)."""

PACKED: dict[Any, Callable[[fx.Node, list[Constant | None]], dict[int, int]]] = {}
"""By operator: (node, the constants among its arguments) -> how many more values each has than the parameter that it holds."""


def constant_bytes(graph: Graph) -> int:
    """Of all constants that the graph reads."""
    return _bytes(graph.constants.values())


def quantized(
    coded: Coded, measured: Measured | None, speed: Speed | None, sensitivity: Sensitivity, original: Iterable[Constant]
) -> LayerQuantization:
    """The entry of a layer in few bits; `original` are its weight and bias in float."""
    return LayerQuantization(
        coded.layer.path,
        coded.layer.kind,
        coded.layer.shape,
        coded.bits,
        coded.activation_bits,
        coded.activations,
        coded.channels_by_exponent,
        None if measured is None else measured.sqnr,
        None if measured is None else measured.clipped,
        _bytes(original),
        coded.bytes,
        None if speed is None else speed.ratio,
        speed is not None and speed.measured,
        sensitivity=sensitivity,
    )


def kept(
    graph: Graph, node: fx.Node, kind: str, refusal: Refuse, speed: Speed | None, sensitivity: Sensitivity
) -> LayerQuantization:
    """The entry of a layer that stays in float."""
    held = [c for n in node.all_input_nodes if (c := graph.constant(n)) is not None]
    weight = max(held, key=lambda c: c.numel, default=None)
    return LayerQuantization(
        graph.path(node),
        kind,
        () if weight is None else tuple(weight.shape),
        bytes_before=_bytes(held),
        bytes_after=_bytes(held),
        speedup=None if speed is None else speed.ratio,
        measured=speed is not None and speed.measured,
        kept=refusal.reason,
        sensitivity=sensitivity,
    )


def whole(before: int, after: int, sqnr: float | None) -> LayerQuantization:
    """The entry of the whole model: SQNR of its outputs on the calibration data, bytes of all that it holds."""
    return LayerQuantization("outputs", "model", sqnr=sqnr, bytes_before=before, bytes_after=after)


def packed_surplus(graph: Graph) -> int:
    """How many more values the graph's constants have than its parameters: a packed byte is none, an exponent is none."""
    surplus: dict[int, int] = {}
    for node in graph:
        if node.target in PACKED:
            surplus |= PACKED[node.target](node, [graph.constant(a) if isinstance(a, fx.Node) else None for a in node.args])
    return sum(surplus.values())


def _bytes(held: Iterable[Constant]) -> int:
    return sum(math.prod(c.shape) * c.dtype.itemsize for c in held)
