"""Which dtype a value has, as far as a graph without shapes guarantees it: `node.meta["dtype"]`, `node.meta["floating"]`.

Seeds are the weights: a product takes no operand of another dtype, so what a convolution reads has the dtype of its kernel.
An input that only meets numbers may be an image of integers; nothing is said of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from normfuse.constants import Constant
from normfuse.decode import MOVEMENTS, PERMUTES, RESHAPES
from normfuse.graph import Graph
from normfuse.views import (
    Add,
    Addmm,
    Affine,
    AvgPool,
    BatchNorm,
    Cat,
    Conv,
    ConvTranspose,
    Div,
    Embedding,
    GlobalAvgPool,
    GroupNorm,
    Identity,
    InstanceNorm,
    LayerNorm,
    LeakyRelu,
    Linear,
    MatMul,
    MaxPool,
    Mean,
    Movement,
    Mul,
    Neg,
    Op,
    Pad,
    Permute,
    Relu,
    Reshape,
    RmsNorm,
    Sdpa,
    Softmax,
    Sub,
    Value,
)  # fmt: skip

__all__ = ["default_eps", "dtype_of", "infer_dtypes", "is_floating", "may_be_floating"]

aten = torch.ops.aten

_NORMS = (BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RmsNorm)
# results have the dtype of the operand, whatever it is
_KEEP = (
    Affine, AvgPool, GlobalAvgPool, Identity, LeakyRelu, MaxPool, Mean, Movement, Neg, Pad, Permute, Relu, Reshape, Softmax, *_NORMS
)  # fmt: skip
# these take floating values only
_FLOATING = (AvgPool, GlobalAvgPool, LeakyRelu, Mean, Softmax, *_NORMS)
_ACTIVATIONS = {
    *("gelu", "silu", "elu", "selu", "celu", "mish", "hardswish", "softplus", "prelu", "log_sigmoid", "hardsigmoid"),
}
# floating values keep their dtype, integers become the default one
_FUNCTIONS = {"sigmoid", "tanh", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "erf", "expm1", "log1p", "atan"}
_VIEWS = RESHAPES | PERMUTES | MOVEMENTS


def dtype_of(value: Value) -> torch.dtype | None:
    """The dtype of a value; None where it is unknown."""
    if value.node is None:
        return None
    val = value.node.meta.get("val")
    found: torch.dtype | None = val.dtype if isinstance(val, Tensor) else value.node.meta.get("dtype")
    return found


def is_floating(value: Value) -> bool:
    """Is it known to be real and floating?"""
    dtype = dtype_of(value)
    return dtype.is_floating_point if dtype is not None else bool(value.node is not None and value.node.meta.get("floating"))


def may_be_floating(value: Value) -> bool:
    """Is it not known to be anything else?"""
    dtype = dtype_of(value)
    return dtype is None or dtype.is_floating_point


def default_eps(dtype: torch.dtype) -> float:
    """What `rms_norm` adds with eps=None: the epsilon of the dtype that it computes in, which is float32 for the half ones."""
    return torch.finfo(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype).eps


def infer_dtypes(graph: Graph) -> None:
    """Fill in what follows wherever the trace has left no dtype."""
    nodes = [n for n in graph if "val" not in n.meta]
    for node in nodes:
        constant = graph.constant(node)
        if constant is not None:
            node.meta["dtype"] = constant.dtype
    views = {n: graph.view(n, 1) for n in nodes if n.op == "call_function"}
    changed = bool(views)
    while changed:
        forward = [_set(n, *_result(graph, n, views[n])) for n in views]
        backward = [_set(x, dtype, floating) for n in reversed(views) for x, dtype, floating in _demands(n, views[n])]
        changed = any(forward) or any(backward)


def _set(node: fx.Node, dtype: torch.dtype | None, floating: bool) -> bool:
    if "val" in node.meta:
        return False
    new = False
    if dtype is not None and "dtype" not in node.meta:
        node.meta["dtype"], new = dtype, True
    if floating and not node.meta.get("floating"):
        node.meta["floating"], new = True, True
    return new


def _fact(value: Any) -> tuple[torch.dtype | None, bool]:
    return (dtype_of(value), is_floating(value)) if isinstance(value, Value) else (None, False)


def _result(graph: Graph, node: fx.Node, op: Value) -> tuple[torch.dtype | None, bool]:
    """The dtype of a result, and whether it is floating."""
    match op:
        case Embedding(W=W):
            return W.dtype, W.dtype.is_floating_point
        case Conv(W=W) | ConvTranspose(W=W) | Linear(W=W) | Addmm(W=W) | MatMul(y=Constant() as W) | MatMul(x=Constant() as W):
            return W.dtype, W.dtype.is_floating_point
        case MatMul(x=x) | Sdpa(q=x):
            return _fact(x)
        case Cat(xs):
            facts = [_fact(x) if isinstance(x, Value) else (x.dtype, x.dtype.is_floating_point) for x in xs]
            return facts[0] if len(set(facts)) == 1 else (None, any(f for _, f in facts))
        case Add(x, y) | Sub(x, y) | Mul(x, y) | Div(x, y):
            return _arithmetic(x, y, divides=isinstance(op, Div))
        case Op() if isinstance(op, _KEEP):
            dtype, floating = _fact(op.x)
            given = op.dtype if isinstance(op, (Mean, Softmax)) else None
            return (dtype if given is None else given), floating or isinstance(op, _FLOATING)
    name = str(node.target._schema.name).removeprefix("aten::") if isinstance(node.target, torch._ops.OpOverload) else ""
    first = Value(node=node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if node.target is aten.to.dtype and isinstance(node.args[1], torch.dtype):
        return node.args[1], node.args[1].is_floating_point
    if name in _ACTIVATIONS or name in _FUNCTIONS:
        dtype, floating = _fact(first)
        return (dtype if floating else None), True
    return _fact(first) if node.target in _VIEWS or name in ("dropout", "relu6", "hardtanh", "clamp") else (None, False)


def _arithmetic(x: Any, y: Any, *, divides: bool) -> tuple[torch.dtype | None, bool]:
    """Numbers do not promote a floating value; a tensor without axes does not either, if the other has axes."""
    values = [v for v in (x, y) if not isinstance(v, (int, float))]
    facts = [_fact(v) if isinstance(v, Value) else (v.dtype, v.dtype.is_floating_point) for v in values]
    floating = any(f for _, f in facts) or divides or any(isinstance(v, float) for v in (x, y))
    dtypes = {d for d, _ in facts}
    if len(dtypes) == 1 and all(f for _, f in facts):
        return facts[0][0], True
    return None, floating


def _demands(node: fx.Node, op: Value) -> list[tuple[fx.Node, torch.dtype | None, bool]]:
    """What operands must be for the operator to take them at all."""
    found: list[tuple[Any, torch.dtype | None, bool]] = []
    match op:
        case Conv(x, W) | ConvTranspose(x, W) | Linear(x, W) | Addmm(_, x, W) | MatMul(Value() as x, Constant() as W):
            found = [(x, W.dtype, W.dtype.is_floating_point)]
        case MatMul(Constant() as W, Value() as x):
            found = [(x, W.dtype, W.dtype.is_floating_point)]
        case MatMul(Value() as x, Value() as y):
            found = [(x, *_fact(y)), (y, *_fact(x))]
        case Op() if isinstance(op, _KEEP) and not (isinstance(op, (Mean, Softmax)) and op.dtype is not None):
            dtype, floating = _fact(Value(node=node))
            found = [(op.x, dtype, floating or isinstance(op, _FLOATING))]
        case _ if isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], fx.Node):
            if str(node.target._schema.name).removeprefix("aten::") in _ACTIVATIONS:
                found = [(Value(node=node.args[0]), *_fact(Value(node=node)))]
    return [(v.node, dtype, floating) for v, dtype, floating in found if isinstance(v, Value) and v.node is not None]
