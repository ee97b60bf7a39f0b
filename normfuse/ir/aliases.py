"""Which values may share memory: an output that is a copy of an input, of a weight or of another output has to stay one."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["always_shares", "copy_is_needed", "is_returned", "may_share"]

aten = torch.ops.aten

# share memory with their operand now and then, which their schema does not say, or says as if it were always
_UNDECLARED = {
    *("type_as", "_unsafe_view", "dropout", "feature_dropout", "alpha_dropout", "einsum", "meshgrid", "broadcast_tensors"),
    *("sum_to_size", "atleast_1d", "atleast_2d", "atleast_3d", "cartesian_prod"),
}
_SOMETIMES = {
    "contiguous",
    "to",
    "reshape",
    "reshape_as",
    "flatten",
    "type_as",
    "einsum",
    "sum_to_size",
    "resolve_conj",
    "resolve_neg",
}


def may_share(node: fx.Node) -> bool:
    """May the value lie in the memory of an operand? So may that of anything which is no operator of PyTorch."""
    target: Any = node.target
    if node.op in ("call_method", "call_module") or target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in target._schema.returns) or _name(target) in _UNDECLARED


def always_shares(node: fx.Node) -> bool:
    """Is the value a view, or its operand itself, whatever the operand is?"""
    return may_share(node) and isinstance(node.target, torch._ops.OpOverload) and _name(node.target) not in _SOMETIMES


def is_returned(node: fx.Node, without: fx.Node | None = None) -> bool:
    """May an output share memory with the value, by another way than through `without`?"""
    return any(reader.op == "output" for reader in _readers(node, without))


def copy_is_needed(node: fx.Node) -> bool:
    """Would an output share memory with an input, a constant or another output if the operand stood in the place of `node`?"""
    if always_shares(node) or not is_returned(node):
        return False
    sources = [root for x in node.all_input_nodes for root in _roots(x)]
    return any(s.op in ("placeholder", "get_attr") or is_returned(s, without=node) for s in sources)


def _readers(node: fx.Node, without: fx.Node | None) -> Iterator[fx.Node]:
    """Who reads the memory of a value, through views too."""
    seen: set[fx.Node] = set()
    work = [node]
    while work:
        for user in work.pop().users:
            if user is without or user in seen:
                continue
            seen.add(user)
            yield user
            if may_share(user):
                work.append(user)


def _roots(node: fx.Node) -> Iterator[fx.Node]:
    """The values whose memory `node` may lie in."""
    seen: set[fx.Node] = set()
    work = [node]
    while work:
        at = work.pop()
        if at in seen:
            continue
        seen.add(at)
        if may_share(at):
            work += at.all_input_nodes
        else:
            yield at


def _name(target: torch._ops.OpOverload) -> str:
    return str(target._schema.name).removeprefix("aten::")
