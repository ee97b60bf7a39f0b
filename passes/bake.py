"""Every reparametrization is evaluated once: what training keeps apart is one weight at inference.

Weight standardization, weight and spectral normalization, orthogonal and zero-mean weights and companders are functions
of constants (`normfuse.passes.affine.folding`); parallel branches are functions of one value (`normfuse.passes.affine.parallel`).
"""

from __future__ import annotations

from torch import fx

from normfuse.ir.passes import Pass, Rewriting
from normfuse.passes.affine.folding import fold
from normfuse.passes.affine.parallel import parallel_convs

__all__ = ["Bake"]


class Bake(Pass):
    """f(constants) is a constant; W₁ ∗ x + W₂ ∗ x + s x + t is one convolution."""

    name = "bake"
    rule = "parallel_convs"
    leaves_affines = False

    def rewrite(self, work: Rewriting) -> None:
        fold(work)
        for node in work.graph:
            at: fx.Node | None = node
            while at is not None and at.op == "call_function" and at.users:  # what one could not take may be one of its own
                at = self._merged(work, at)

    def _merged(self, work: Rewriting, node: fx.Node) -> fx.Node | None:
        """The sum with branches of it as one operator; None where nothing was merged."""
        graph = work.graph
        merged = work.found(self.rule, node, lambda: parallel_convs(graph, node))
        if merged is None or not work.permits(merged.rule, node):
            return None
        work.done(merged.rule, node, f"{merged.count} branches are one")
        new = graph.replace(node, merged.value)
        graph.clean()  # so that a value lost its readers in the branches
        return new
