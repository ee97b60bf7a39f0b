"""Layers that can be quantized, as they are found in a graph, and why others cannot."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from normfuse.ir import views
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import MatMul, Value
from normfuse.passes.quantize.layers.conv2d import CONV2D
from normfuse.passes.quantize.layers.embedding import EMBEDDING
from normfuse.passes.quantize.layers.layer import Handler, Layer, Product
from normfuse.passes.quantize.layers.linear import LINEAR, MATMUL
from normfuse.quant.scheme import Scheme

__all__ = ["HANDLERS", "by_input", "find_layers", "products", "reread"]

L = TypeVar("L", bound=Layer)

#: How each view becomes a layer.
HANDLERS: Mapping[type[Value], Handler] = {
    views.Linear: LINEAR,
    views.Addmm: LINEAR,
    views.MatMul: MATMUL,
    views.Conv: CONV2D,
    views.Embedding: EMBEDDING,
}

aten = torch.ops.aten

_WEIGHTED = {  # operators with weights for which there is no integer form, or whose weight has turned out not to be constant
    aten.linear.default, aten.addmm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input, aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx,
    aten.bilinear.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.lstm_cell.default,
    aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default,
}  # fmt: skip
_PRODUCTS = {
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten._grouped_mm.default,
}  # fmt: skip
"""Products of what they are given: layers only where one factor is a weight."""


def find_layers(
    graph: Graph, scheme: Scheme, handlers: Mapping[type[Value], Handler] = HANDLERS
) -> tuple[list[Layer], list[tuple[fx.Node, str, Refuse]]]:
    """The layers in execution order, and the nodes with weights that stay in float: (node, kind, why).

    Args:
        graph: in float.
        scheme: says what is kept, and what is particular to a layer.
        handlers: how each view becomes a layer; a view without one stays in float.
    """
    found: list[Layer] = []
    refused: list[tuple[fx.Node, str, Refuse]] = []
    for node in graph:
        op = graph.view(node, 2)
        weighted = node.target in _WEIGHTED or (_may_multiply(node) and _has_weight(graph, node, op))
        if not (node.op == "call_function" and (weighted or op.weight is not None)):
            continue
        path, handler = graph.path(node), handlers.get(type(op))
        try:
            if handler is None:
                raise Refuse(_opaque(node))
            layer = handler.read(node, op, path, scheme.at(path))  # type: ignore[arg-type]
            layer.check()
            if (pattern := scheme.kept(path)) is not None:
                raise Refuse(f"kept in float by keep={pattern!r}")
        except Refuse as refusal:
            refused.append((node, "linear" if handler is None else handler.kind, refusal))
            continue
        found.append(_with_epilogue(layer))
    return found, refused


def _may_multiply(node: fx.Node) -> bool:
    """By a weight: an operator of a library other than PyTorch does whatever it likes (experts, deformable convolutions)."""
    foreign = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims", "normfuse")
    return foreign or node.target in _PRODUCTS


def _has_weight(graph: Graph, node: fx.Node, op: Value) -> bool:
    """Is a matrix among its factors, or several? A constant vector, as the frequencies of rotary positions, is none."""
    if isinstance(op, MatMul):
        if isinstance(op.y, Constant) and op.y.ndim == 2:
            return True
        held = [c for c in (op.x, op.y) if isinstance(c, Constant)]
    else:
        added = node.args[0] if node.target is aten.baddbmm.default else None
        held = [c for n in node.all_input_nodes if n is not added and (c := graph.constant(n)) is not None]
    return any(c.ndim >= 2 and min(c.shape[-2:]) > 1 and c.dtype.is_floating_point for c in held)


def _opaque(node: fx.Node) -> str:
    op: Any = node.target
    name = op._schema.name.removeprefix("aten::")
    if name in ("linear", "addmm", "conv1d", "conv2d", "embedding"):
        return "its weight is computed when the model runs"
    return f"there is no integer form of {name}"


def _with_epilogue(layer: Layer) -> Layer:
    """act(layer(x)) is one operator where nobody else reads layer(x)."""
    users = list(layer.node.users)
    if not isinstance(layer, Product) or len(users) != 1:
        return layer
    (user,) = users
    name = _activation(user)
    return layer if name is None else dataclasses.replace(layer, epilogue=name, tail=user)


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


def reread(graph: Graph, layer: L) -> L:
    """The layer with the weight and the bias that its node has now."""
    w = graph.view(layer.node, 2).weight
    return layer if w is None else dataclasses.replace(layer, weight=w.value, bias=w.bias)


def products(layers: Iterable[Layer]) -> list[Product]:
    """Those that multiply activations."""
    return [layer for layer in layers if isinstance(layer, Product)]


def by_input(layers: Iterable[Layer]) -> Iterator[tuple[tuple[fx.Node, int], list[Product]]]:
    """Layers that read the same channels of the same value."""
    groups: dict[tuple[fx.Node, int], list[Product]] = {}
    for layer in products(layers):
        groups.setdefault((layer.x, layer.axis), []).append(layer)
    yield from groups.items()
