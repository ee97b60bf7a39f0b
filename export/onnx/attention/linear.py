"""Linear layers in an ONNX graph: x W + b over a tensor (B, L, C)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from normfuse.export.onnx.build import Numbers, const_of, dims, given, same_size

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Linear", "linear_of"]


@dataclass(frozen=True)
class Linear:
    """x W + b.

    Attributes:
        x: (B, L, C).
        weight: (C, N).
        bias: (N,) or None.
    """

    x: ir.Value
    weight: Numbers
    bias: Numbers | None


def linear_of(value: ir.Value | None) -> Linear | None:
    """The linear that makes `value` (B, L, N); None when something else does, or when its weight is computed."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain:
        return None
    if node.op_type == "Add":
        for product, bias in (node.inputs, reversed(node.inputs)):
            b = const_of(bias)
            if b is not None and b.ndim == 1 and (found := linear_of(product)) is not None and found.bias is None:
                return Linear(found.x, found.weight, b) if b.size == found.weight.shape[1] else None
        return None
    if node.op_type in ("Mul", "Div"):
        return _scaled(node)
    if node.op_type == "MatMul":
        weight = _matrix(node.inputs[1])
        x = given(node)
        if weight is None or weight.ndim != 2 or x.shape is None or len(x.shape) != 3:
            return None
        return Linear(x, weight, None)
    if node.op_type == "Reshape":
        return _flattened(value, given(node))
    return None


def _scaled(node: ir.Node) -> Linear | None:
    """(x W + b) s = x (W s) + b s for a number s"""
    for product, factor in (node.inputs, reversed(node.inputs)) if node.op_type == "Mul" else (node.inputs,):
        s = const_of(factor)
        if s is not None and s.size == 1 and (found := linear_of(product)) is not None:
            s = s.reshape(()) if node.op_type == "Mul" else 1 / s.reshape(())
            return Linear(found.x, found.weight * s, None if found.bias is None else found.bias * s)
    return None


def _flattened(value: ir.Value, inner: ir.Value) -> Linear | None:
    """(B, L, C) -> (B·L, C) -> Gemm or MatMul + Add -> (B·L, N) -> (B, L, N)."""
    node, bias = inner.producer(), None
    if node is not None and node.op_type == "Add" and not node.domain:
        for product, other in (node.inputs, reversed(node.inputs)):
            bias = const_of(other)
            if bias is not None and bias.ndim == 1:
                node = None if product is None else product.producer()
                break
    if node is None or node.domain or node.op_type not in ("Gemm", "MatMul"):
        return None
    weight = _matrix(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        attributes = {k: a.value for k, a in node.attributes.items()}
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return None
        weight = weight.T if attributes.get("transB", 0) else weight
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            own = const_of(node.inputs[2])
            if bias is not None or own is None:
                return None
            bias = np.broadcast_to(own.reshape(-1), (weight.shape[1],))
    flat = given(node).producer()
    if flat is None or flat.op_type != "Reshape" or flat.domain:
        return None
    x = given(flat)
    before, after = dims(x), dims(value)
    if before is None or after is None or len(before) != 3 or len(after) != 3:
        return None
    if not (
        same_size(before[0], after[0])
        and same_size(before[1], after[1])
        and before[2] == weight.shape[0]
        and after[2] == weight.shape[1]
    ):
        return None
    return Linear(x, weight, bias)


def _matrix(value: ir.Value | None) -> Numbers | None:
    constant = const_of(value)
    if constant is not None:
        return np.asarray(constant)
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose" and not node.domain and (inner := const_of(node.inputs[0])) is not None:
        perm = node.attributes["perm"].value if "perm" in node.attributes else None
        return np.transpose(inner, perm)
    return None
