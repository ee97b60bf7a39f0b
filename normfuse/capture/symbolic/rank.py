"""The number of dimensions of values, as far as a graph without shapes guarantees it: `node.meta["rank"]`.

Seeds are what the model demands (`nn.BatchNorm2d` takes 4-d inputs only, a permutation names every dimension) and the shapes of
constants; ops that keep the rank carry it forward and backward.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from normfuse.ir import operators
from normfuse.ir.operators import BROADCAST, PARTS, REDUCTIONS, SAME_RANK

__all__ = ["propagate_ranks"]

_LISTED = {"view", "reshape", "permute", "expand"}


def propagate_ranks(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Fill in `meta["rank"]` wherever it follows; a value whose rank is open has none."""
    for node in graph.nodes:
        if node.op == "get_attr":
            value = _attribute(root, str(node.target))
            if isinstance(value, torch.Tensor):
                node.meta["rank"] = value.ndim
    changed = True
    while changed:
        forward = [_set(node, _forward(node)) for node in graph.nodes]
        backward = [_set(x, rank) for node in reversed(graph.nodes) for x, rank in _backward(node)]
        changed = any(forward) or any(backward)
    return graph


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _set(node: fx.Node, rank: int | None) -> bool:
    if rank is None or "rank" in node.meta:
        return False
    node.meta["rank"] = rank
    return True


def _rank(value: Any) -> int | None:
    """0 for a number; None for a node whose rank is open."""
    return value.meta.get("rank", 0 if value.meta.get("kind") == "number" else None) if isinstance(value, fx.Node) else 0


def _name(node: fx.Node) -> str:
    name = operators.name(node.target) if node.op == "call_function" else ""
    return name if name.endswith("__") else name.removesuffix("_")


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _forward(node: fx.Node) -> int | None:
    name = _name(node)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _part(node.args[0])
    if not name or not node.args:
        return None
    first = node.args[0]
    x = _rank(first[0] if isinstance(first, list | tuple) and first else first)
    if name in _LISTED and isinstance(node.args[1], list | tuple):
        return len(node.args[1])
    if name in BROADCAST:
        ranks = [_rank(a) for a in node.all_input_nodes]
        return None if None in ranks else max(r for r in ranks if r is not None)
    if name == "embedding":
        indices = _rank(node.args[1])
        return None if indices is None else indices + 1
    if name == "flatten":
        return _flattened(x, _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
    if x is None:
        return None
    if name in SAME_RANK or name == "cat":
        return x
    if name in REDUCTIONS and isinstance(dims := _argument(node, 2 if name == "linalg_vector_norm" else 1, "dim"), list | tuple):
        # no dimensions named means all of them
        return x if _keeps_dims(node, name) else x - len(dims) if dims else 0
    if name in ("unsqueeze", "stack"):
        return x + 1
    if name == "select":
        return x - 1
    return x + len(node.args[2]) - 1 if name == "unflatten" and isinstance(node.args[2], list | tuple) else None


def _keeps_dims(node: fx.Node, name: str) -> bool:
    position = {"var": 3, "std": 3, "linalg_vector_norm": 3}.get(name, 2)
    return bool(_argument(node, position, "keepdim", False))


def _flattened(x: int | None, start: int, end: int) -> int | None:
    if end == -1 and start >= 0:
        # a 0-d tensor becomes 1-d as well
        return start + 1
    return None if x is None else x - ((end % x) - (start % x)) if x else 1


def _part(source: fx.Node) -> int | None:
    """Rank of one of several results."""
    x = _rank(source.args[0]) if source.args else None
    if x is None:
        return None
    name = _name(source)
    if name in PARTS or name in ("max_pool2d_with_indices", "topk"):
        return x
    return x - 1 if name == "unbind" else None


def _backward(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """Ranks of arguments that follow from the rank of the result."""
    name, out = _name(node), node.meta.get("rank")
    if not name or not node.args:
        return []
    first = node.args[0]
    if name == "permute" and isinstance(node.args[1], list | tuple):
        out, name = len(node.args[1]), "contiguous"
    if out is None:
        return []
    if name == "cat" and isinstance(first, list | tuple):
        return [(x, out) for x in first if isinstance(x, fx.Node)]
    if name in BROADCAST:
        operands = [a for a in node.all_input_nodes if a.meta.get("kind") != "number"]
        lower = [a for a in operands if (r := _rank(a)) is not None and r < out]
        # all but one operand are smaller than the result: the last one makes its rank
        return [(a, out) for a in operands if a not in lower] if len(lower) == len(operands) - 1 else []
    if not isinstance(first, fx.Node):
        return []
    shift = 0 if name in SAME_RANK else {"unsqueeze": -1, "select": 1}.get(name)
    return [] if shift is None else [(first, out + shift)]
