"""Functions of values inside a graph, summed over the calibration data: constant memory, all ranks, a bar on terminals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.numerics.evaluate import evaluate
from normfuse.progress import progress_bar
from normfuse.ranks import everywhere

__all__ = ["Merge", "Probe", "accumulate", "progress"]

log = logging.getLogger(__name__)

Probe = tuple[fx.Node, Callable[[Tensor], Tensor]]
Merge = Callable[[Tensor, Tensor], Tensor]


def accumulate(
    graph: Graph, samples: Samples, probes: Sequence[Probe], merge: Merge = torch.add, *, label: str = ""
) -> list[Tensor]:
    """merge over the calibration batches of all ranks of f(value of node), for each probe (node, f).

    f is called as soon as the value is there, and the value is freed after its last use, as in any forward.

    Args:
        graph: the graph; it is not changed.
        samples: the batches of this rank.
        probes: nodes that make one tensor, and what is taken from it: a tensor of the same shape for every batch.
        merge: of two such tensors; associative and commutative.
        label: of the progress bar.

    Returns:
        One tensor a probe; empty if no rank has samples.
    """
    if not probes:
        return []

    def local() -> list[Tensor]:
        twin = _instrumented(graph, probes)
        total: list[Tensor] = []
        with progress(label, len(samples)) as advance:
            for values in samples:
                found = evaluate(twin, values, exact=False)
                total = found if not total else [merge(a, b) for a, b in zip(total, found, strict=True)]
                advance()
        return total

    ranks = [r for r in everywhere(local) if r]
    result = ranks[0] if ranks else []
    for other in ranks[1:]:
        result = [merge(a, b) for a, b in zip(result, other, strict=True)]
    return result


def _instrumented(graph: Graph, probes: Sequence[Probe]) -> Graph:
    """A copy that returns f(value) for each probe instead of its outputs; f stands right behind the node."""
    twin = graph.copy()
    same = dict(zip(graph.fx.nodes, twin.fx.nodes, strict=True))
    seen: list[fx.Node] = []
    for node, f in probes:
        before: Any = same[node].next
        while before.op == "placeholder":
            before = before.next
        with twin.fx.inserting_before(before):
            seen.append(twin.fx.create_node("call_function", f, (same[node],), name="probed"))  # a partial has no name
    twin.fx.output_node().args = (tuple(seen),)
    twin.clean()
    return twin


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after each step; a bar is shown when standard error is a terminal."""
    with progress_bar(label, total, show=bool(label) and total > 1) as bar:
        yield bar.advance
