"""Norms inside of regions (`torch.cond`, autocast that is on) stay, and the report says that they are there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from normfuse.ir.census import NORMS, regions
from normfuse.ir.graph import Graph
from normfuse.reports.model import Site

__all__ = ["enclosed"]

_REGIONS = {
    torch.ops.higher_order.cond: "a branch of torch.cond",
    torch.ops.higher_order.wrap_with_autocast: "a region under autocast",
}


def enclosed(graph: Graph) -> Iterator[Site]:
    """A refusal for each norm that a rewrite does not reach, regions inside regions too."""
    for user, body in regions(graph):
        for node in body:
            if isinstance(body.view(node, 1), NORMS):
                yield _site(user, body, node)
        yield from enclosed(body)


def _site(user: fx.Node, body: Graph, node: fx.Node) -> Site:
    where = next((text for region, text in _REGIONS.items() if user.target is region), "a region of its own")
    return Site("enclosed", body.path(node), f"stands in {where}, into which no rewrite looks", remedy="take the norm out of it")
