"""Run a pipeline and keep only what is proven: a rewrite that is not an identity is found, taken back and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch

from normfuse.errors import NormfuseError, RewriteError
from normfuse.graph import Graph
from normfuse.report import Error, PassReport, Site
from normfuse.verify import EXACT_BOUND, decibels, evaluate, like, measure, shorten

__all__ = ["Proof", "run"]

log = logging.getLogger(__name__)

Apply = Callable[[Any, Graph], PassReport]

_ATTEMPTS = 16  # rewrites taken back one by one before a pass is given up as a whole


class Proof:
    """The original's outputs on the example inputs and on random ones, to compare rewritten graphs with.

    Args:
        original: the graph as captured.
        inputs: one example value for each placeholder.
    """

    def __init__(self, original: Graph, inputs: Sequence[Any]) -> None:
        self.inputs = inputs
        few = shorten(lambda values: evaluate(original, values, exact=False), inputs)
        self._samples = [few, like(few, seed=0)]
        self._original = original
        self._expected: dict[bool, list[list[torch.Tensor]]] = {}

    def exact(self, graph: Graph) -> Error:
        """The error in float64: rounding only, if the graph is an identity of the original; infinite if it does not run."""
        try:
            return self._error(graph, exact=True)
        except Exception as e:  # a wrong rewrite may fail in any operator
            log.debug("the rewritten graph does not run: %s", e)
            return Error(float("inf"), float("inf"), "float64")

    def drift(self, graph: Graph) -> Error:
        """The error in the model's own dtype."""
        return self._error(graph, exact=False)

    def sqnr(self, graph: Graph) -> float:
        """Signal to quantization noise ratio of the outputs in dB: 10 log₁₀ (Σ y² / Σ (y − ŷ)²), in float64."""
        try:
            found = [evaluate(graph, values, exact=True) for values in self._samples]
        except Exception as e:
            raise RewriteError(f"the rewritten graph does not run: {e}") from e
        return decibels(zip(self._outputs(exact=True), found, strict=False))

    def holds(self, graph: Graph) -> bool:
        """Is the graph the same function, up to rounding in float64?"""
        return self.exact(graph).max_rel <= EXACT_BOUND

    def _error(self, graph: Graph, *, exact: bool) -> Error:
        expected = self._outputs(exact)
        dtype = "float64" if exact else _native(expected[0])
        worst = Error(0.0, 0.0, dtype)
        for values, outputs in zip(self._samples, expected, strict=True):
            worst = worst | measure(outputs, evaluate(graph, values, exact=exact), dtype)
        return worst

    def _outputs(self, exact: bool) -> list[list[torch.Tensor]]:
        if exact not in self._expected:
            first = evaluate(self._original, self._samples[0], exact=exact)
            outputs = [first]
            if len(self._samples) > 1:
                try:
                    outputs.append(evaluate(self._original, self._samples[1], exact=exact))
                except Exception as e:  # the model may object to inputs that are not its own
                    log.info("the original does not take random inputs (%s); verified on the example only", e)
                    del self._samples[1:]
            self._expected[exact] = outputs
        return self._expected[exact][: len(self._samples)]


def _native(outputs: Sequence[torch.Tensor]) -> str:
    dtype = next((t.dtype for t in outputs if t.is_floating_point()), torch.get_default_dtype())
    return str(dtype).removeprefix("torch.")


def run(
    graph: Graph, pipeline: Sequence[Any], proof: Proof | None, *, each: bool = False
) -> tuple[Graph, list[PassReport], Error | None, Proof | None]:
    """Apply the passes in order; with a proof, take back every rewrite that breaks it and go on with the rest.

    A pass with an attribute `changes` is no identity by intention. What it did is reported as SQNR, and the passes after
    it are held against the graph that it left.

    Args:
        graph: where to start; it is not changed.
        pipeline: passes.
        proof: what the result is compared with; None compares nothing.
        each: compare after every pass, and report its errors; else once at the end.

    Returns:
        The rewritten graph, one report a pass, the largest error in float64 between changes, and the proof of the last stretch.
    """
    reports: list[PassReport] = []
    exact: Error | None = None
    while True:
        stretch = _stretch(graph, pipeline[len(reports) :], proof, each=each)
        reports += stretch.reports
        if stretch.exact is not None:
            exact = stretch.exact | exact
        if stretch.changed is None:
            return stretch.graph, reports, exact, proof
        graph, report = stretch.changed
        if proof is not None:
            after = Proof(graph, proof.inputs)
            report = replace(report, sqnr=proof.sqnr(graph))
            proof = after
        reports.append(report)


@dataclass(frozen=True)
class _Stretch:
    """Passes up to the next one that changes the function, or to the end.

    Attributes:
        graph: after these passes.
        reports: theirs.
        exact: error of `graph`; None without a proof.
        changed: the graph after the pass that changed the function, and its report; None at the end of the pipeline.
    """

    graph: Graph
    reports: list[PassReport]
    exact: Error | None
    changed: tuple[Graph, PassReport] | None


def _stretch(start: Graph, pipeline: Sequence[Any], proof: Proof | None, *, each: bool) -> _Stretch:
    undone: dict[int, list[Site]] = {}
    given_up: set[int] = set()
    current = start.copy()
    for _ in range(_ATTEMPTS):
        result, reports, before, changed = _attempt(current, pipeline, given_up, proof if each else None)
        exact = None if proof is None else proof.exact(result)
        if proof is None or exact is None or exact.max_rel <= EXACT_BOUND:
            told = [replace(r, undone=tuple(undone.get(i, r.undone))) for i, r in enumerate(reports)]
            return _Stretch(result, told, exact, changed)
        i = _culprit(pipeline[: len(reports)], [*before[1:], result], proof)
        site = _guilty_site(pipeline[i], before[i], proof)
        if site is None:
            given_up.add(i)
            site = Site(pipeline[i].name, "", "the pass as a whole was not an identity and was taken back")
        else:
            current.skip |= {(site.rule, site.path)}
        log.warning("%s at %s is not an identity and was taken back", site.rule, site.path or "the whole model")
        undone.setdefault(i, []).append(site)
    names = ", ".join(sorted({s.rule for sites in undone.values() for s in sites}))
    raise RewriteError(f"{_ATTEMPTS} rewrites in a row were not identities ({names}); leave these passes out with passes=[...]")


def _attempt(
    start: Graph, pipeline: Sequence[Any], given_up: set[int], proof: Proof | None
) -> tuple[Graph, list[PassReport], list[Graph], tuple[Graph, PassReport] | None]:
    """One run from the start: the result, a report a pass, the graph before each, and what a pass that `changes` made of it."""
    graph = start.copy()
    reports: list[PassReport] = []
    before: list[Graph] = []
    for i, p in enumerate(pipeline):
        kept = graph.copy()
        if i in given_up:
            graph, report = kept, PassReport(p.name)
        else:
            graph, report = _applied(p, graph, kept)
        if getattr(p, "changes", "") and report.applied:
            return kept, reports, before, (graph, report)
        before.append(kept)
        if proof is not None:
            report = replace(report, exact=proof.exact(graph), drift=proof.drift(graph))
        log.info("%s: %d applied, %d refused", p.name, len(report.applied), len(report.refused))
        reports.append(report)
    return graph, reports, before, None


def _applied(p: Any, graph: Graph, kept: Graph) -> tuple[Graph, PassReport]:
    """The graph after the pass and its report; a pass that fails leaves the graph as it was, and the others go on."""
    begin = perf_counter()
    try:
        return graph, p(graph)
    except NormfuseError:
        raise
    except Exception as e:
        log.exception("the pass %s failed and was left out", p.name)
        site = Site(p.name, "", f"the pass failed and was left out: {type(e).__name__}: {e}")
        return kept.copy(), PassReport(p.name, undone=(site,), seconds=perf_counter() - begin)


def _culprit(pipeline: Sequence[Any], after: Sequence[Graph], proof: Proof) -> int:
    """The first pass after which the graph is another function (bisection: later passes do not repair it)."""
    low, high = 0, len(pipeline) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if proof.holds(after[middle]) else (low, middle)
    return low


def _guilty_site(p: Any, before: Graph, proof: Proof) -> Site | None:
    """The first rewrite of the pass after which the graph is another function; None if no single rewrite is."""

    def ran(fuel: int | None) -> Graph:
        graph = before.copy()
        graph.fuel = fuel
        p(graph)
        return graph

    low, high = 0, len(ran(None).permitted)
    if high == 0 or not proof.holds(ran(0)):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if proof.holds(ran(middle)) else (low, middle)
    rule, path = ran(high).permitted[high - 1]
    return Site(rule, path, "not an identity in float64; taken back")
