"""Regions that `torch.export` keeps apart, written back into the graph: autocast, and gradients that are on or off.

    with torch.autocast("cpu", enabled=False): ...     with torch.no_grad(): ...     @torch.no_grad() on a method

Nothing of normfuse runs under autocast or asks for gradients, so such a region is the graph it holds. Rotary positions and linear
attention are often written so. A region that switches autocast on is the graph it holds with the casts that autocast makes
(`normfuse.capture.autocasts`); it stays where these cannot be told.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from normfuse.capture.autocasts import state_casts

__all__ = ["inline_regions", "name_operands"]

_hop = torch.ops.higher_order
_BODY: dict[Any, int] = {
    _hop.wrap_with_autocast: 4,
    _hop.wrap_with_set_grad_enabled: 1,
}  # position of the body; its arguments follow


def inline_regions(gm: fx.GraphModule) -> int:
    """Write each such region into the graph around it, in place, regions inside regions too; returns how many there were."""
    count = 0
    while (found := next(_plain(gm, tuple(_BODY)), None)) is not None:
        _inline(gm, *found)
        count += 1
    return count


def name_operands(gm: fx.GraphModule) -> None:
    """Call the operands of regions that stay `value_0`, …, in place: torch names them after operators that may be gone by then."""
    for held in gm.graph.find_nodes(op="get_attr"):
        body = getattr(gm, str(held.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        named = fx.GraphModule(body, copy.deepcopy(body.graph))
        for old, new in zip(body.graph.nodes, named.graph.nodes, strict=True):
            new.meta = dict(old.meta)
        for i, node in enumerate(named.graph.find_nodes(op="placeholder")):
            node.target = node.name = f"value_{i}"
        named.recompile()
        name_operands(named)
        setattr(gm, str(held.target), named)


def _plain(gm: fx.GraphModule, kinds: tuple[Any, ...]) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Regions of these kinds, each with a graph that means the same without it."""
    for node in gm.graph.nodes:
        body = _body(gm, node) if node.target in kinds else None
        if body is None:
            continue
        if node.target is not _hop.wrap_with_autocast or node.args[2] is False:
            yield node, body
        elif (stated := _with_casts(body, node.args[0], node.args[1])) is not None:
            yield node, stated


def _with_casts(body: fx.GraphModule, device: str, dtype: torch.dtype | None) -> fx.GraphModule | None:
    stated = fx.GraphModule(body, copy.deepcopy(body.graph))
    for old, new in zip(body.graph.nodes, stated.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    while (found := next(_plain(stated, (_hop.wrap_with_set_grad_enabled,)), None)) is not None:
        _inline(stated, *found)  # what is in it is under autocast too
    return stated if state_casts(stated, device, dtype) else None


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    held = node.args[_BODY[node.target]]
    found = getattr(gm, str(held.target), None) if isinstance(held, fx.Node) and held.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def _inline(gm: fx.GraphModule, node: fx.Node, body: fx.GraphModule) -> None:
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
