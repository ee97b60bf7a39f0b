"""Attention masks that are known before the model runs.

Hugging Face models build a boolean mask from positions on every call, and for most calls it hides nothing, or just the
future. A mask that provably does so for every size becomes no mask, or `causal`.

    sdpa(q, k, v, true)               =  sdpa(q, k, v)
    sdpa(q, k, v, j ≤ i)              =  sdpa(q, k, v, causal)
    sdpa(q, k, v, expand(true & m))   =  sdpa(q, k, v, m)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import EXPANSIONS
from normfuse.ir.passes import Change, Pass, Rewriting
from normfuse.ir.views import Sdpa, Value
from normfuse.passes.attention.index_algebra import Affine, AtLeastZero, Indexed, index_values

__all__ = ["StaticMasks"]

aten = torch.ops.aten
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


class StaticMasks(Pass):
    """Masks that hide nothing go, lower triangles become `causal`, and what is left is the part that decides."""

    name = "static_masks"
    leaves_affines = False

    def rewrite(self, work: Rewriting) -> None:
        sites = [n for n in work.graph if _mask(work.graph, n) is not None]
        known = _known(work.graph) if sites else {}
        for node in sites:
            work.attempt(self.name, node, partial(_change, work.graph, node, known))


def _known(graph: Graph) -> dict[fx.Node, Indexed]:
    """The values that depend on their indices alone."""

    def tensor(name: str) -> Tensor | None:
        found = graph.constants.get(name)
        return None if found is None or found.ndim else found.native

    return index_values(graph.fx, tensor)


def _mask(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The boolean mask of an attention, where it is computed."""
    match graph.view(node, 1):
        case Sdpa(mask=Value(node=fx.Node() as mask)) if _is_bool(mask):
            return mask
    return None


def _change(graph: Graph, node: fx.Node, known: dict[fx.Node, Indexed]) -> Change | None:
    op, mask = graph.view(node, 1), _mask(graph, node)
    assert isinstance(op, Sdpa)
    assert mask is not None
    found = known.get(mask)
    if isinstance(found, Affine) and found.fixed and found.constant:
        return Change(replace(op, mask=None, node=None), note="its mask hides nothing")
    if _is_lower_triangle(found) and not op.causal:
        return Change(replace(op, mask=None, causal=True, node=None), note="its mask hides the future")
    plain = _without_all_true(mask, known)
    if plain is not mask:
        return Change(replace(op, mask=Value(node=plain), node=None), note="a part of its mask hides nothing")
    raise Refuse("what its mask hides is known only when the model runs", blocker=mask)


def _is_lower_triangle(value: Indexed | None) -> bool:
    """Key j is seen by query i when i − j ≥ 0."""
    if not isinstance(value, AtLeastZero) or len(value.form.coefficients) < 2 or value.form.constant:
        return False
    *rest, query, key = value.form.coefficients
    return (query, key) == (1, -1) and not any(rest)


def _without_all_true(mask: fx.Node, known: dict[fx.Node, Indexed]) -> fx.Node:
    """`mask` without expansion and without conjunction with what is always true; attention broadcasts it itself."""
    node = mask
    while True:
        inner = None
        if node.target in EXPANSIONS:
            inner = node.args[0]
        elif node.target in _AND:
            for one, other in (node.args[:2], node.args[1::-1]):
                value = known.get(one) if isinstance(one, fx.Node) else None
                if isinstance(value, Affine) and value.fixed and value.constant:
                    inner = other
        if not isinstance(inner, fx.Node) or not _is_bool(inner) or inner.meta["val"].ndim < 2:
            return node
        node = inner


def _is_bool(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dtype is torch.bool
