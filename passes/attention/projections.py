"""Linear layers in front of an attention: x Wᵀ + b over a tensor (B, L, C)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.decode import arguments
from normfuse.ir.graph import Graph
from normfuse.ir.views import Add, Div, Identity, Linear, Mul, Permute, Reshape, Value
from normfuse.passes.attention.heads import sizes_of
from normfuse.passes.patterns.moments import number

__all__ = ["Projection", "projection"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Projection:
    """x Wᵀ + b.

    Attributes:
        x: (B, L, C), or (T, C) inside of a matrix product over all tokens.
        W: (N, C).
        b: (N,) or None.
    """

    x: fx.Node
    W: Constant
    b: Constant | None = None


def projection(graph: Graph, node: fx.Node) -> Projection | None:
    """The linear that makes `node` (B, L, N); None when something else does, or when its weight is computed."""
    found = _projection(graph, node)
    return found if found is not None and len(sizes_of(found.x) or ()) == 3 else None


def _projection(graph: Graph, node: fx.Node) -> Projection | None:
    match graph.view(node, 1):
        case Linear(Value(node=fx.Node() as x), W, b):
            return Projection(x, W, b)
        case Add(Value(node=fx.Node() as y), Constant() as b) | Add(Constant() as b, Value(node=fx.Node() as y)):
            found = _projection(graph, y)
            fits = found is not None and found.b is None and b.shape == found.W.shape[:1]
            return Projection(found.x, found.W, b) if found is not None and fits else None
        case Mul(Value(node=fx.Node() as y), s) | Mul(s, Value(node=fx.Node() as y)) if (factor := number(s)) is not None:
            return _times(_projection(graph, y), factor)
        case Div(Value(node=fx.Node() as y), s) if (factor := number(s)) is not None and factor:
            return _times(_projection(graph, y), 1 / factor)
        case Identity(Value(node=fx.Node() as y)):
            return _projection(graph, y)
        case Reshape(Value(node=fx.Node() as y)):
            return _over_all_tokens(graph, node, y)
    return _product(graph, node)


def _product(graph: Graph, node: fx.Node) -> Projection | None:
    """x W, and b + x W, of a matrix W that may be stored the other way round."""
    if node.target is aten.addmm.default:
        a = arguments(node)
        b, W = graph.operand(a["self"]), _matrix(graph, a["mat2"])
        plain = a["alpha"] == a["beta"] == 1 and isinstance(b, Constant) and W is not None and b.shape == W.shape[1:]
        return Projection(a["mat1"], W.T, b) if plain and W is not None else None
    if node.target in (aten.matmul.default, aten.mm.default) and isinstance(node.args[0], fx.Node):
        W = _matrix(graph, node.args[1])
        return None if W is None else Projection(node.args[0], W.T)
    return None


def _matrix(graph: Graph, arg: object) -> Constant | None:
    match graph.operand(arg):
        case Constant() as W if W.ndim == 2:
            return W
        case Permute(Constant() as W, (1, 0)):
            return W.T
    return None


def _times(found: Projection | None, s: float) -> Projection | None:
    """(x W + b) s = x (W s) + b s"""
    return None if found is None else Projection(found.x, found.W * s, None if found.b is None else found.b * s)


def _over_all_tokens(graph: Graph, node: fx.Node, flat: fx.Node) -> Projection | None:
    """(B, L, C) -> (B·L, C) -> linear -> (B·L, N) -> (B, L, N)."""
    found = _projection(graph, flat)
    match None if found is None else graph.view(found.x, 1):
        case Reshape(Value(node=fx.Node() as x)) if found is not None:
            before, after = sizes_of(x), sizes_of(node)
            if before is None or after is None or len(before) != 3 or len(after) != 3 or len(sizes_of(flat) or ()) != 2:
                return None
            whole = before[:2] == after[:2] and before[2] == found.W.shape[1] and after[2] == found.W.shape[0]
            return Projection(x, found.W, found.b) if whole else None
    return None
