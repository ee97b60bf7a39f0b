"""Values that can all be 2^-k times as large without a change of the function: who writes them, passes them on and reads them.

    W (x) + b          c y  =  (c W) x + c b                    a layer that writes
    W (c x)            y    =  (W / c) (c x)                    a layer that reads
    N(c x; c² ε)       y    =  N(x; ε)                          LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm
    c x + c y, c x · g, relu(c x), c x of a movement            passed on

c is a power of two, so that nothing is rounded. This file finds a closed set and changes nothing; `half_range` scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import CASTS, is_cast
from normfuse.ir.views import (
    Add,
    AvgPool,
    BatchNorm,
    Cat,
    Div,
    GlobalAvgPool,
    GroupNorm,
    Identity,
    InstanceNorm,
    LayerNorm,
    LeakyRelu,
    MatMul,
    MaxPool,
    Mean,
    Movement,
    Mul,
    Neg,
    Pad,
    Permute,
    Relu,
    Reshape,
    Resize,
    RmsNorm,
    Sdpa,
    Sub,
    Sum,
    Take,
    Value,
)  # fmt: skip
from normfuse.passes.streams.streams import named

__all__ = ["NORMS", "Scaled", "closed"]

NORMS = (LayerNorm, RmsNorm, GroupNorm, InstanceNorm, BatchNorm)
"""They take a scale off what they read, where their ε is scaled with it."""

_ALONG = (
    Identity, Neg, Relu, LeakyRelu, Permute, Reshape, Movement, Take, Mean, Sum, MaxPool, AvgPool, GlobalAvgPool, Resize,
)  # fmt: skip


@dataclass
class Scaled:
    """One closed set.

    Attributes:
        values: they become c times as large.
        writers: layers and norms whose weights take c, and products and sums whose constant does.
        readers: layers, norms and products whose weights take 1 / c; of norms it is ε that takes c².
        entries: (user, operand): the operand is multiplied by c for this user.
        exits: (user, operand): the operand is multiplied by 1 / c for this user.
        largest: the largest magnitude among `values`, without c.
    """

    values: dict[fx.Node, None] = field(default_factory=dict)
    writers: dict[fx.Node, None] = field(default_factory=dict)
    readers: dict[fx.Node, None] = field(default_factory=dict)
    entries: dict[tuple[fx.Node, fx.Node], None] = field(default_factory=dict)
    exits: dict[tuple[fx.Node, fx.Node], None] = field(default_factory=dict)
    largest: float = 0.0


def closed(graph: Graph, start: fx.Node, size: Mapping[fx.Node, float], fits: Callable[[float], bool]) -> Scaled:
    """The values that must be scaled together with `start`.

    Args:
        graph: the graph.
        start: one that is too large.
        size: the largest magnitude of each value, as far as it was seen.
        fits: is this magnitude small enough to stay as it is?

    Raises:
        Refuse: something reads a value that is too large and does not commute with a scale, or makes one.
    """
    return _Walk(graph, size, fits).of(start)


class _Walk:
    def __init__(self, graph: Graph, size: Mapping[fx.Node, float], fits: Callable[[float], bool]) -> None:
        self.graph, self.size, self.fits = graph, size, fits
        self.found = Scaled()
        self.work: list[fx.Node] = []

    def of(self, start: fx.Node) -> Scaled:
        if not self._takes_scale(start):
            raise Refuse(f"{named(self.graph, start)} makes it, which has nothing to scale")
        self.work.append(start)
        while self.work:
            node = self.work.pop()
            if node in self.found.values:
                continue
            self.found.values[node] = None
            self.found.largest = max(self.found.largest, self.size.get(node, 0.0))
            self._above(node)
            for user in self.graph.readers(node):
                self._below(node, user)
        for node in self.found.values:
            self._check_once(node)
        for node in [n for n in self.found.writers if self._hands_on(n)]:
            del self.found.writers[node]
        return self.found

    def _hands_on(self, node: fx.Node) -> bool:
        """A product with a constant of what is scaled itself: c x · g has the scale already."""
        op = self.graph.view(node, 2)
        return _has_constant(op) and any(n in self.found.values for n in node.all_input_nodes)

    def _check_once(self, node: fx.Node) -> None:
        """c x · c y would be c² x y: of what is multiplied, or divided, one operand is scaled and the other is not."""
        op, inside = self.graph.view(node, 2), self.found.values
        others: list[fx.Node | None] = []
        match op:
            case Sdpa(q, k):
                others = [q.node, k.node]
            case Div(Value(), Value() as y):
                others = [y.node]
            case _ if (factors := _product(op)) is not None:
                x, y_node = factors
                others = [x if x is y_node or (x in inside and y_node in inside) else None]
        if any(n in inside for n in others):
            raise Refuse(f"{named(self.graph, node)} multiplies or divides it by itself", blocker=node)

    # -- upwards -----------------------------------------------------------------------------------------------------

    def _takes_scale(self, node: fx.Node) -> bool:
        """Can the value be c times as large by what makes it?"""
        op = self.graph.view(node, 2)
        if op.weight is not None:
            # a table that others read as well would stand in memory twice; a product behind it costs less
            return op.weight.into is not None or not self.graph.shared(op.weight.value)
        if isinstance(op, NORMS):
            return op.gamma is not None
        return bool(_carriers(op) or _has_constant(op) or _is_cast(node) or _divides(op) or _product(op) is not None)

    def _above(self, node: fx.Node) -> None:
        op = self.graph.view(node, 2)
        if op.weight is not None or isinstance(op, NORMS) or _has_constant(op):
            self.found.writers[node] = None
            return
        factors = _product(op)
        if factors is not None:
            self._one_of(node, *factors)
            return
        for operand in _carriers(op) or node.args[:1]:
            if isinstance(operand, fx.Node):
                self._ask(node, operand)

    def _one_of(self, node: fx.Node, x: fx.Node, y: fx.Node) -> None:
        """x · y for two values: one of them takes the scale, and it is the one that can."""
        inside = [n for n in dict.fromkeys((x, y)) if n in self.found.values]
        if not inside:
            able = [n for n in (x, y) if self.graph.view(n, 1).weight is not None] or [n for n in (x, y) if self._takes_scale(n)]
            self._ask(node, able[0] if able else x)

    def _ask(self, user: fx.Node, operand: fx.Node) -> None:
        """The operand scaled: by what makes it, or by a product for this user alone."""
        if operand in self.found.values:
            return
        if self.graph.constant(operand) is not None or not self._takes_scale(operand):
            if not self.fits(self.size.get(operand, 0.0)):
                raise Refuse(f"{named(self.graph, operand)} makes a part of it, which has nothing to scale", blocker=operand)
            self.found.entries[user, operand] = None
        else:
            self.work.append(operand)

    # -- downwards ---------------------------------------------------------------------------------------------------

    def _below(self, node: fx.Node, user: fx.Node) -> None:
        op = self.graph.view(user, 2)
        if (op.weight is not None and op.weight.into is not None) or isinstance(op, NORMS):
            self.found.readers[user] = None  # also one that writes one of the values itself
        elif user in self.found.values:
            return
        elif _has_constant(op) and isinstance(op, (Mul, Div)) and self.fits(self.size.get(user, 0.0)):
            self.found.readers[user] = None  # its constant takes 1 / c: what follows is as it was
        elif _passes_on(op, node) or (_is_cast(user) and user.args[0] is node):
            self.work.append(user)
        elif self.fits(self.size.get(node, 0.0)):
            self.found.exits[user, node] = None
        elif user.op == "output":
            raise Refuse("the model gives it out as it is", blocker=user, remedy="a norm in front of the output")
        else:
            raise Refuse(f"{named(self.graph, user)} reads it, and does not commute with a scale", blocker=user)


def _carriers(op: Value) -> list[fx.Node]:
    """The operands of which all are scaled where the result is."""
    match op:
        case Add(x, y) | Sub(x, y):
            found = [x, y]
        case Cat(xs):
            found = list(xs)
        case Pad(x, _, 0):
            found = [x]
        case Sdpa():
            found = [op.v]
        case _ if isinstance(op, _ALONG):
            found = [op.x]
        case _:
            return []
    every = [_node(op, i, v) for i, v in enumerate(found)]
    return [n for n in every if n is not None] if all(n is not None for n in every) else []


def _node(op: Value, i: int, value: Value | Constant | float) -> fx.Node | None:
    """The node of an operand: a constant of a sum or a concatenation stands among the arguments."""
    if isinstance(value, Value):
        return value.node
    assert op.node is not None
    given = op.node.args[0] if isinstance(op, Cat) else op.node.args
    found = given[i] if isinstance(given, (list, tuple)) and i < len(given) else None
    return found if isinstance(found, fx.Node) else None


def _has_constant(op: Value) -> bool:
    """x · c and x / c for a constant."""
    match op:
        case Mul(Value(), Constant() | float() | int()) | Mul(Constant() | float() | int(), Value()):
            return True
        case Div(Value(), Constant() | float() | int()):
            return True
    return False


def _product(op: Value) -> tuple[fx.Node, fx.Node] | None:
    """The two factors, where both are values."""
    match op:
        case Mul(Value(node=fx.Node() as x), Value(node=fx.Node() as y)):
            return x, y
        case MatMul(Value(node=fx.Node() as x), Value(node=fx.Node() as y)) if op.weight is None:
            return x, y
    return None


def _passes_on(op: Value, node: fx.Node) -> bool:
    """f(c x, …) = c f(x, …) for the operand `node`, if the others take part where they must."""
    if _product(op) is not None or _has_constant(op):
        return True
    if _divides(op):
        return isinstance(op.x, Value) and op.x.node is node
    return node in _carriers(op)


def _divides(op: Value) -> TypeGuard[Div]:
    """x / y for two values"""
    return isinstance(op, Div) and isinstance(op.x, Value) and isinstance(op.y, Value)


def _is_cast(node: fx.Node) -> bool:
    return node.target in CASTS and is_cast(node)
