"""Run a pipeline and keep only what is proven: a rewrite that is not an identity is found, taken back and named."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from normfuse.errors import NormfuseError, RewriteError
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Pass, Run
from normfuse.proof.proof import Proof, Verdict
from normfuse.reports.model import Error, PassReport, Site

__all__ = ["Proof", "Proven", "run"]

log = logging.getLogger(__name__)

_ATTEMPTS = 16  # rewrites taken back one by one before passes are taken back as a whole


@dataclass(frozen=True)
class Proven:
    """What is left of a pipeline once it is proven.

    Attributes:
        graph: the rewritten graph.
        reports: one a pass.
        permitted: the sites (rule, module path) that were rewritten, in order.
        exact: the largest error in float64 between changes; None where nothing was compared in float64.
        drift: error of the last stretch in the model's own dtypes; None without a proof.
        proof: of the last stretch; None without one.
        notes: what the user should know of the comparisons.
    """

    graph: Graph
    reports: list[PassReport]
    permitted: list[tuple[str, str]]
    exact: Error | None
    drift: Error | None
    proof: Proof | None
    notes: tuple[str, ...] = ()


def run(graph: Graph, pipeline: Sequence[Pass], proof: Proof | None, *, each: bool = False, given: Run | None = None) -> Proven:
    """Apply the passes in order; with a proof, take back every rewrite that breaks it and go on with the rest.

    A pass that `changes` the function is no identity on purpose. What it did is reported as SQNR, and the passes after
    it are held against the graph that it left.

    Args:
        graph: where to start; it is not changed.
        pipeline: passes.
        proof: what the result is compared with; None compares nothing.
        each: compare after every pass, and report its errors; else once at the end.
        given: samples, and sites that must not be rewritten; none of either by default.

    Raises:
        RewriteError: even without any rewrite the result is not the model.
    """
    reports: list[PassReport] = []
    permitted: list[tuple[str, str]] = []
    exact: Error | None = None
    notes: tuple[str, ...] = ()
    while True:
        stretch = _stretch(graph, pipeline[len(reports) :], proof, Run() if given is None else given, each=each)
        given = stretch.run
        permitted += given.permitted
        reports += stretch.reports
        if proof is not None:
            notes = tuple(dict.fromkeys(notes + proof.notes))
        if stretch.verdict.exact is not None:
            exact = stretch.verdict.exact | exact
        if stretch.changed is None:
            return Proven(stretch.graph, reports, permitted, exact, stretch.verdict.drift, proof, notes)
        graph, report = stretch.changed
        if proof is not None:
            after = Proof(graph, proof.inputs, known=proof.known)
            report = replace(report, sqnr=proof.sqnr(graph))
            proof = after
        reports.append(report)


@dataclass(frozen=True)
class _Stretch:
    """Passes up to the next one that changes the function, or to the end.

    Attributes:
        graph: after these passes.
        reports: theirs.
        verdict: on `graph`; empty without a proof.
        changed: the graph after the pass that changed the function, and its report; None at the end of the pipeline.
        run: what was permitted, the pass that changed the function included.
    """

    graph: Graph
    reports: list[PassReport]
    verdict: Verdict
    changed: tuple[Graph, PassReport] | None
    run: Run


def _stretch(start: Graph, pipeline: Sequence[Pass], proof: Proof | None, given: Run, *, each: bool) -> _Stretch:
    undone: dict[int, list[Site]] = {}
    given_up: set[int] = set()
    for attempt in range(_ATTEMPTS + len(pipeline) + 1):
        given = given.again()
        result, reports, before, changed = _attempt(start, pipeline, given_up, given, proof if each else None)
        verdict = Verdict(None, None) if proof is None else proof.judge(result)
        if proof is None or not verdict.fault:
            told = [replace(r, undone=tuple(undone.get(i, r.undone))) for i, r in enumerate(reports)]
            return _Stretch(result, told, verdict, changed, given)
        i = _culprit(pipeline[: len(reports)], [*before[1:], result], proof)
        if i in given_up:
            break
        site = _guilty_site(pipeline[i], before[i], given, proof) if attempt < _ATTEMPTS else None
        if site is None:
            # without `realise` the affines that the others make would be no operators of PyTorch
            given_up |= set(range(len(pipeline))) if pipeline[i].name == "realise" else {i}
            site = Site(pipeline[i].name, "", f"the pass as a whole was taken back: {verdict.fault}")
        else:
            given = given.again({(site.rule, site.path)})
        log.warning("%s at %s was taken back: %s", site.rule, site.path or "the whole model", site.note)
        undone.setdefault(i, []).append(site)
    raise RewriteError(f"without any rewrite the graph is not the model: {verdict.fault}")


def _attempt(
    start: Graph, pipeline: Sequence[Pass], given_up: set[int], given: Run, proof: Proof | None
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
            graph, report = _applied(p, graph, kept, given)
        if p.changes and report.applied:
            return kept, reports, before, (graph, report)
        before.append(kept)
        if proof is not None:
            verdict = proof.judge(graph)
            report = replace(report, exact=verdict.exact, drift=verdict.drift)
        log.info("%s: %d applied, %d refused", p.name, len(report.applied), len(report.refused))
        reports.append(report)
    return graph, reports, before, None


def _applied(p: Pass, graph: Graph, kept: Graph, given: Run) -> tuple[Graph, PassReport]:
    """The graph after the pass and its report; a pass that fails leaves the graph as it was, and the others go on."""
    begin = perf_counter()
    try:
        return graph, p(graph, given)
    except NormfuseError:
        raise
    except Exception as e:
        log.exception("the pass %s failed and was left out", p.name)
        site = Site(p.name, "", f"the pass failed and was left out: {type(e).__name__}: {e}")
        return kept.copy(), PassReport(p.name, undone=(site,), seconds=perf_counter() - begin)


def _culprit(pipeline: Sequence[Pass], after: Sequence[Graph], proof: Proof) -> int:
    """The first pass after which the graph is another function (bisection: later passes do not repair it)."""
    low, high = 0, len(pipeline) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if proof.holds(after[middle]) else (low, middle)
    return low


def _guilty_site(p: Pass, before: Graph, given: Run, proof: Proof) -> Site | None:
    """The first rewrite of the pass after which the graph is another function; None if no single rewrite is."""

    def ran(fuel: int | None) -> tuple[Graph, list[tuple[str, str]]]:
        graph, again = before.copy(), given.again(fuel=fuel)
        p(graph, again)
        return graph, again.permitted

    low, high = 0, len(ran(None)[1])
    if high == 0 or not proof.holds(ran(0)[0]):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if proof.holds(ran(middle)[0]) else (low, middle)
    last, permitted = ran(high)
    rule, path = permitted[high - 1]
    return Site(rule, path, f"{proof.judge(last).fault}; taken back")
