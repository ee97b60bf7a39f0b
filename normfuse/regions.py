"""Regions that `torch.export` keeps apart, written back into the graph: autocast that is off, and gradients that are on or off.

    with torch.autocast("cpu", enabled=False): ...     with torch.no_grad(): ...     @torch.no_grad() on a method

Nothing of normfuse runs under autocast or asks for gradients, so such a region is the graph it holds. Rotary positions and linear
attention are often written so. A region that switches autocast on is another computation and stays.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

__all__ = ["inline_regions"]

_hop = torch.ops.higher_order
_BODY: dict[Any, int] = {
    _hop.wrap_with_autocast: 4,
    _hop.wrap_with_set_grad_enabled: 1,
}  # position of the body; its arguments follow


def inline_regions(gm: fx.GraphModule) -> int:
    """Write each such region into the graph around it, in place, regions inside regions too; returns how many there were."""
    count = 0
    while (node := next((n for n in gm.graph.nodes if _says_nothing(gm, n)), None)) is not None:
        _inline(gm, node)
        count += 1
    return count


def _says_nothing(gm: fx.GraphModule, node: fx.Node) -> bool:
    on = node.target is _hop.wrap_with_autocast and node.args[2] is not False
    return node.target in _BODY and not on and _body(gm, node) is not None


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    held = node.args[_BODY[node.target]]
    found = getattr(gm, str(held.target), None) if isinstance(held, fx.Node) and held.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    body = _body(gm, node)
    assert body is not None
    names = {str(n.target): _adopted(gm, body, str(n.target)) for n in body.graph.nodes if n.op == "get_attr"}
    first = _BODY[node.target]
    inside = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[first + 1 :], strict=True))
    results: Any = ()
    with gm.graph.inserting_before(node):
        for n in body.graph.nodes:
            if n.op == "output":
                results = fx.node.map_arg(n.args[0], lambda a: inside[a])
            elif n.op != "placeholder":
                inside[n] = new = gm.graph.node_copy(n, lambda a: inside[a])
                if n.op == "get_attr":
                    new.target = names[str(n.target)]
    held = node.args[first]
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results)
    gm.graph.erase_node(node)
    if isinstance(held, fx.Node) and not held.users:
        gm.graph.erase_node(held)


def _adopted(gm: fx.GraphModule, body: fx.GraphModule, path: str) -> str:
    """What the region holds under `path`, held by the graph around it; its name there."""
    value: Any = body
    for part in path.split("."):
        value = getattr(value, part)
    count = 0
    while hasattr(gm, name := f"region_{path.replace('.', '_')}_{count}"):
        if getattr(gm, name) is value:
            return name
        count += 1
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value)
    else:
        setattr(gm, name, value)
    return name
