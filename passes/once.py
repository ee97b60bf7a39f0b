"""A norm that is computed twice is computed once.

γ₁ N(x) and γ₂ N(x), with both gains folded away, are N(x) and N(x)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from normfuse.ir.aliases import is_returned
from normfuse.ir.passes import Rewriting
from normfuse.ir.views import GroupNorm, LayerNorm, RmsNorm

__all__ = ["norms_once"]

RULE = "norm_of_one_value"


def norms_once(work: Rewriting) -> None:
    """Two norms of one value with the same constants are one.

    Results of the model stay two: writing to one must not change the other.
    """
    first: dict[Any, fx.Node] = {}
    for node in work.graph:
        if not isinstance(work.graph.view(node, 1), (LayerNorm, RmsNorm, GroupNorm)) or is_returned(node):
            continue
        key = (node.target, *map(repr, node.args), *map(repr, sorted(node.kwargs.items())))
        earlier = first.setdefault(key, node)
        if earlier is not node and work.permits(RULE, node):
            work.done(RULE, node, f"it is {work.graph.path(earlier)}")
            node.replace_all_uses_with(earlier)
