"""What the passes of this folder have in common: sites are looked at in the graph as it is by then."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from normfuse.ir.graph import Graph
from normfuse.ir.operators import CHECKS
from normfuse.ir.passes import Pass

__all__ = ["Fusion", "take_place"]


class Fusion(Pass):
    """A pass whose rewrites make sites of their own: a product that reads codes may be the next one to write some."""

    leaves_affines = False

    def sites(self, graph: Graph) -> Iterable[fx.Node]:
        return graph.fx.nodes


def take_place(graph: Graph, old: fx.Node, new: fx.Node) -> None:
    """`new` for everybody who read `old`, which goes away at once: it must not count as a reader of its operands."""
    if "dtypes" in old.meta:
        new.meta.setdefault("dtypes", old.meta["dtypes"])
    for check in [user for user in old.users if user.target in CHECKS]:
        graph.fx.erase_node(check)  # of a dtype, which codes do not have
    old.replace_all_uses_with(new)
    graph.fx.erase_node(old)
