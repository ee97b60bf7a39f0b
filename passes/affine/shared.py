"""A weight that several operators read: rewriting it for one of them stores it once more, which is refused where that costs."""

from __future__ import annotations

from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Embedding

__all__ = ["check_shared", "holds_back"]

_UNTIE = 1 << 16  # bytes: storing a shared weight once more is refused above this


def holds_back(graph: Graph, c: Constant, node: fx.Node | None) -> fx.Node | None:
    """Who else reads the weight of a node, if it is large, or a table that a tied head reads too; None if it may be stored anew."""
    others = [n for n in graph.readers_of(c) if n is not node]
    if not others:
        return None
    large = c.numel * c.dtype.itemsize > _UNTIE
    readers = others if node is None else [*others, node]
    return others[0] if large or any(isinstance(graph.view(n, 1), Embedding) for n in readers) else None


def check_shared(graph: Graph, c: Constant, node: fx.Node | None, doing: str, name: str = "") -> None:
    """Refuse to do that to the weight of a node where it would be stored twice; `name` is for a weight without one."""
    other = holds_back(graph, c, node)
    if other is not None:
        size = c.numel * c.dtype.itemsize
        reason = f"{c.name or name} is shared with {graph.path(other)}; {doing} would store its {size / 1e6:.1f} MB twice"
        raise Refuse(reason, blocker=node, remedy="untie the weight before optimize")
