"""Is the rewritten graph the same function? Measured in float64 (is it an identity?) and in the model's own dtype (drift)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from normfuse.errors import RewriteError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.numerics.modes import Float64, widened
from normfuse.reports.model import Error

__all__ = ["EXACT_BOUND", "decibels", "distance", "evaluate", "is_float", "like", "magnitude", "measure", "nothing_in", "shorten"]

log = logging.getLogger(__name__)

EXACT_BOUND = 1e-9
"""Relative error in float64 above which a rewrite is not an identity: 2⁻⁵² times 10⁶ for a deep network's conditioning."""


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


def measure(expected: Sequence[Tensor], found: Sequence[Tensor], dtype: str, floors: Sequence[float] | None = None) -> Error:
    """The largest deviation over all outputs; integers and booleans must agree exactly, NaN and infinity stand at the same places.

    Args:
        expected, found: outputs of two runs.
        dtype: that both ran in, for the report.
        floors: for each output, the least scale that its deviation is divided by; see `floors`. None divides by max |expected|.

    Raises:
        RewriteError: the number or the shapes of the outputs differ.
    """
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        raise RewriteError(f"outputs changed shape: {[tuple(t.shape) for t in expected]} became {[tuple(t.shape) for t in found]}")
    worst = Error(0.0, 0.0, dtype)
    for a, b, floor in zip(expected, found, floors or [0.0] * len(expected), strict=True):
        worst = worst | _deviation(a, b, dtype, floor)
    return worst


def _deviation(a: Tensor, b: Tensor, dtype: str, floor: float) -> Error:
    difference, scale = distance(a, b), max(magnitude(a), floor)
    if difference == 0.0:
        return Error(0.0, 0.0, dtype)
    if math.isinf(floor):
        return Error(difference, 0.0, dtype)
    return Error(difference, difference / scale if scale > 0 else math.inf, dtype)


def distance(a: Tensor, b: Tensor) -> float:
    """max |a − b|; 1 for integers and booleans that differ, infinite where only one is NaN or infinite."""
    if a.numel() == 0:
        return 0.0
    if not is_float(a) or not is_float(b):
        return 0.0 if torch.equal(a, b) else 1.0
    a, b = _reals(a), _reals(b)
    odd = ~a.isfinite()
    if not torch.equal(a[odd].nan_to_num(7.0), b[odd].nan_to_num(7.0)) or not bool(b[~odd].isfinite().all()):
        return math.inf
    return 0.0 if bool(odd.all()) else float((a[~odd] - b[~odd]).abs().max())


def magnitude(a: Tensor) -> float:
    """max |a| of the finite values; 1 for integers and booleans."""
    if not is_float(a):
        return 1.0
    values = _reals(a)
    values = values[values.isfinite()]
    return float(values.abs().max()) if values.numel() else 0.0


def is_float(t: Tensor) -> bool:
    """Real or complex floating point?"""
    return t.is_floating_point() or t.is_complex()


def _reals(t: Tensor) -> Tensor:
    """In float64; a complex number as two."""
    t = t.to_dense() if t.layout is not torch.strided else t
    return torch.view_as_real(t.to(torch.complex128).resolve_conj()) if t.is_complex() else t.double()


def decibels(pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
    """SQNR of found against expected floating-point outputs, 10 log₁₀ (Σ y² / Σ (y − ŷ)²); infinite if they are equal."""
    signal = noise = 0.0
    for expected, found in pairs:
        for a, b in zip(expected, found, strict=True):
            if is_float(a):
                x, y = _reals(a), _reals(b)
                finite = x.isfinite()
                signal += float(x[finite].square().sum())
                noise += float((x[finite] - y[finite]).square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def nothing_in(runs: Sequence[Sequence[Tensor]]) -> str:
    """Why a comparison with these outputs tells nothing: `nothing was compared: all outputs are zero`; empty when it does.

    Args:
        runs: the outputs of one call or of several, with other inputs.
    """
    if not runs[0]:
        return "nothing was compared: the model returns no tensor"
    silent = [_silence([outputs[i] for outputs in runs]) for i in range(len(runs[0]))]
    if not all(silent):
        return ""
    which = "the output is" if len(silent) == 1 else "all outputs are"
    return f"nothing was compared: {which} {' or '.join(dict.fromkeys(silent))}"


def _silence(runs: Sequence[Tensor]) -> str:
    """Why an output tells nothing of the model: `NaN`, `zero`, `constant`; empty when it does."""
    first = runs[0]
    if first.numel() == 0:
        return "empty"
    if is_float(first) and not bool(first.isfinite().any()):
        return "NaN or infinite"
    if not bool(first.ne(0).any()):
        return "zero"
    flat = first.reshape(-1)
    if first.numel() > 1 and bool((flat == flat[0]).all()):
        return "constant"
    if len(runs) > 1 and first.shape == runs[1].shape and bool(torch.equal(first, runs[1])):
        return "constant"
    return ""


def like(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Random inputs of the same shapes and dtypes: normal with the example's mean and spread, integers from its own values."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        if value.is_complex():
            return torch.complex(one(value.real), one(value.imag))
        if value.is_floating_point():
            x = torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu").to(value.device)
            finite = value[value.isfinite()].double()
            spread = float(finite.std()) if finite.numel() > 1 else 1.0
            centre = float(finite.mean()) if finite.numel() else 0.0
            return (x * (spread or 1.0) + centre).to(value.dtype)
        order = torch.randperm(value.numel(), generator=generator, device="cpu").to(value.device)
        return value.reshape(-1)[order].reshape(value.shape)

    return [one(v) for v in inputs]


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
