"""What computes nothing goes: dropout, copies, casts and reshapes to what is there, arithmetic on constants."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor, fx

from normfuse.constants import Constant
from normfuse.graph import Graph
from normfuse.report import PassReport, Site
from normfuse.views import Cat, Identity, Movement, Op, Pad, Reshape, Value

__all__ = ["Cleanup"]

aten = torch.ops.aten

_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.to.other, aten.lift_fresh_copy.default}
_CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.sym_constrain_range_for_size.default}


def identity(op: Op) -> Value | None:
    """dropout₀(x) = x,   copies and aliases of x = x"""
    match op:
        case Identity(x):
            return x
        case _:
            return None


def movement_to_the_same_place(op: Op) -> Value | None:
    """A reshape to the same shape, a padding by nothing, an expansion to the same size, a concatenation of one: x"""
    match op:
        case Reshape(Value() as x) if _same_sizes(op, x):
            return x
        case Movement(Value() as x) if op.target is aten.expand.default and _same_sizes(op, x):
            return x
        case Movement(Value() as x, (_, 0 | None, end, *_), piece=None) if (
            op.target is aten.slice.Tensor and (end is None or end >= 2**62) and _same_sizes(op, x)
        ):
            return x
        case Pad(x, pad) if not any(pad):
            return x
        case Cat([Value() as x]):
            return x
        case _:
            return None


class Cleanup:
    """Dropout, copies, and casts, reshapes, paddings that change nothing go; arithmetic on constants is done once."""

    name = "cleanup"
    leaves_affines = False
    rules = (identity, movement_to_the_same_place)

    def __call__(self, graph: Graph) -> PassReport:
        start = perf_counter()
        applied: list[Site] = []
        for node in graph:
            if node.op != "call_function":
                continue
            if node.target in _CHECKS:
                graph.fx.erase_node(node)
                continue
            site = _cast_to_itself(graph, node) or _folded(graph, node) or self._simplified(graph, node)
            if site is not None:
                applied.append(site)
        graph.clean()
        return PassReport(self.name, tuple(applied), seconds=perf_counter() - start)

    def _simplified(self, graph: Graph, node: fx.Node) -> Site | None:
        if node.target is aten.view.default:  # a view demands a layout that removed copies no longer give
            node.target = aten.reshape.default
        if node.target is aten.pad.default and not any(node.args[1]) and isinstance(node.args[0], fx.Node):  # type: ignore[arg-type]
            node.replace_all_uses_with(node.args[0])
            return graph.site("movement_to_the_same_place", node)
        op = graph.view(node, 2)
        if not isinstance(op, Op):
            return None
        for rule in self.rules:
            value = rule(op)
            if value is not None and graph.permit(rule.__name__, graph.path(node)):
                graph.replace(node, value)
                return graph.site(rule.__name__, node)
        return None


def _cast_to_itself(graph: Graph, node: fx.Node) -> Site | None:
    """A cast to the dtype and device that the value has: x"""
    if node.target not in _CASTS or not isinstance(node.args[0], fx.Node):
        return None
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if before.dtype != after.dtype or before.device != after.device or before.layout != after.layout:
        return None
    node.replace_all_uses_with(node.args[0])
    return graph.site("cast_to_itself", node)


def _folded(graph: Graph, node: fx.Node) -> Site | None:
    """f(constants) = a constant, where that is no larger than what it is made of"""
    inputs = node.all_input_nodes
    if not inputs or not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return None
    constants = [graph.constant(n) for n in inputs]
    val = node.meta.get("val")
    if any(c is None for c in constants) or not isinstance(val, Tensor) or not all(isinstance(d, int) for d in val.shape):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags or val.numel() > sum(c.numel for c in constants if c is not None):
        return None
    if node.target in _CASTS:
        source = constants[0]
        assert source is not None
        if not (source.dtype.is_floating_point and val.dtype.is_floating_point):
            return None
        value = source.cast(val.dtype)
    else:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), graph.constant)  # type: ignore[arg-type]
        try:
            value = Constant.apply(node.target, *args, **kwargs).cast(val.dtype)
        except (RuntimeError, TypeError, NotImplementedError):
            return None  # an operator that has no float64 or no shape inference stays as it is
    graph.replace(node, value)
    return graph.site("constant_folding", node)


def _same_sizes(op: Op, x: Value) -> bool:
    return op.shape is not None and x.shape is not None and [str(d) for d in op.shape] == [str(d) for d in x.shape]
