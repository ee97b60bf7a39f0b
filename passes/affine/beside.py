"""An affine beside a convolution of the same value: the convolution takes it over, and the value itself is added.

    W ∗ x + b + (s x + t)  =  (W + (s − 1) δ) ∗ x + (b + t) + x

For graphs that are written back into modules, where branches cannot become one: the sum stays, and the norm in it is an identity.
δ is the unit kernel. Source: Ding et al., RepVGG, arXiv 2101.03697, section 3.3, with the residual kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import suppress

from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import Affine, Conv, Value
from normfuse.passes.affine.into_producer import beside
from normfuse.passes.affine.parallel import check_compatible, outermost, sum_of_kernels, terms_of, unit_branch, weighted_branch

__all__ = ["RULE", "Beside"]

RULE = "affine_beside_conv"


class Beside(Pass):
    """s x + t beside W ∗ x: the convolution takes s − 1 and t, and x stays."""

    name = "beside"
    rule = RULE

    def sites(self, graph: Graph) -> Iterable[fx.Node]:
        return graph if graph.tree is not None else ()

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        op = graph.view(node, 2)
        if not isinstance(op, Affine) or op.x.node is None or len(node.users) != 1:
            return None
        found = _taken(graph, node, op)
        if found is None:
            return None
        conv, new = found

        def take() -> None:
            assert op.x.node is not None
            graph.replace(conv, new)
            node.replace_all_uses_with(op.x.node)

        return Change(note=f"into {graph.path(conv)}, beside it", do=take)


def _taken(graph: Graph, node: fx.Node, op: Affine) -> tuple[fx.Node, Conv] | None:
    """The convolution beside an affine that takes it over, and what it becomes; None where none can."""
    assert graph.tree is not None
    whole = next(iter(node.users))
    while not outermost(graph, whole) and len(whole.users) == 1:
        whole = next(iter(whole.users))
    if not outermost(graph, whole):
        return None
    terms = terms_of(graph, whole)
    mine = next((t for t in terms if t[0] is node), None)
    for other, sign in terms if mine is not None else ():
        conv = graph.view(other, 2)
        if not isinstance(conv, Conv) or conv.x.node is not op.x.node or len(other.users) != 1:
            continue
        with suppress(Refuse):
            new = _with_affine(graph, (other, sign), conv, mine)  # type: ignore[arg-type]
            graph.tree.check_release(graph, node, whole=True)
            graph.check(conv, new)
            return other, new
    return None


def _with_affine(graph: Graph, lead: tuple[fx.Node, int], conv: Conv, term: tuple[fx.Node, int]) -> Conv:
    """The convolution with s − 1 on the middle of its kernel, and t; both with the sign that the term has beside it."""
    branch = weighted_branch(graph, lead)
    unit = None if branch is None else unit_branch(graph, term, branch)
    if branch is None or unit is None or unit.s is None:
        raise Refuse("it has no kernel with the middle where the affine is")
    check_compatible(graph, branch, unit)
    sign = lead[1] * term[1]
    weight = Constant.apply(sum_of_kernels, [conv.W], [(unit.s - 1.0) * float(sign)], branch.size, branch.groups)
    shift = None if unit.b is None else unit.b * float(sign)
    bias = conv.b if shift is None else shift.cast(conv.W.dtype).named(beside(conv.W)) if conv.b is None else conv.b + shift
    return dataclasses.replace(conv, node=None, x=Value(node=conv.x.node), W=weight, b=bias)
