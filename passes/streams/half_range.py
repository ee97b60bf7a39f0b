"""What is too large for half precision becomes 2^-k times as large, which is exact.

    x_1 = x_0 + W a,   N(x_1; ε)        =   c x_1 = c x_0 + (c W) a,   N(c x_1; c² ε),      c = 2^-k

A residual stream grows from block to block; in float16 it is Inf beyond 65504, and NaN behind the next norm. What writes it, and
the ε of what reads it, take the factor, so that no node is added. How large values are is seen on the calibration data or on the
example inputs; k leaves room for others.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import default_eps
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Change, Pass, Rewriting, Samples
from normfuse.ir.views import Div, Mul, Op, RmsNorm, Value
from normfuse.numerics.observe import observe
from normfuse.passes.streams.scaled import NORMS, Scaled, closed

__all__ = ["HalfRange"]

log = logging.getLogger(__name__)

aten = torch.ops.aten

_TOP = 65504.0  # the largest float16
_ROOM = 4.0  # what is seen on a few samples may be this much larger on others
_SPARE = 16.0  # after scaling: k is not to be decided anew for every calibration
_MASKS = 1e15  # beyond this nothing is a value of a layer: masks hide with the lowest number of their dtype
_HALVES = (torch.float16, torch.bfloat16)


class HalfRange(Pass):
    """Values that float16 cannot hold, with everything that must be scaled with them."""

    name = "half_range"
    leaves_affines = False

    def rewrite(self, work: Rewriting) -> None:
        size = _sizes(work.graph, work.run.samples)
        now: dict[fx.Node, fx.Node] = {}
        seen: set[fx.Node] = set()
        for first in [n for n, largest in size.items() if largest < _MASKS]:
            node = now.get(first, first)
            if node in seen or _fits(size[node]):
                continue
            found = work.found(self.name, node, partial(closed, work.graph, node, size, _fits))
            seen |= {node} if found is None else set(found.values)
            if found is not None:
                work.attempt(self.name, node, partial(_change, work.graph, found, size, now))


def _fits(largest: float) -> bool:
    return largest * _ROOM <= _TOP


def _sizes(graph: Graph, samples: Samples) -> dict[fx.Node, float]:
    """The largest finite magnitude of each value of floats on the samples; in float64 where the model computes in halves."""
    nodes = [n for n in graph if n.op == "call_function" and _is_float(n)]
    exact = any(c.dtype in _HALVES for c in graph.constants.values())
    found: dict[fx.Node, float] = {}
    for values in samples:
        for node, largest in _observed(graph, nodes, values, exact).items():
            found[node] = max(found.get(node, 0.0), float(largest))
    return found


def _observed(graph: Graph, nodes: list[fx.Node], values: list[Any], exact: bool) -> dict[fx.Node, Tensor]:
    """In the model's own dtypes where it has no float64 form: what is Inf there is not counted, what leads to it is."""
    if exact:
        try:
            return observe(graph, nodes, values, exact=True, reduce=_largest)
        except Exception as e:
            log.info("no run in float64: %s", e)
    return observe(graph, nodes, values, reduce=_largest)


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dtype.is_floating_point


def _largest(x: Tensor) -> Tensor:
    """max |x| over what is finite; 0 of no values."""
    finite = torch.where(x.isfinite(), x.abs(), torch.zeros((), dtype=x.dtype))
    return finite.amax().double() if x.numel() else torch.zeros((), dtype=torch.float64)


def _change(graph: Graph, found: Scaled, size: dict[fx.Node, float], now: dict[fx.Node, fx.Node]) -> Change:
    k = math.ceil(math.log2(found.largest * _SPARE / _TOP))
    norms = sum(isinstance(graph.view(n, 1), NORMS) for n in found.readers)
    note = (
        f"{len(found.values)} values up to {found.largest:.3g} are 2^-{k} times as large: in the weights of {len(found.writers)} "
        f"that write them and {len(found.readers) - norms} that read them, and in ε of {norms} norms"
    )
    added = len(found.entries) + len(found.exits)
    return Change(note=note + (f"; {added} products more" if added else ""), do=partial(_scale, graph, found, k, size, now))


def _scale(graph: Graph, found: Scaled, k: int, size: dict[fx.Node, float], now: dict[fx.Node, fx.Node]) -> None:
    """Carry it out; `size` and `now`, the node in the place of each, are kept up to date for the sets that follow."""
    c = 2.0**-k
    for node in found.values:
        size[node] = size.get(node, 0.0) * c
    for edges, factor in ((found.entries, c), (found.exits, 1 / c)):
        made: dict[fx.Node, fx.Node] = {}
        for user, operand in edges:
            if operand not in made:
                made[operand] = _times(graph, operand, factor, user)
                size[made[operand]] = size.get(operand, 0.0) * factor
            user.replace_input_with(operand, made[operand])
    origin = {new: old for old, new in now.items()}
    for node in dict.fromkeys((*found.writers, *found.readers)):
        op = graph.view(node, 1)
        assert isinstance(op, Op)
        new = graph.replace(node, _with(op, c if node in found.readers else 1.0, c if node in found.writers else 1.0))
        size[new] = size.get(node, 0.0)
        now[node] = now[origin.get(node, node)] = new
        graph.fx.erase_node(node)  # it must not count as a reader


def _times(graph: Graph, operand: fx.Node, factor: float, user: fx.Node) -> fx.Node:
    constant = graph.constant(operand)
    if constant is not None:
        return graph.emit_constant(constant * factor, user)
    before: Any = operand.next
    while before.op == "placeholder":
        before = before.next
    return graph.call(aten.mul.Tensor, (operand, factor), before, operand)


def _with(op: Op, read: float, written: float) -> Op:
    """The operator that reads `read` times what it read, and gives `written` times what it gave."""
    w = op.weight
    if w is not None:
        return op.with_weight(_of(w.value, written / read), None if w.bias is None else _of(w.bias, written))
    if isinstance(op, NORMS):
        return _norm(op, read, written)
    assert isinstance(op, (Mul, Div))
    factor = written / read
    if isinstance(op, Div):
        return dataclasses.replace(op, node=None, y=_of(op.y, 1 / factor))
    name = "x" if not isinstance(op.x, Value) else "y"
    return dataclasses.replace(op, node=None, **{name: _of(getattr(op, name), factor)})


def _norm(op: Any, read: float, written: float) -> Op:
    changes: dict[str, Any] = {"eps": _eps(op) * read**2}
    for name, factor in (("gamma", written), ("beta", written), ("mean", read), ("var", read**2)):
        c = getattr(op, name, None)
        if c is not None:
            changes[name] = _of(c, factor)
    made: Op = dataclasses.replace(op, node=None, **changes)
    return made


def _eps(op: Any) -> float:
    if op.eps is None:
        assert isinstance(op, RmsNorm)
        assert op.node is not None
        return default_eps(op.node.meta["val"].dtype)
    return float(op.eps)


def _of(value: Any, factor: float) -> Any:
    """A constant, or a number, times a power of two."""
    return value if factor == 1 else value * factor if isinstance(value, Constant) else float(value) * factor
