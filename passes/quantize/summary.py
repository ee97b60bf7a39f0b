"""What the report says about each layer: bits, shifts, errors, bytes and speed, and what stayed in float."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.passes.quantize.coded import Coded
from normfuse.passes.quantize.measure import Measured
from normfuse.passes.quantize.sites import Layer
from normfuse.passes.quantize.speed import Speed
from normfuse.passes.quantize.widths import Choice
from normfuse.reports.model import LayerQuantization

__all__ = ["constant_bytes", "kept", "packed_surplus", "quantized", "whole"]

ops = torch.ops.normfuse


def constant_bytes(graph: Graph) -> int:
    """Of all constants that the graph reads."""
    return _bytes(graph.constants.values())


def quantized(
    coded: Coded, measured: Measured | None, speed: Speed | None, choice: Choice | None, original: Iterable[Constant]
) -> LayerQuantization:
    """The entry of a layer in integers; `original` are its weight and bias in float."""
    layer, embedding = coded.layer, coded.layer.kind == "embedding"
    return LayerQuantization(
        layer.path,
        layer.kind,
        _shape(layer),
        coded.bits,
        None if embedding else coded.activation_bits,
        "" if embedding else layer.spec.activations,
        coded.channels_by_exponent,
        None if measured is None else measured.sqnr,
        None if measured is None else measured.clipped,
        _bytes(original),
        coded.bytes,
        None if speed is None else speed.ratio,
        speed is not None and speed.measured,
        sensitivity=() if choice is None else choice.sensitivity,
    )


def kept(graph: Graph, node: fx.Node, kind: str, refusal: Refuse, speed: Speed | None, choice: Choice | None) -> LayerQuantization:
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
        sensitivity=() if choice is None else choice.sensitivity,
    )


def whole(before: int, after: int, sqnr: float | None) -> LayerQuantization:
    """The entry of the whole model: SQNR of its outputs on the calibration data, bytes of all that it holds."""
    return LayerQuantization("outputs", "model", sqnr=sqnr, bytes_before=before, bytes_after=after)


def packed_surplus(graph: Graph) -> int:
    """How many more values the graph's constants have than its parameters: a packed byte is none, an exponent is none."""
    surplus: dict[int, int] = {}
    for node in graph:
        held = [graph.constant(a) if isinstance(a, fx.Node) else None for a in node.args]
        match node.target:
            case ops.shiftquant_embedding.default:
                codes, dim = held[1], node.args[3]
                if codes is not None and isinstance(dim, int):
                    surplus[id(codes)] = codes.numel - codes.shape[0] * dim
            case ops.shiftquant_linear.default | ops.shiftquant_conv2d.default:
                codes, exponents, scale = held[1:4]
                if codes is None or exponents is None or scale is None:
                    continue
                values = scale.numel * exponents.numel
                if node.target is ops.shiftquant_conv2d.default:
                    kernel: Any = node.args[8]
                    groups: Any = node.args[12]
                    values = values * math.prod(kernel) // groups
                surplus |= {id(codes): codes.numel - values, id(exponents): exponents.numel}
    return sum(surplus.values())


def _shape(layer: Layer) -> tuple[int, ...]:
    """(out, in), whatever the layout."""
    return tuple(reversed(layer.weight.shape)) if layer.transposed else tuple(layer.weight.shape)


def _bytes(held: Iterable[Constant]) -> int:
    return sum(math.prod(c.shape) * c.dtype.itemsize for c in held)
