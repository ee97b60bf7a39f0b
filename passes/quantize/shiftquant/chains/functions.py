"""Functions of one value that go into the step in front of them: bounds of its codes, or a table of 256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["KERNELS", "Bounds", "bounds", "is_function", "values"]

aten = torch.ops.aten

_FUNCTIONS = {
    aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default,
    aten.gelu.default, aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.softplus.default,
}  # fmt: skip


#: Those that kernels compute in float; the others are tables.
KERNELS = {aten.silu.default: "silu", aten.hardswish.default: "hardswish"}


@dataclass(frozen=True)
class Bounds:
    """Values are cut to low … high, where there are such."""

    low: float | None = None
    high: float | None = None

    @property
    def none(self) -> bool:
        return self.low is None and self.high is None


def bounds(node: fx.Node) -> Bounds | None:
    """Those that a ReLU or a clamp means; None for any other operator."""
    if node.target is aten.relu.default:
        return Bounds(0.0, None)
    if node.target is aten.relu6.default:
        return Bounds(0.0, 6.0)
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
        missing = (-1.0, 1.0) if node.target is aten.hardtanh.default else (None, None)
        positional = (*node.args[1:], *missing[len(node.args) - 1 :])
        found = [node.kwargs.get(name, value) for name, value in zip(names, positional, strict=True)]
        if all(v is None or isinstance(v, (int, float)) for v in found):
            low, high = (float(v) if isinstance(v, (int, float)) else None for v in found)
            return Bounds(low, high)
    return None


def is_function(node: fx.Node) -> bool:
    """Is it a function of each value by itself, with numbers for parameters?"""
    return node.target in _FUNCTIONS and len(node.all_input_nodes) == 1


def values(node: fx.Node, x: Tensor) -> Tensor:
    """The function of `node` at x."""
    target: Any = node.target
    y: Tensor = target(x, *node.args[1:], **node.kwargs)
    return y
