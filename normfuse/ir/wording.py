"""Operators as a user knows them, for reasons and places in reports."""

from __future__ import annotations

import operator

import torch
from torch import fx

from normfuse.ir.views import affine

__all__ = ["operator_name"]


def operator_name(node: fx.Node) -> str:
    """`conv2d`, `mylib::scan`, `relu`; of one of several results the operator that gives them."""
    target = node.target
    if target is affine:
        return "a constant gain"
    if target is operator.getitem and isinstance(node.args[0], fx.Node):
        return operator_name(node.args[0])
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).removeprefix("aten::")
    if isinstance(target, str):
        return node.op if node.op in ("placeholder", "output") else target
    return str(getattr(target, "__name__", None) or node.op)
