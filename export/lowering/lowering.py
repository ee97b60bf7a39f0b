"""The passes that a target has kernels for, run on an exported program."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch.export import ExportedProgram

from normfuse.described import first_line
from normfuse.export.lowering.graphs import graph_of, with_graph
from normfuse.ir.operators import CHECKS
from normfuse.ir.passes import Pass, Run, Samples
from normfuse.reports.model import PassReport, Site

__all__ = ["Lowered", "lowered"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lowered:
    """A program in operators of its target, and what was done to it.

    Attributes:
        exported: the program.
        passes: what each pass did and refused, in module paths.
    """

    exported: ExportedProgram
    passes: tuple[PassReport, ...] = ()

    def then(self, passes: Sequence[Pass]) -> Lowered:
        """What further passes make of it."""
        more = lowered(self.exported, passes)
        return Lowered(more.exported, (*self.passes, *more.passes))

    def notes(self, name: str) -> tuple[str, ...]:
        """What the pass of that name did, and what it left and why, a line a site."""
        found = [p for p in self.passes if p.name == name]
        done = [f"{s.path}: {s.note}" for p in found for s in p.applied]
        return (*done, *(f"{s.path} stays as large as it is: {s.note}" for p in found for s in p.refused))

    @property
    def failures(self) -> tuple[str, ...]:
        """The passes that failed and were taken back, a line each."""
        return tuple(f"the pass {p.name} failed and was taken back ({s.note})" for p in self.passes for s in p.undone)


def lowered(exported: ExportedProgram, passes: Sequence[Pass], samples: Samples = ()) -> Lowered:
    """What `passes` make of a program, which stays as it is; `samples` are inputs of it, flat.

    A pass that fails is taken back as a whole, and its report says so: a file is then slower, not wrong.
    """
    if not passes:
        return Lowered(exported)
    graph = graph_of(exported)
    for check in [n for n in graph.fx.nodes if n.target in CHECKS]:
        graph.fx.erase_node(check)  # they would count as readers, and no file has them
    reports: list[PassReport] = []
    for each in passes:
        before = graph.copy()
        try:
            reports.append(each(graph, Run(samples)))
        except Exception as e:
            log.warning("%s failed and was taken back: %s: %s", each.name, type(e).__name__, e, exc_info=e)
            graph = before
            reports.append(PassReport(each.name, undone=(Site(each.name, "", f"{type(e).__name__}: {first_line(e)}"),)))
    changed = any(report.applied for report in reports)
    return Lowered(with_graph(exported, graph) if changed else exported, tuple(reports))
