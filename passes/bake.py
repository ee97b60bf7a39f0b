"""Every reparametrization is evaluated once: what training keeps apart is one weight at inference.

Weight standardization, weight and spectral normalization, orthogonal and zero-mean weights and companders are functions
of constants (`normfuse.passes.affine.folding`); parallel branches are functions of one value (`normfuse.passes.affine.parallel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from normfuse.ir.graph import Graph, Refuse
from normfuse.passes.affine.folding import fold
from normfuse.passes.affine.parallel import parallel_convs
from normfuse.reports.model import PassReport, Site

__all__ = ["Bake"]


@dataclass(frozen=True)
class Bake:
    """f(constants) is a constant; W₁ ∗ x + W₂ ∗ x + s x + t is one convolution."""

    name = "bake"
    leaves_affines = False

    def __call__(self, graph: Graph) -> PassReport:
        start = perf_counter()
        applied = fold(graph)
        refused: list[Site] = []
        for node in graph:
            while node.op == "call_function" and node.users:  # what one operator could not take may be one of its own
                try:
                    merged = parallel_convs(graph, node)
                except Refuse as refusal:
                    refused.append(graph.site("parallel_convs", node, refusal))
                    break
                if merged is None or not graph.permit(merged.rule, graph.path(node)):
                    break
                applied.append(graph.site(merged.rule, node, note=f"{merged.count} branches are one"))
                node = graph.replace(node, merged.value)
                graph.clean()  # so that a value lost its readers in the branches
        return PassReport(self.name, tuple(applied), tuple(refused), seconds=perf_counter() - start)
