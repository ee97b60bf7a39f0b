"""Softmax over an axis in front of others, in the layout that ONNX Runtime's CPU kernels are fast in.

    W softmax(x) + b  =  (W e) / Σ e + b,  e = exp(x − max x)              W a convolution of 1 × 1, softmax over its channels
    softmax(x, d)     =  unflatten(softmax(flatten(x, d + 1), d), d + 1)   more than one axis behind d

Its kernel takes rows: it swaps the axis with the last one, in front and behind, which goes element by element where more than
one axis lies behind, and in blocks where one does. The second identity is exact to the bit and holds for every dtype. The first
needs no rows at all: a maximum and a sum along an axis run over whole vectors, and there is one quotient an output instead of one
a channel. It is the expectation over bins by which detectors read distances (Li et al., *Generalized Focal Loss*, arXiv
2006.04388). Where it is the faster one was measured in ONNX Runtime on one and two threads; elsewhere it is refused.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import Add, Conv, Div, MatMul, Permute, Softmax, Sub, Sum, Value, shape_of
from normfuse.passes.affine.broadcast import hint
from normfuse.passes.fuse.norm_patterns import dtype_of

__all__ = ["DividedLast", "FlatSoftmax"]

aten = torch.ops.aten

_MOST_CHANNELS = 32  # of more, a maximum and a sum over the axis of one image cost more than copying it
_FEWEST_POSITIONS = 40  # of fewer, an operation of its own for each step costs more than it saves


class DividedLast(Pass):
    """W softmax(x) + b = (W e) / Σ e + b, in float32, where W is a convolution of 1 × 1 over the axis of the softmax."""

    name = "divided_last"
    leaves_affines = False

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """
        Raises:
            Refuse: somebody else reads the weights, they are in another precision, or it would be no faster.
        """
        match graph.view(node, 3):
            case Conv(Softmax(Value(node=fx.Node()) as x, dim) as weights) as conv if _is_product(conv) and x.rank is not None:
                assert weights.node is not None
                if dim % x.rank != 1 or x.rank != conv.W.ndim:
                    return None
            case _:
                return None
        if not weights.sole_use:
            raise Refuse("its weights are read elsewhere, too", blocker=weights.node)
        if {dtype_of(node), dtype_of(weights.node), dtype_of(_node(x))} != {torch.float32}:
            raise Refuse("it is not in float32 throughout")
        _check_faster(conv, x)
        return Change(do=partial(_divide_last, graph, node, conv, x))


def _is_product(conv: Conv) -> bool:
    """Is it one matrix, applied to the channels of every position?"""
    strides = (conv.stride,) if isinstance(conv.stride, int) else conv.stride
    return conv.groups == 1 and not conv.padded and all(s == 1 for s in (*strides, *conv.W.shape[2:]))


def _check_faster(conv: Conv, x: Value) -> None:
    outputs, channels = conv.W.shape[:2]
    if outputs >= channels:
        raise Refuse(f"its product has {outputs} outputs of {channels} channels: dividing them is no less work")
    if channels > _MOST_CHANNELS:
        raise Refuse(f"it has {channels} channels: of more than {_MOST_CHANNELS}, softmax is faster as one operator")
    assert x.shape is not None
    positions = prod(map(hint, x.shape[2:]))
    if positions < _FEWEST_POSITIONS:
        raise Refuse(f"it has {positions} positions: of fewer than {_FEWEST_POSITIONS}, softmax is faster as one operator")


def _lay_before_vectors(x: Permute) -> bool:
    """Were the channels the last axis but one before they were moved, with a long one behind them?"""
    assert x.shape is not None
    last = x.dims.index(len(x.dims) - 1)
    return x.dims[1] == len(x.dims) - 2 and hint(x.shape[last]) >= _FEWEST_POSITIONS


def _divide_last(graph: Graph, node: fx.Node, conv: Conv, x: Value) -> None:
    """(W e) / Σ e over the last axis but one, which is where the channels lay before they were moved, or where they get to."""
    moved = x if isinstance(x, Permute) and _lay_before_vectors(x) else None
    rows = _flat(graph, _node(x), 2, node) if moved is None else _node(moved.x)
    largest = graph.call(aten.amax.default, (rows, [-2], True), node, node)
    below = graph.emit(Sub(Value(node=rows), Value(node=largest)), node)
    e = Value(node=graph.call(aten.exp.default, (below,), node, node))
    matrix = conv.W.reshape(*conv.W.shape[:2])
    y = graph.emit(Div(MatMul(matrix, e), Sum(e, [-2], True)), node)
    if moved is not None:
        y = graph.call(aten.permute.default, (y, list(moved.dims)), node, node)
    elif conv.W.ndim > 3:
        batch, _, *positions = _sizes(graph, _node(x), node)
        y = graph.call(aten.reshape.default, (y, [batch, conv.W.shape[0], *positions]), node, node)
    if conv.b is not None:
        y = graph.emit(Add(Value(node=y), conv.b.reshape(-1, *[1] * (conv.W.ndim - 2))), node)
    node.replace_all_uses_with(y)


class FlatSoftmax(Pass):
    """softmax(x, d) = unflatten(softmax(flatten(x, d + 1), d), d + 1), where more than one axis lies behind d."""

    name = "flat_softmax"
    leaves_affines = False

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        match graph.view(node, 1):
            case Softmax(Value(node=fx.Node() as x), dim) if (shape := shape_of(x)) is not None:
                axis = dim % len(shape)
            case _:
                return None
        if sum(not isinstance(size, int) or size > 1 for size in shape[axis + 1 :]) < 2:
            return None
        return Change(do=partial(_flatten, graph, node, x, axis))


def _flatten(graph: Graph, node: fx.Node, x: fx.Node, axis: int) -> None:
    rows = _flat(graph, x, axis + 1, node)
    softmax = graph.call(node.target, (rows, axis, *node.args[2:]), node, node, dict(node.kwargs))
    node.replace_all_uses_with(graph.call(aten.reshape.default, (softmax, _sizes(graph, x, node)), node, node))


def _flat(graph: Graph, x: fx.Node, start: int, before: fx.Node) -> fx.Node:
    """x with all axes from `start` on as one."""
    shape = shape_of(x)
    assert shape is not None
    if len(shape) == start + 1:
        return x
    return graph.call(aten.flatten.using_ints, (x, start), before, before)


def _sizes(graph: Graph, x: fx.Node, before: fx.Node) -> list[Any]:
    """The sizes of x, as arguments of a reshape."""
    shape = shape_of(x)
    assert shape is not None
    return [n if isinstance(n, int) else graph.call(aten.sym_size.int, (x, i), before, before) for i, n in enumerate(shape)]


def _node(x: Any) -> fx.Node:
    node = x.node
    assert isinstance(node, fx.Node)
    return node
