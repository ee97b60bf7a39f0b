"""ATen arithmetic becomes operators that have a kernel of their own on a GPU: `torch.ops.normfuse.*`.

    γ x / √(mean x² + ε)                          =  rms_norm(x, γ)
    x / √((Σ x² + (Σ x)²) / (d + 1) + ε)          =  crms_norm(x),            d features
    γ (x − μ) / (c mean|x − μ| + ε) + β           =  l1_norm(x, γ, β),        μ = mean x
    N(x + r), with x + r for whoever reads it     =  add_N(x, r),             N = rms_norm, crms_norm
    act(W (γ x / √(mean x² + ε)) + b)             =  rms_norm_linear(x, W diag(γ), b, act)
    exp(x) / Σ exp(x)                             =  two_pass_softmax(x)

Each rule holds over the last axis only, and what is not exactly its left side stays. `max(c mean|x − μ|, √ε)`, which the pass `l1`
writes, is no l1_norm: the two differ where a row hardly varies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import Linear, Relu, Softmax, Value
from normfuse.passes.fuse.alike import addends_of
from normfuse.passes.fuse.norm_patterns import Norm, crms_norm, dtype_of, is_row, l1_norm, over_last_axis, rms_norm, settled
from normfuse.passes.patterns.moments import is_cast

__all__ = ["KERNELS", "Kernel"]

aten = torch.ops.aten

_Rule = Callable[[Graph, fx.Node], Change | None]


class Kernel(Pass):
    """Arithmetic that is one operator of `torch.ops.normfuse`, whose name the pass has."""

    leaves_affines = False

    def __init__(self, name: str) -> None:
        self.name = name

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        return _RULES[self.name](graph, node)


# -- norms -------------------------------------------------------------------------------------------------------------


def _alone(find: Callable[[Graph, fx.Node], Norm | None]) -> _Rule:
    """N(x)"""

    def rule(graph: Graph, node: fx.Node) -> Change | None:
        found = find(graph, node)
        norm = None if found is None else settled(graph, found)
        return None if norm is None else Change(do=partial(_place_alone, graph, norm))

    return rule


def _place_alone(graph: Graph, norm: Norm) -> None:
    vectors = [norm.gain, norm.shift] if norm.op == "l1_norm" else [norm.gain]
    args = [None if v is None else graph.emit_constant(_named(graph, v, norm.last), norm.last) for v in vectors]
    rest = (norm.eps, norm.scale_const) if norm.op == "l1_norm" else (norm.eps,)
    norm.last.replace_all_uses_with(graph.call(_op(norm.op), (norm.x, *args, *rest), norm.last, norm.last))


def _with_sum(find: Callable[[Graph, fx.Node], Norm | None]) -> _Rule:
    """N(x + r), and x + r"""

    def rule(graph: Graph, node: fx.Node) -> Change | None:
        found = find(graph, node)
        norm = None if found is None else settled(graph, found)
        addends = None if norm is None else addends_of(graph, norm.x)
        return None if norm is None or addends is None else Change(do=partial(_place_with_sum, graph, norm, *addends))

    return rule


def _place_with_sum(graph: Graph, norm: Norm, a: fx.Node, b: fx.Node) -> None:
    """The operator stands where the sum stood: others may read the sum before the norm comes."""
    total = norm.x
    gain = None if norm.gain is None else graph.emit_constant(_named(graph, norm.gain, norm.last), total)
    both = graph.call(_op(f"add_{norm.op}"), (a, b, gain, norm.eps), total, norm.last)
    y, s = (graph.call(operator.getitem, (both, i), total, like) for i, like in ((0, norm.last), (1, total)))
    norm.last.replace_all_uses_with(y)
    total.replace_all_uses_with(s)


def _named(graph: Graph, c: Constant, like: fx.Node) -> Constant:
    return c if c.name else c.named(f"{graph.path(like)}.gain" if graph.path(like).replace(".", "_").isidentifier() else "gain")


# -- products and softmax ----------------------------------------------------------------------------------------------


def _rms_linear(graph: Graph, node: fx.Node) -> Change | None:
    """act(W (γ x / √(mean x² + ε)) + b)  =  act((W diag(γ) x) / √(mean x² + ε) + b)"""
    op = graph.view(node, 2)
    if not isinstance(op, Linear) or not op.x.sole_use:
        return None
    assert op.x.node is not None
    norm = rms_norm(graph, op.x.node)
    if norm is None or (norm.gain is not None and (graph.shared(op.W) or norm.gain.dtype != op.W.dtype)):
        return None
    return Change(do=partial(_place_linear, graph, norm, op, node))


def _place_linear(graph: Graph, norm: Norm, op: Linear, node: fx.Node) -> None:
    weight = op.W if norm.gain is None else op.W * norm.gain
    last, epilogue = _epilogue(graph, node)
    w = graph.emit_constant(weight, last)
    b = None if op.b is None else graph.emit_constant(op.b, last)
    last.replace_all_uses_with(graph.call(_op("rms_norm_linear"), (norm.x, w, b, norm.eps, epilogue), last, node))


def _epilogue(graph: Graph, node: fx.Node) -> tuple[fx.Node, str]:
    """The activation that alone reads a product, and its name; the product itself and "none"."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    if isinstance(graph.view(user, 1), Relu):
        return user, "relu"
    if user.target is aten.silu.default:
        return user, "silu"
    if user.target is aten.gelu.default:
        how = user.kwargs.get("approximate", user.args[1] if len(user.args) > 1 else "none")
        return (user, "gelu") if how == "none" else (user, "gelu_tanh") if how == "tanh" else (node, "none")
    return node, "none"


def _softmax(graph: Graph, node: fx.Node) -> Change | None:
    """exp(x) / Σ exp(x); a cast to a wider dtype inside and back behind it is what the operator does anyway"""
    match graph.view(node, 2):
        case Softmax(Value(node=fx.Node() as x), dim) if is_row(x) and over_last_axis(dim, x):
            last = node
        case _:
            return None
    if dtype_of(node) != dtype_of(x):
        last = next(iter(node.users)) if len(node.users) == 1 else node
        if not is_cast(last) or dtype_of(last) != dtype_of(x):
            return None
    return Change(do=partial(_place_softmax, graph, x, last, node))


def _place_softmax(graph: Graph, x: fx.Node, last: fx.Node, node: fx.Node) -> None:
    last.replace_all_uses_with(graph.call(_op("two_pass_softmax"), (x,), last, node))


_RULES: dict[str, _Rule] = {
    "rms_norm_linear": _rms_linear,
    "add_rms_norm": _with_sum(rms_norm),
    "rms_norm": _alone(rms_norm),
    "add_crms_norm": _with_sum(crms_norm),
    "crms_norm": _alone(crms_norm),
    "l1_norm": _alone(l1_norm),
    "two_pass_softmax": _softmax,
}


KERNELS: tuple[Pass, ...] = tuple(Kernel(name) for name in _RULES)
"""In this order: a norm that one linear layer alone reads is not an operator of its own, nor one behind an addition."""


def _op(name: str) -> Any:
    return getattr(torch.ops.normfuse, name).default
