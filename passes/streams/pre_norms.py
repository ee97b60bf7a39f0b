"""The pre-norms of a transformer and the blocks they stand in, found from the graph.

A *pre-norm* reads a residual stream, and what is computed from it is added to that same stream: x + f(N(x)). A final norm
reads the stream too, but nothing of it comes back. A *step* is one such write, a *stack* the steps of one stream in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import PERMUTES, is_cast
from normfuse.ir.views import (
    Add,
    Affine,
    Cat,
    Div,
    Identity,
    LayerNorm,
    MatMul,
    Movement,
    Mul,
    Neg,
    Pad,
    Permute,
    Reshape,
    RmsNorm,
    Sdpa,
    Softmax,
    Sub,
    Value,
)  # fmt: skip

__all__ = ["Step", "blocks", "norms", "stacks", "steps"]

aten = torch.ops.aten

_REMEDY = "say which norm belongs to which block: where={'module.path': 1, ...} or a function of the path"


@dataclass
class Step:
    """One write to a stream: x + f(N(x)).

    Attributes:
        value: the value of the stream that is read, below reshapes and casts.
        norms: the norms that read it and whose results come back; several where attention and MLP stand side by side.
        writes: the first sum of the stream with what is computed from the norms.
        attention: does f mix tokens by attention?
        stream: the values that the stream takes from `value` on.
    """

    value: fx.Node
    norms: list[fx.Node]
    writes: fx.Node
    attention: bool
    stream: set[fx.Node] = field(repr=False)


def norms(graph: Graph) -> list[fx.Node]:
    """LayerNorms and RMSNorms in graph order."""
    return [n for n in graph if isinstance(graph.view(n, 1), (LayerNorm, RmsNorm))]


def stacks(graph: Graph) -> list[list[Step]]:
    """The steps of every residual stream, in graph order.

    Raises:
        Refuse: a stream splits in two, so that its blocks have no order.
    """
    found: list[list[Step]] = []
    for step in steps(graph):
        parents = [s for s in found if step.value in s[-1].stream]
        earlier = next((s for s in found if any(step.value in e.stream for e in s)), None)
        if parents:
            parents[-1].append(step)
        elif earlier is not None:
            raise Refuse(
                "the residual stream splits in two, so that its blocks have no order", blocker=step.norms[0], remedy=_REMEDY
            )
        else:
            found.append([step])
    return _continued(graph, found)


def blocks(graph: Graph, stack: Sequence[Step]) -> dict[fx.Node, int]:
    """The index of the block of each norm of a stack, from 0.

    The list index in the module paths (`layers.3.norm1`) where it fits the order and the structure of the graph; else the
    structure: branches with attention, then branches without.

    Raises:
        Refuse: neither says it.
    """
    shape = _structure(stack)
    keys = [[_indices(graph.path(n)) for n in step.norms] for step in stack]
    flat = [k for step in keys for k in step]
    alike = len({len(k) for k in flat}) == 1 and all(len(set(step)) == 1 for step in keys)
    depth = len(flat[0]) if alike else 0
    varying = [k for k in range(depth) if len({key[k] for key in flat}) > 1]
    for k in varying:
        prefixes = [step[0][: k + 1] for step in keys]
        if _named_alike(graph, stack, k) and prefixes == sorted(prefixes) and _fits(prefixes, shape, deeper=varying[-1] > k):
            order = sorted(set(prefixes))
            index = {p: p[-1] if k == varying[0] else order.index(p) for p in order}
            return {n: index[p] for step, p in zip(stack, prefixes, strict=True) for n in step.norms}
    if shape is None or varying:
        why = (
            "module paths and the order of attention and MLP disagree on" if varying else "neither module paths nor attention show"
        )
        raise Refuse(f"{why} which norms form a block", blocker=stack[0].norms[0], remedy=_REMEDY)
    return {n: i for step, i in zip(stack, shape, strict=True) for n in step.norms}


# -- discovery ---------------------------------------------------------------------------------------------------------


def steps(graph: Graph) -> list[Step]:
    """The write of every pre-norm's branch to its stream; norms that read the same value share one."""
    by_value: dict[fx.Node, Step] = {}
    streams: dict[fx.Node, set[fx.Node]] = {}
    for norm in norms(graph):
        value = _root(graph, norm)
        if value is None:
            continue
        stream = streams.get(value)
        if stream is None:
            stream = streams[value] = _stream(graph, value)
        below = _below(norm)
        write = next((a for a in graph if a in stream and _joins(graph, a, stream, below)), None)
        if write is None:
            continue
        attends = _attends(graph, below & _above([write], below))
        step = by_value.setdefault(value, Step(value, [], write, False, stream))
        step.norms.append(norm)
        step.attention |= attends
    return list(by_value.values())


def _root(graph: Graph, norm: fx.Node) -> fx.Node | None:
    """What the norm reads, below reshapes, casts and dropout."""
    node = norm.args[0]
    while isinstance(node, fx.Node) and _moves(graph, node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _moves(graph: Graph, node: fx.Node) -> bool:
    return is_cast(node) or node.target in PERMUTES or isinstance(graph.view(node, 1), (Identity, Permute, Reshape, Movement))


def _stream(graph: Graph, value: fx.Node) -> set[fx.Node]:
    """The value and what it becomes by sums, constant gains and movements."""
    found, work = {value}, [value]
    while work:
        for reader in work.pop().users:
            if reader not in found and _carries(graph, reader):
                found.add(reader)
                work.append(reader)
    return found


def _carries(graph: Graph, node: fx.Node) -> bool:
    if _moves(graph, node):
        return True
    match graph.view(node, 1):
        case Add() | Sub() | Cat() | Pad() | Neg() | Affine():
            return True
        case Mul(Value(), Value()):
            return False
        case Mul() | Div(Value(), Constant() | float() | int()):
            return True
        case _:
            return False


def _below(node: fx.Node) -> set[fx.Node]:
    found, work = {node}, [node]
    while work:
        for reader in work.pop().users:
            if reader not in found:
                found.add(reader)
                work.append(reader)
    return found


def _above(nodes: Iterable[fx.Node], within: set[fx.Node] | None = None) -> set[fx.Node]:
    found = set(nodes)
    work = list(found)
    while work:
        for source in work.pop().all_input_nodes:
            if source not in found and (within is None or source in within):
                found.add(source)
                work.append(source)
    return found


def _joins(graph: Graph, node: fx.Node, stream: set[fx.Node], below: set[fx.Node]) -> bool:
    """Is the node a sum of the stream and of what was computed from the norm?"""
    op = graph.view(node, 1)
    if not isinstance(op, (Add, Sub)) or not isinstance(op.x, Value) or not isinstance(op.y, Value):
        return False
    p, q = op.x.node, op.y.node
    return any(a in stream and a not in below and b in below and b not in stream for a, b in ((p, q), (q, p)))


def _attends(graph: Graph, nodes: set[fx.Node]) -> bool:
    return any(isinstance(graph.view(n, 1), Sdpa) or "attention" in str(n.target) or _weighs(graph, n) for n in nodes)


def _weighs(graph: Graph, node: fx.Node) -> bool:
    """Is it a softmax whose result is multiplied as a matrix? The gate of a mixture of experts is not."""
    if not isinstance(graph.view(node, 1), Softmax):
        return False
    readers = [node]
    while len(readers) == 1 and (readers[0] is node or _moves(graph, readers[0])):
        readers = list(readers[0].users)
    return any(isinstance(graph.view(r, 1), MatMul) or r.target is aten.einsum.default for r in readers)


def _continued(graph: Graph, found: list[list[Step]]) -> list[list[Step]]:
    """A stack that starts from the end of another with the same names is its next stage: Swin, PVT."""
    merged: list[list[Step]] = []
    for stack in found:
        above = _above([stack[0].value])
        before = next(
            (m for m in reversed(merged) if m[-1].writes in above and _skeletons(graph, m) & _skeletons(graph, stack)), None
        )
        if before is None:
            merged.append(list(stack))
        else:
            before += stack
    return merged


# -- blocks ------------------------------------------------------------------------------------------------------------


def _structure(stack: Sequence[Step]) -> list[int] | None:
    """A block is branches with attention, then branches without; None where that does not give equal blocks."""
    kinds = [s.attention for s in stack]
    if not kinds[0]:
        return None
    if all(kinds):
        return list(range(len(kinds)))
    found, index = [], -1
    for i, attention in enumerate(kinds):
        index += attention and (i == 0 or not kinds[i - 1])
        found.append(index)
    patterns = {tuple(kinds[i] for i, _ in run) for _, run in groupby(enumerate(found), key=lambda pair: pair[1])}
    return found if len(patterns) == 1 else None


def _fits(prefixes: list[tuple[int, ...]], shape: list[int] | None, *, deeper: bool) -> bool:
    """Do the paths cut the stack where the structure does? Without a structure nested lists leave it open."""
    if shape is None:
        return not deeper
    return len(set(prefixes)) == len(set(shape)) == len(set(zip(prefixes, shape, strict=True)))


def _indices(path: str) -> tuple[int, ...]:
    return tuple(int(p) for p in path.split(".") if p.isdecimal())


def _skeletons(graph: Graph, stack: Sequence[Step]) -> set[str]:
    return {re.sub(r"\d+", "#", graph.path(n)) for s in stack for n in s.norms}


def _named_alike(graph: Graph, stack: Sequence[Step], k: int) -> bool:
    """Do all paths have the same names up to their list index number k?"""
    heads = set()
    for step in stack:
        for norm in step.norms:
            parts = graph.path(norm).split(".")
            places = [i for i, p in enumerate(parts) if p.isdecimal()]
            heads.add(tuple("#" if p.isdecimal() else p for p in parts[: places[k] + 1]))
    return len(heads) == 1
