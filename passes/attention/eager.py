"""Attention that a model spells out: MatMul, scale, mask, Softmax, MatMul.

softmax(s · q kᵀ + m) v  =  sdpa(q, k, v, m, scale=s)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx

from normfuse.ir import operators
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import CASTS, CHECKS
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import Add, Div, Identity, MatMul, Mul, Permute, Reshape, Sdpa, Softmax, Value
from normfuse.ir.wording import operator_name
from normfuse.passes.patterns.moments import number

__all__ = ["EagerAttention"]

aten = torch.ops.aten
_SWAPPED = (0, 1, 3, 2)


class EagerAttention(Pass):
    """Over (batch, heads, tokens, features), with a mask that is added; one that selects is left alone.

    A query whose scores are all −Inf gives 0, where the arithmetic gives NaN.
    """

    name = "eager_attention"
    leaves_affines = False

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """softmax(s · q kᵀ + m) v  =  sdpa(q, k, v, m, scale=s)

        Raises:
            Refuse: it is written in a way that the operator is not, or scores or weights are read elsewhere, too.
        """
        match graph.view(node, 1):
            case MatMul(Value(node=fx.Node() as weights), Value(node=fx.Node() as value)):
                softmax = _behind(graph, weights, any_cast=True)
            case _:
                return None
        op = graph.view(softmax, 1)
        if not isinstance(op, Softmax) or op.x.node is None or not _weighs(graph, op.x.node):
            return None
        if _rank(node) != 4 or op.dim not in (-1, 3):
            raise Refuse("it is not over (batch, heads, tokens, features)")
        if not _dtype(softmax) == _dtype(op.x.node) == _dtype(weights):
            raise Refuse("its softmax is in another precision than its scores")
        scores = _scores(graph, _behind(graph, op.x.node))
        (query, a), (key_t, b) = _unscaled(graph, scores.query), _unscaled(graph, scores.key)
        if any(_rank(v) != 4 for v in (query, key_t, value)):
            raise Refuse("queries, keys and values are not (batch, heads, tokens, features)")
        if scores.mask is not None and (_dtype(scores.mask) != _dtype(query) or (_rank(scores.mask) or 5) > 4):
            raise Refuse("its mask has another dtype, or more axes", blocker=scores.mask)
        _check_readers(scores.product, node)
        mask = None if scores.mask is None else Value(node=scores.mask)
        return Change(Sdpa(Value(node=query), _swapped(graph, key_t), Value(node=value), mask, scale=scores.scale * a * b))


def _weighs(graph: Graph, node: fx.Node, depth: int = 8) -> bool:
    """Does `node` follow, element by element, from a product of two tensors that are computed?"""
    if isinstance(graph.view(node, 1), MatMul):
        return len([a for a in node.all_input_nodes if a.op != "get_attr"]) == 2
    follows = operators.name(node.target) in operators.SAME_SHAPE | operators.BROADCAST or isinstance(
        graph.view(node, 1), (Identity, Reshape, Permute)
    )
    if depth == 0 or not (follows or node.target in CASTS):
        return False
    return any(_weighs(graph, a, depth - 1) for a in node.all_input_nodes)


class _Scores(NamedTuple):
    """s · q kᵀ + m"""

    product: fx.Node
    scale: float
    mask: fx.Node | None = None

    @property
    def query(self) -> fx.Node:
        found = self.product.args[0]
        assert isinstance(found, fx.Node)
        return found

    @property
    def key(self) -> fx.Node:
        """(B, H, D, S)"""
        found = self.product.args[1]
        assert isinstance(found, fx.Node)
        return found


def _scores(graph: Graph, node: fx.Node) -> _Scores:
    """
    Raises:
        Refuse: something else stands between product and softmax.
    """
    found = _product(graph, node)
    if found is not None:
        return found
    if isinstance(graph.view(node, 1), Add):
        for inner, mask in (node.args[:2], node.args[1::-1]):
            if not isinstance(inner, fx.Node) or not isinstance(mask, fx.Node):
                continue
            found = _product(graph, inner)
            if found is not None and _sizes(inner) == _sizes(node):  # the mask must not be the larger one
                return found._replace(mask=mask)
    selects = operators.name(node.target) in ("where", "masked_fill")
    what = "its mask selects scores, and is not added to them" if selects else f"its scores go through {operator_name(node)}"
    raise Refuse(what, blocker=node)


def _product(graph: Graph, node: fx.Node) -> _Scores | None:
    """s · q kᵀ"""
    inner, scale = _factored(graph, _behind(graph, node))
    product = _behind(graph, inner)
    is_product = isinstance(graph.view(product, 1), MatMul) and all(isinstance(a, fx.Node) for a in product.args[:2])
    return _Scores(product, scale) if is_product else None


def _unscaled(graph: Graph, node: fx.Node) -> tuple[fx.Node, float]:
    """`node` without a number that only the scores see: (s q) kᵀ = s (q kᵀ)"""
    return _factored(graph, node) if len(Graph.consumers(node)) == 1 else (node, 1.0)


def _factored(graph: Graph, node: fx.Node) -> tuple[fx.Node, float]:
    """x and s for x · s and x / (1/s), when s is one number and the shape stays; else the value itself and 1."""
    match graph.view(node, 1):
        case Mul(Value(node=fx.Node() as x), s) | Mul(s, Value(node=fx.Node() as x)) if (factor := number(s)) is not None:
            found = x, factor
        case Div(Value(node=fx.Node() as x), s) if (factor := number(s)) is not None and factor:
            found = x, 1 / factor
        case _:
            return node, 1.0
    return found if _sizes(found[0]) == _sizes(node) and _dtype(found[0]) == _dtype(node) else (node, 1.0)


def _swapped(graph: Graph, node: fx.Node) -> Value:
    """(B, H, D, S) as (B, H, S, D); the permutation that made it is undone, not repeated."""
    perm: tuple[int, ...] = _SWAPPED
    match graph.view(node, 1):
        case Permute(Value(node=fx.Node() as inner), dims):
            node, perm = inner, tuple(dims[i] for i in _SWAPPED)
    value = Value(node=node)
    return value if perm == tuple(range(4)) else Permute(value, perm, target=aten.permute.default)


def _behind(graph: Graph, node: fx.Node, *, any_cast: bool = False) -> fx.Node:
    """The value in front of copies, dropouts that drop nothing and casts to the dtype that it has, or of `any_cast`."""
    while isinstance(graph.view(node, 1), Identity) or (
        node.target in CASTS and (any_cast or _dtype(node) == _dtype(node.args[0]))
    ):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _check_readers(product: fx.Node, last: fx.Node) -> None:
    """
    Raises:
        Refuse: a value between the scores and the result has another reader.
    """
    node = product
    while node is not last:
        readers = [user for user in Graph.consumers(node) if user.target not in CHECKS]
        if len(readers) != 1:
            other = next((r for r in readers if r.op == "output"), readers[-1])
            raise Refuse("its scores or weights are read elsewhere, too", blocker=other)
        node = readers[0]


def _sizes(node: object) -> tuple[str, ...] | None:
    """As text, because comparing symbols would fix them."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(map(str, val.shape)) if isinstance(val, Tensor) else None


def _rank(node: fx.Node) -> int | None:
    sizes = _sizes(node)
    return None if sizes is None else len(sizes)


def _dtype(node: object) -> torch.dtype | None:
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val.dtype if isinstance(val, Tensor) else None
