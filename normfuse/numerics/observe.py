"""What values take inside a graph: the data that calibration looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

from normfuse.errors import UsageError
from normfuse.ir.graph import Graph
from normfuse.numerics.evaluate import evaluate

__all__ = ["observe"]


def observe(
    graph: Graph,
    nodes: Iterable[fx.Node],
    values: Sequence[Any],
    *,
    exact: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[fx.Node, Tensor]:
    """The values of `nodes` for one set of inputs; only what they depend on is computed.

    Args:
        graph: the graph; it is not changed.
        nodes: whose values to return; each must make one tensor.
        values: one value for each placeholder, as in `normfuse.ir.passes.Samples`.
        exact: in float64, else in the model's own dtype.
        reduce: applied to each value as soon as it is there, so that only what it returns is kept; None keeps the value.

    Raises:
        UsageError: a node does not make a tensor.
    """
    wanted = list(dict.fromkeys(nodes))
    if not wanted:
        return {}
    probe = graph.copy()
    twin = dict(zip(graph.fx.nodes, probe.fx.nodes, strict=True))
    seen = [twin[n] if reduce is None else _reduced(probe, twin[n], reduce) for n in wanted]
    probe.fx.output_node().args = (tuple(seen),)
    probe.clean()
    found = evaluate(probe, values, exact=exact)
    if len(found) != len(wanted):
        names = ", ".join(n.name for n in wanted)
        raise UsageError(
            f"of {len(wanted)} observed values {len(found)} are tensors ({names}); observe the pieces of a split instead"
        )
    return dict(zip(wanted, found, strict=True))


def _reduced(probe: Graph, node: fx.Node, reduce: Callable[[Tensor], Tensor]) -> fx.Node:
    """A call of `reduce` right behind the node: the value itself is freed after its last use, like any other."""
    before = node.next
    while before.op == "placeholder":  # inputs stay in front
        before = before.next
    with probe.fx.inserting_before(before):
        return probe.fx.create_node("call_function", reduce, (node,), name="observed")  # a partial has no name of its own
