"""What is read of one token only is computed for that token only.

    f(x)[i] = f(x[i])   for every f that treats the rows of an axis alike

A classifier reads the class token behind the last norm, and everything in the last block behind its attention is then
needed for one token of 197. The selection moves up through it, exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.operators import ELEMENTWISE, name
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Add, Affine, BatchNorm, Div, LayerNorm, Linear, Mul, Op, RmsNorm, Sub, Value, shape_of
from normfuse.passes.affine.slices import slice_of_concatenation

__all__ = ["Select"]

RULE = "selection_before_function"

aten = torch.ops.aten


class Select(Pass):
    """f(x)[i] = f(x[i]): where only one token of the result is read, as a class token is, only that token is computed."""

    name = "select"
    leaves_affines = False

    def rewrite(self, work: Rewriting) -> None:
        pending = [n for n in work.graph if n.target is aten.select.int]
        while pending:
            selection = pending.pop()
            if not _read_from_operand(work, selection, pending):
                _moved_up(work, selection, pending)


def _read_from_operand(work: Rewriting, selection: fx.Node, pending: list[fx.Node]) -> bool:
    """A row of a concatenation is a row of one operand, which may move on."""
    whole = selection.args[0]
    part = slice_of_concatenation(work, selection)
    if part is None:
        return False
    work.done(slice_of_concatenation.__name__, selection)
    selection.replace_all_uses_with(part)
    work.graph.fx.erase_node(selection)
    if isinstance(whole, fx.Node) and not whole.users:  # else it would count as a reader of its operands
        work.graph.fx.erase_node(whole)
    pending.append(part)
    return True


def _moved_up(work: Rewriting, selection: fx.Node, pending: list[fx.Node]) -> None:
    """One step: the selection behind a function becomes selections of its operands, which are added to `pending`."""
    x, dim, index = selection.args
    if not isinstance(x, fx.Node) or not isinstance(dim, int) or not isinstance(index, int):
        return
    value, graph = Value(node=x), work.graph
    if value.shape is None or any(_row(reader) != _row(selection) for reader in x.users):
        return
    axis = dim % len(value.shape) - len(value.shape)
    op = graph.view(x, 2)
    operands = _alike(op, x, axis)
    if operands is None or not work.permits(RULE, x):
        return
    selection = _one(graph, list(x.users), pending)
    new: fx.Node
    if isinstance(op, Op):
        chosen = {name: _chosen(graph, v, axis, index, selection, pending) for name, v in operands.items()}
        new = graph.replace(selection, dataclasses.replace(op, node=None, **chosen))
    else:
        only = _chosen(graph, operands["x"], axis, index, selection, pending)
        assert isinstance(only, Value)
        new = graph.call(x.target, (only.node, *x.args[1:]), selection, x, dict(x.kwargs))
        selection.replace_all_uses_with(new)
    new.meta.update({k: x.meta[k] for k in ("nn_module_stack", "stack_trace", "origin") if k in x.meta})
    if isinstance(op, Affine):
        new.meta["composed"] = True  # it is no longer what it was read from
    work.done(RULE, x)
    graph.fx.erase_node(selection)
    graph.fx.erase_node(x)  # else it would count as a reader of its operands


def _row(reader: fx.Node) -> tuple[int, Any] | None:
    """Which row a reader takes of its operand, and along which axis; None for what takes no row."""
    if reader.target is not aten.select.int:
        return None
    x, dim, index = reader.args
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    assert shape is not None
    assert isinstance(dim, int)
    size = shape[dim]
    return dim % len(shape), index + size if isinstance(index, int) and isinstance(size, int) and index < 0 else index


def _one(graph: Graph, alike: list[fx.Node], pending: list[fx.Node]) -> fx.Node:
    """The first of several selections of one row, in the place of all of them."""
    first = min(alike)
    for other in alike:
        if other is not first:
            other.replace_all_uses_with(first)
            graph.fx.erase_node(other)
    pending[:] = [n for n in pending if n not in alike]
    return first


def _alike(op: Value, node: fx.Node, axis: int) -> dict[str, Value | Constant | float] | None:
    """The operands whose rows along `axis` a function treats alike; None for any other function."""
    match op:
        case Linear(x) if axis != -1:
            return {"x": x}
        case BatchNorm(x, training=False) if x.rank is not None and x.rank + axis > 1:
            return {"x": x}
        case Affine(x, s, t):
            return {"x": x, "s": s, "t": t}
        case LayerNorm(x, normalized) | RmsNorm(x, normalized) if -axis > len(normalized):
            return {"x": x}
        case Add(x, y) | Sub(x, y) | Mul(x, y) | Div(x, y):
            return {"x": x, "y": y}
        case _ if name(node.target) in ELEMENTWISE and isinstance(node.args[0], fx.Node):
            return {"x": Value(node=node.args[0])}
        case _:
            return None


def _chosen(
    graph: Graph, value: Value | Constant | float, axis: int, index: int, before: fx.Node, pending: list[fx.Node]
) -> Value | Constant | float:
    """The operand's row: broadcast ones have one row for all, or none."""
    if isinstance(value, Constant):
        if value.ndim < -axis:
            return value
        row = index if value.shape[axis] > 1 else 0
        return Constant.apply(lambda v: v.select(axis, row), value)
    if not isinstance(value, Value):
        return value
    shape = value.shape
    assert shape is not None
    assert value.node is not None
    if len(shape) < -axis:
        return value
    row = 0 if isinstance(shape[axis], int) and shape[axis] == 1 else index
    chosen = graph.call(aten.select.int, (value.node, axis, row), before, value.node)
    pending.append(chosen)
    return Value(node=chosen)
