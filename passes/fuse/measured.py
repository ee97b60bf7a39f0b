"""A pass that is taken only where the model is faster with it, on this machine and on its example inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from normfuse import native
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Pass, Rewriting, Run
from normfuse.passes.quantize.speed import Speed, decided, rounds
from normfuse.reports.model import Site

__all__ = ["Clock", "Measured"]

Clock = Callable[[Callable[[], Any], Callable[[], Any]], Speed]
"""(with the pass, without it) -> the time without it over that with it."""

_SECONDS = (0.2, 0.8)  # an undecided measurement goes on for longer


class Measured(Pass):
    """`inner`, if it makes the model faster; else each of its sites is refused with what was measured.

    Args:
        inner: the pass.
        clock: what takes the times; by default the clock of this machine.
        ours: what it writes is fast with our kernels alone, so that nothing is measured without them.

    What was measured once is believed for as long as the object lives: a pipeline that is run again, because the proof has taken
    something back, must come to the same decision.
    """

    leaves_affines = False

    def __init__(self, inner: Pass, clock: Clock | None = None, *, ours: bool = True) -> None:
        self.name = inner.name
        self.inner = inner
        self.ours = ours
        self.clock = _clock if clock is None else clock
        self._known: dict[tuple[Site, ...], str] = {}

    def rewrite(self, work: Rewriting) -> None:
        trial = work.graph.copy()
        run = work.run.again()
        found = self.inner(trial, Run(run.samples, run.skip))
        if not found.applied:
            work.refused += found.refused
            return
        if found.applied not in self._known:
            self._known[found.applied] = self._objection(work, trial)
        why = self._known[found.applied]
        if not why:
            self.inner.rewrite(work)
            return
        work.refused += [*found.refused, *(Site(site.rule, site.path, why) for site in found.applied)]

    def _objection(self, work: Rewriting, trial: Graph) -> str:
        """Why the sites stay as they are; empty where they are faster."""
        if not work.run.samples:
            return "not measured: there are no example inputs"
        values = work.run.samples[0]
        devices = {v.device.type for v in values if isinstance(v, torch.Tensor)} - {"cpu"}
        if devices:
            return f"not measured: the example inputs are on {devices.pop()}, and times are taken on a CPU"
        if self.ours and not native.available():
            return f"there are no kernels: {native.why_not()}"
        with torch.inference_mode():
            speed = self.clock(_call(trial, values), _call(work.graph, values))
        if speed.decided and speed.ratio > 1:
            return ""
        sure = "" if speed.decided else ", within the noise"
        return f"no faster on this machine: {speed.ratio:.2f}x of the speed of the model without it{sure}"


def _call(graph: Graph, values: list[Any]) -> Callable[[], Any]:
    """The graph on one value a placeholder, as a module would run it."""
    graph = graph.copy()
    graph.fx.set_codegen(fx.graph.CodeGen())
    return partial(graph.to_module().forward, *values)


def _clock(fused: Callable[[], Any], apart: Callable[[], Any]) -> Speed:
    found = Speed(1.0, True, decided=False)
    for seconds in _SECONDS:
        found = decided(rounds(fused, apart, seconds))
        if found.decided:
            break
    return found
