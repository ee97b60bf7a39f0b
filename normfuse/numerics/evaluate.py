"""A graph is run node by node, in float64 or in the dtypes of the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.numerics.modes import Float64, widened

__all__ = ["evaluate", "shorten"]

log = logging.getLogger(__name__)

_KEPT = 1 << 16  # values of a constant that more than one operator reads


def evaluate(graph: Graph, inputs: Sequence[Any], *, exact: bool, known: Mapping[fx.Node, Any] | None = None) -> list[Tensor]:
    """Run the graph node by node; every value is freed after its last use, every constant after each use.

    Args:
        graph: the graph.
        inputs: one value for each placeholder.
        exact: in float64, constants included, and also where the model asks for a dtype of its own; else natively.
        known: constants and numbers to take for what nodes compute: where a rounding decides, float64 would decide otherwise.

    Returns:
        The tensors of the output, in order.
    """
    last = {n: node for node in graph.fx.nodes for n in node.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    result: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if exact:
            stack.enter_context(Float64())
        for node in graph.fx.nodes:
            if node.op == "get_attr":
                continue  # made where it is read: captured graphs name all their constants first
            for n in node.all_input_nodes:
                if n not in env:
                    env[n] = _constant(known[n], exact) if known and n in known else _value(graph, n, env, feed, exact)
            if node.op == "output":
                result = [v for v in pytree.tree_leaves(fx.node.map_arg(node.args[0], env.__getitem__)) if isinstance(v, Tensor)]
            elif known is not None and node in known:
                env[node] = _constant(known[node], exact)
            else:
                env[node] = _value(graph, node, env, feed, exact)
            for n in node.all_input_nodes:
                if last[n] is node or (n.op == "get_attr" and not _cheap(graph, n)):
                    env.pop(n, None)
            if node not in last:
                env.pop(node, None)
    return result


def _cheap(graph: Graph, node: fx.Node) -> bool:
    """A constant that is worth keeping until it is read again."""
    constant = graph.constants.get(str(node.target))
    return constant is None or constant.numel <= _KEPT


def _value(graph: Graph, node: fx.Node, env: dict[fx.Node, Any], feed: Any, exact: bool) -> Any:
    if node.op == "placeholder":
        value = next(feed)
        return widened(value) if exact and isinstance(value, Tensor) else value
    if node.op == "get_attr":
        constant = graph.constants.get(str(node.target))
        return graph.owned(str(node.target)) if constant is None else _constant(constant, exact)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        layer = graph.owned(str(node.target))
        return (copy.deepcopy(layer).double() if exact else layer)(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _constant(value: Any, exact: bool) -> Any:
    if not isinstance(value, Constant):
        return value
    with _disable_current_modes():  # a constant knows its own precision
        return value.value if exact else value.native


def shorten(run: Callable[[Sequence[Any]], Any], inputs: Sequence[Any], most: int = 1 << 22) -> list[Any]:
    """Inputs cut to two rows of the batch (one of two) when they hold more than `most` values and the graph takes such a slice."""
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    rows = {v.shape[0] for v in tensors if v.ndim}
    if sum(v.numel() for v in tensors) <= most or len(rows) != 1 or next(iter(rows)) == 1:
        return list(inputs)
    kept = 2 if next(iter(rows)) > 2 else 1
    few = [v[:kept] if isinstance(v, Tensor) and v.ndim else v for v in inputs]
    try:
        run(few)
    except Exception as e:  # a size is fixed in the graph: any operator may object
        log.debug("verification uses the whole batch: %s", e)
        return list(inputs)
    return few
