"""What depends on constants only is computed once: f(constants) is a constant.

Everything inside is float64, whatever the model casts to on the way; the result is stored in the dtype that the
operator has in the model. Sizes come from the trace or, in a graph without shapes, from the constants themselves.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.constants import Constant
from normfuse.graph import Graph
from normfuse.views import Identity

__all__ = ["CASTS", "CHECKS", "Folding"]

aten = torch.ops.aten

CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.lift_fresh_copy.default,
}

CHECKS = {aten._assert_tensor_metadata.default, aten._assert_async.msg, aten.sym_constrain_range_for_size.default}

_GROWTH = 1 << 16  # values: a result larger than its operands is stored up to this size
_BITS = {aten.view.dtype}  # reads the bits of a dtype, which float64 does not have
_STATISTICS = {aten.batch_norm.default, aten.instance_norm.default}  # write running statistics where they are given any
_OBJECTIONS = (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError)


class Folding:
    """Replaces operators on constants, each equal one by the same constant.

    Args:
        graph: the graph to rewrite.
    """

    rule = "constant_folding"

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._done: dict[Any, tuple[Constant, Any]] = {}

    def __call__(self, node: fx.Node) -> fx.Node | None:
        """f(constants) = a constant, where that is no larger than its operands together, or small; the node that reads it."""
        if _number(self._graph, node):
            return None
        value = self._value(node)
        if value is None or not self._graph.permit(self.rule, self._graph.path(node)):
            return None
        return self._graph.replace(node, value)

    def _value(self, node: fx.Node) -> Constant | None:
        call, piece = _call(node)
        if call is None or not _pure(call):
            return None
        constants = [self._graph.constant(n) for n in call.all_input_nodes]
        operands = [c for c in constants if c is not None]
        if not operands or len(operands) < len(constants):
            return None
        if isinstance(self._graph.view(call, 1), Identity):
            return operands[0]
        like = _like(self._graph, node, call, piece)
        if like is None or like.numel() > max(_GROWTH, sum(c.numel for c in operands)):
            return None
        args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), self._graph.constant)  # type: ignore[arg-type]
        key = (call.target, piece, like.dtype, repr(_identified((args, kwargs))))
        if key not in self._done:
            value = _evaluated(call.target, piece, args, kwargs, like)
            if value is None:
                return None
            self._done[key] = value, operands  # which keeps the operands, and so their ids, alive
        return self._done[key][0]


def _call(node: fx.Node) -> tuple[fx.Node | None, int | None]:
    """The operator that a node calls, and which of its results the node is; one whose pieces are taken has no own value."""
    if node.op != "call_function":
        return None, None
    if node.target is operator.getitem:
        whole, piece = node.args
        single = isinstance(whole, fx.Node) and isinstance(piece, int) and isinstance(whole.target, torch._ops.OpOverload)
        return (whole, piece) if single else (None, None)  # type: ignore[return-value]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, None
    returns = node.target._schema.returns
    return (node, None) if len(returns) == 1 and str(returns[0].type) == "Tensor" else (None, None)


def _pure(call: fx.Node) -> bool:
    target: Any = call.target
    if torch.Tag.nondeterministic_seeded in target.tags or target in _BITS:
        return False
    if target in _STATISTICS:
        return all(a is None for a in call.args[3:5])
    return not target._schema.is_mutable


def _like(graph: Graph, node: fx.Node, call: fx.Node, piece: int | None) -> Tensor | None:
    """Shape and dtype of the result in the model, without data."""
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return val if all(isinstance(d, int) for d in val.shape) else None

    def empty(n: fx.Node) -> Any:
        c = graph.constant(n)
        assert c is not None
        return torch.empty(c.shape, dtype=c.dtype, device="meta")

    args, kwargs = fx.node.map_arg((call.args, dict(call.kwargs)), empty)
    try:
        out: Any = call.target(*args, **kwargs)  # type: ignore[operator]
        out = out if piece is None else out[piece]
    except _OBJECTIONS:
        return None
    return out if isinstance(out, Tensor) else None


def _evaluated(target: Any, piece: int | None, args: Any, kwargs: Any, like: Tensor) -> Constant | None:
    if target in CASTS:
        return _cast(args[0], like.dtype)
    args, kwargs = torch.utils._pytree.tree_map(_wide, (args, kwargs))

    def function(*a: Any, **k: Any) -> Any:
        out = target(*a, **k)
        return out if piece is None else out[piece]

    try:
        value = Constant.apply(function, *args, **kwargs).cast(like.dtype)
    except _OBJECTIONS:
        return None  # an operator that has no float64 or no shape inference stays as it is
    return value.named(_as_weight(value.name))


def _cast(source: Constant, dtype: torch.dtype) -> Constant:
    if source.dtype.is_floating_point and dtype.is_floating_point:
        return source.cast(dtype)
    exact = torch.float64 if dtype.is_floating_point else dtype
    return Constant.apply(lambda v: v.to(exact), source).cast(dtype)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _identified(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda v: id(v) if isinstance(v, Constant) else v, value)


def _as_weight(name: str) -> str:
    """`conv.parametrizations.weight.original0`, `conv.weight_v`: what is evaluated is `conv.weight`."""
    name = re.sub(r"\bparametrizations\.(\w+)\..*$", r"\1", name)
    return re.sub(r"\bweight_(g|v|orig)$", "weight", name)


def _number(graph: Graph, node: fx.Node) -> bool:
    """Put a size of a constant, or arithmetic on such sizes, as a number into whatever reads it."""
    value: Any = None
    if node.target is aten.sym_size.int and isinstance(node.args[0], fx.Node):
        constant = graph.constant(node.args[0])
        value = None if constant is None else constant.shape[node.args[1]]  # type: ignore[index]
    elif node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator" and not node.all_input_nodes:
        whole = all(isinstance(a, int) for a in node.args)
        value = node.target(*node.args) if whole else None  # type: ignore[operator]
    if value is None:
        return False
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, dict(user.kwargs)), lambda n: value if n is node else n)
    return True
