"""Is the rewritten graph the same function? Measured in float64 (is it an identity?) and in the model's own dtype (drift)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normfuse.errors import RewriteError
from normfuse.graph import Graph
from normfuse.report import Error

__all__ = ["EXACT_BOUND", "decibels", "evaluate", "like", "measure", "shorten"]

log = logging.getLogger(__name__)

EXACT_BOUND = 1e-9
"""Relative error in float64 above which a rewrite is not an identity: 2⁻⁵² times 10⁶ for a deep network's conditioning."""

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}


def evaluate(graph: Graph, inputs: Sequence[Any], *, exact: bool) -> list[Tensor]:
    """Run the graph node by node; every value is freed after its last use, every constant after each use.

    Args:
        graph: the graph.
        inputs: one value for each placeholder.
        exact: in float64, constants included, and also where the model asks for a dtype of its own; else natively.

    Returns:
        The tensors of the output, in order.
    """
    last = {n: node for node in graph.fx.nodes for n in node.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    result: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in graph.fx.nodes:
            if node.op == "output":
                result = [v for v in pytree.tree_leaves(fx.node.map_arg(node.args[0], env.__getitem__)) if isinstance(v, Tensor)]
            else:
                env[node] = _value(graph, node, env, feed, exact)
            for n in node.all_input_nodes:
                if last[n] is node:
                    del env[n]
            if node not in last:
                env.pop(node, None)
    return result


def _value(graph: Graph, node: fx.Node, env: dict[fx.Node, Any], feed: Any, exact: bool) -> Any:
    if node.op == "placeholder":
        value = next(feed)
        return value.double() if exact and isinstance(value, Tensor) and value.dtype in _FLOATS else value
    if node.op == "get_attr":
        constant = graph.constants.get(str(node.target))
        if constant is not None:
            return constant.value if exact else constant.native
        return _owned(graph, str(node.target), exact)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    if exact:
        args, kwargs = pytree.tree_map(
            lambda v: torch.float64 if isinstance(v, torch.dtype) and v in _FLOATS else v, (args, kwargs)
        )
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return None
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return _owned(graph, str(node.target), exact)(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _owned(graph: Graph, path: str, exact: bool) -> Any:
    found = graph.owned(path)
    return (
        copy.deepcopy(found).double() if exact and isinstance(found, nn.Module) and not isinstance(found, fx.GraphModule) else found
    )


def measure(expected: Sequence[Tensor], found: Sequence[Tensor], dtype: str) -> Error:
    """The largest deviation over all outputs; integers and booleans must agree exactly.

    Raises:
        RewriteError: the number or the shapes of the outputs differ.
    """
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        raise RewriteError(f"outputs changed shape: {[tuple(t.shape) for t in expected]} became {[tuple(t.shape) for t in found]}")
    worst = Error(0.0, 0.0, dtype)
    for a, b in zip(expected, found, strict=True):
        worst = worst | _deviation(a, b, dtype)
    return worst


def _deviation(a: Tensor, b: Tensor, dtype: str) -> Error:
    if a.numel() == 0:
        return Error(0.0, 0.0, dtype)
    if not a.is_floating_point():
        wrong = 0.0 if torch.equal(a, b) else 1.0
        return Error(wrong, wrong, dtype)
    a, b = a.double(), b.double()
    odd = ~a.isfinite()
    if not torch.equal(a[odd].nan_to_num(7.0), b[odd].nan_to_num(7.0)) or not bool(b[~odd].isfinite().all()):
        return Error(float("inf"), float("inf"), dtype)
    if bool(odd.all()):
        return Error(0.0, 0.0, dtype)
    difference = float((a[~odd] - b[~odd]).abs().max())
    scale = float(a[~odd].abs().max())
    return Error(difference, difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf")), dtype)


def decibels(pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
    """SQNR of found against expected floating-point outputs, 10 log₁₀ (Σ y² / Σ (y − ŷ)²); infinite if they are equal."""
    signal = noise = 0.0
    for expected, found in pairs:
        for a, b in zip(expected, found, strict=True):
            if a.is_floating_point():
                finite = a.isfinite()
                signal += float(a[finite].double().square().sum())
                noise += float((a[finite].double() - b[finite].double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def like(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Random inputs of the same shapes and dtypes: normal with the example's mean and spread, integers from its own values."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        if value.is_floating_point():
            x = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device)
            finite = value[value.isfinite()].double()
            spread = float(finite.std()) if finite.numel() > 1 else 1.0
            centre = float(finite.mean()) if finite.numel() else 0.0
            return (x * (spread or 1.0) + centre).to(value.dtype)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.reshape(-1)[order].reshape(value.shape)

    return [one(v) for v in inputs]


def shorten(run: Callable[[Sequence[Any]], Any], inputs: Sequence[Any], most: int = 1 << 22) -> list[Any]:
    """Inputs cut to two rows of the batch when they hold more than `most` values and the graph takes such a slice."""
    tensors = [v for v in inputs if isinstance(v, Tensor)]
    rows = {v.shape[0] for v in tensors if v.ndim}
    if sum(v.numel() for v in tensors) <= most or len(rows) != 1 or next(iter(rows)) <= 2:
        return list(inputs)
    few = [v[:2] if isinstance(v, Tensor) and v.ndim else v for v in inputs]
    try:
        run(few)
    except Exception as e:  # a size is fixed in the graph: any operator may object
        log.debug("verification uses the whole batch: %s", e)
        return list(inputs)
    return few
