"""The model's outputs with some layers in integers, against those in float."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.numerics.compare import sqnr
from normfuse.numerics.evaluate import evaluate
from normfuse.passes.quantize.coded import Coded
from normfuse.ranks import everywhere

__all__ = ["Outputs"]


class Outputs:
    """The float outputs on a few calibration batches, to measure quantized ones against.

    Args:
        graph: in float; it is not changed here. Whoever changes it in between (moved ranges, trained weights) is measured too.
        samples: batches of this rank.

    Attributes:
        nodes: of the graph, in their order.
        signal: Σ y² over all outputs and ranks.
    """

    def __init__(self, graph: Graph, samples: Samples) -> None:
        self._graph = graph
        self.nodes = list(graph.fx.nodes)
        self._samples = samples
        self._expected = [[t for t in evaluate(graph, v, exact=False) if t.is_floating_point()] for v in self._samples]
        self.signal = self._summed([_energy(outputs) for outputs in self._expected])

    def noise(self, coded: Sequence[Coded]) -> float:
        """Σ (y − ŷ)² over all outputs and ranks with these layers quantized; infinite where it is not finite."""
        return self._noise(_with_layers(self._graph, coded))

    def sqnr_of(self, graph: Graph) -> float:
        """In dB, of the outputs of another graph with the same inputs and outputs."""
        return sqnr(self.signal, self._noise(graph))

    def _noise(self, twin: Graph) -> float:
        def of(values: Sequence[Any], expected: Sequence[Tensor]) -> float:
            found = [t for t in evaluate(twin, values, exact=False) if t.is_floating_point()]
            return _energy([a.double() - b.double() for a, b in zip(expected, found, strict=True)])

        return self._summed([of(v, e) for v, e in zip(self._samples, self._expected, strict=True)])

    def sqnr(self, coded: Sequence[Coded]) -> float:
        """In dB, with these layers quantized."""
        return sqnr(self.signal, self.noise(coded))

    @staticmethod
    def _summed(values: Sequence[float]) -> float:
        total = sum(everywhere(lambda: float(sum(values))))
        return total if total == total else float("inf")


def _energy(tensors: Sequence[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) if tensors else 0.0


def _with_layers(graph: Graph, coded: Sequence[Coded]) -> Graph:
    """A copy that calls the integer form in the place of each layer."""
    twin = graph.copy()
    same = dict(zip(graph.fx.nodes, twin.fx.nodes, strict=True))
    for c in coded:
        tail = same[c.layer.tail]
        with twin.fx.inserting_before(tail):
            new = twin.fx.create_node("call_function", c, (same[c.layer.x],), name="quantized")
        tail.replace_all_uses_with(new)
        twin.fx.erase_node(tail)
        if c.layer.tail is not c.layer.node:
            twin.fx.erase_node(same[c.layer.node])
        same[c.layer.tail] = new
    twin.clean()
    return twin
