"""LayerNorm over the rows of a reshaped image is GroupNorm of the image.

    reshape⁻¹(LN(reshape(x, (B, G, −1))) ⊙ γ + β)  =  GroupNorm(x; G, γ repeated C/G times, β likewise)

Source: Wu and He, Group Normalization, arXiv 1803.08494, section 3.1; with γ and β per group in Qiao et al., Rethinking
Normalization and Elimination Singularity in Neural Networks, arXiv 1911.09738, section 4.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.views import Add, GroupNorm, Mul, Reshape, Value, shape_of
from normfuse.passes.affine.broadcast import axes, per_channel

__all__ = ["regrouped"]


def regrouped(graph: Graph, node: fx.Node, x: fx.Node, eps: float) -> tuple[fx.Node, Value] | None:
    """The reshape that gives the image its shape back, and the GroupNorm to put in its place; None if shapes do not prove it.

    Args:
        graph: the graph.
        node: the LayerNorm over the last axis of `x`, as it stands in the graph.
        x: what it normalizes.
        eps: its ε.
    """
    sources = _sources(graph, x)
    rows = shape_of(x)
    if not sources or rows is None:
        return None
    gamma: Constant | None = None
    beta: Constant | None = None
    last = node
    while len(last.users) == 1:
        user = next(iter(last.users))
        shape = shape_of(last)
        assert shape is not None
        match graph.view(user, 1):
            case Reshape(Value()):
                source = next((s for s in sources if _same(shape_of(s), shape_of(user))), None)
                if source is not None:
                    return _group_norm(source, rows, gamma, beta, eps, user)
            case Mul(Value(), Constant() as c) | Mul(Constant() as c, Value()) if _per_group(c, shape):
                gamma = c.reshape(-1) if gamma is None else gamma * c.reshape(-1)
                beta = None if beta is None else beta * c.reshape(-1)
            case Add(Value(), Constant() as c) | Add(Constant() as c, Value()) if _per_group(c, shape):
                beta = c.reshape(-1) if beta is None else beta + c.reshape(-1)
            case _:
                return None
        last = user
    return None


def _sources(graph: Graph, x: fx.Node) -> list[fx.Node]:
    """The values that `x` is a reshape of, the nearest first."""
    found = []
    while isinstance(op := graph.view(x, 1), Reshape) and isinstance(op.x, Value) and op.x.node is not None:
        x = op.x.node
        found.append(x)
    return found


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and [str(n) for n in a] == [str(n) for n in b]


def _per_group(c: Constant, shape: Any) -> bool:
    """One value, or one for each row of a (batch, group, rest) layout."""
    return c.ndim <= len(shape) and (not axes(c) or (axes(c) == {-2} and len(shape) == 3 and c.numel == shape[-2]))


def _group_norm(
    x: fx.Node, rows: Any, gamma: Constant | None, beta: Constant | None, eps: float, last: fx.Node
) -> tuple[fx.Node, Value] | None:
    shape = shape_of(x)
    assert shape is not None
    if len(shape) < 3 or not isinstance(shape[1], int):
        return None
    channels, groups = shape[1], _groups(shape, rows)
    if groups is None or channels % groups:
        return None

    def spread(c: Constant | None) -> Constant | None:
        if c is None:
            return None
        return per_channel(c, -1, channels) if c.numel == 1 else c.repeat_interleave(channels // groups, 0)

    if any(c is not None and c.numel not in (1, groups) for c in (gamma, beta)):
        return None
    if gamma is not None or beta is not None:  # the operator takes both or none
        some = gamma if gamma is not None else beta
        assert some is not None
        gamma = some * 0.0 + 1.0 if gamma is None else gamma
        beta = some * 0.0 if beta is None else beta
    return last, GroupNorm(Value(node=x), groups, spread(gamma), spread(beta), eps)


def _groups(shape: Any, rows: Any) -> int | None:
    """How many groups of channels the rows of length `rows[-1]` make: either the layout says so, or their length does."""
    if len(rows) == 3 and str(rows[0]) == str(shape[0]) and isinstance(rows[1], int):
        return rows[1]
    places = prod(shape[2:]) if all(isinstance(n, int) for n in shape[2:]) else None
    if places is None or not isinstance(rows[-1], int) or places == 0 or rows[-1] % places:
        return None
    each = rows[-1] // places
    return shape[1] // each if each and shape[1] % each == 0 else None
