"""What a pass is, and what it is given: a graph, and the run that it is a part of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

from torch import fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Op, Value
from normfuse.reports.model import LayerQuantization, PassReport, Site

__all__ = ["Change", "Pass", "Rewriting", "Rule", "Run", "Samples", "under"]

T = TypeVar("T")

Samples = Sequence[list[Any]]
"""Example or calibration inputs: one list a batch with one value a placeholder; empty if nothing was given."""

Rule = Callable[[Op], "Value | None"]
"""A rule: a value (rewrite), None (not mine) or `Refuse` (mine, but not here). Its docstring is its identity."""


class Run:
    """One run of a pipeline: what it may rewrite, and what it calibrates on. The passes of a pipeline share it.

    Attributes:
        samples: example or calibration inputs.
        skip: sites (rule, module path) that must not be rewritten: what verification has taken back.
        fuel: how many more rewrites are allowed; None for any number. Bisection lowers it.
        permitted: the sites that were allowed so far, in order.
    """

    def __init__(self, samples: Samples = (), skip: Iterable[tuple[str, str]] = (), fuel: int | None = None) -> None:
        self.samples = samples
        self.skip = frozenset(skip)
        self.fuel = fuel
        self.permitted: list[tuple[str, str]] = []

    def again(self, skip: Iterable[tuple[str, str]] = (), fuel: int | None = None) -> Run:
        """A run from the start on the same samples, that skips these sites too."""
        return Run(self.samples, self.skip | frozenset(skip), fuel)

    def permit(self, rule: str, path: str) -> bool:
        """May this rewrite be applied now? Asked once for each site, right before it is rewritten."""
        if (rule, path) in self.skip or self.fuel == 0:
            return False
        if self.fuel is not None:
            self.fuel -= 1
        self.permitted.append((rule, path))
        return True


@dataclass(frozen=True, eq=False)
class Change:
    """What a pass wants to do to a site.

    Attributes:
        value: what takes its place: an operator, a value or a constant. None where `do` does it all.
        note: what the report says beside the site.
        rule: its name; that of the pass where it is empty.
        at: the node that `value` takes the place of, if that is not the site itself.
        do: what else is to be done, or all of it; a text that it returns is the note.
    """

    value: Any = None
    note: str = ""
    rule: str = ""
    at: fx.Node | None = None
    do: Callable[[], str | None] | None = None


class Rewriting:
    """A pass at work on a graph: it asks the run, carries out what is permitted, and notes what it did and what it refused.

    Attributes:
        graph: the graph, which is changed.
        run: the run that the pass is a part of.
        applied: sites that were rewritten.
        refused: sites that the pass knows and leaves, with the reason.
        quantization: layers, of a pass that quantizes.
    """

    def __init__(self, graph: Graph, run: Run) -> None:
        self.graph = graph
        self.run = run
        self.applied: list[Site] = []
        self.refused: list[Site] = []
        self.quantization: list[LayerQuantization] = []

    def permits(self, rule: str, node: fx.Node) -> bool:
        """May the site be rewritten now? Asked right before it is."""
        return self.run.permit(rule, self.graph.path(node))

    def done(self, rule: str, node: fx.Node, note: str = "") -> None:
        self.applied.append(self.graph.site(rule, node, note=note))

    def refuse(self, rule: str, node: fx.Node, refusal: Refuse) -> None:
        self.refused.append(self.graph.site(refusal.rule or rule, node, refusal))

    def found(self, rule: str, node: fx.Node, find: Callable[[], T]) -> T | None:
        """What `find` finds at a site; None, and an entry among the refused, where it refuses."""
        try:
            return find()
        except Refuse as refusal:
            self.refuse(rule, node, refusal)
            return None

    def attempt(self, rule: str, node: fx.Node, find: Callable[[], Change | None]) -> bool:
        """Carry out what `find` wants to do to a site, unless it refuses or the run does not permit it. Was it done?"""
        change = self.found(rule, node, find)
        if change is None or not self.permits(change.rule or rule, node):
            return False
        site = self.graph.site(change.rule or rule, node, note=change.note)
        if change.value is not None:
            self.graph.replace(node if change.at is None else change.at, change.value)
        note = change.do() if change.do is not None else None
        self.applied.append(site if note is None else Site(site.rule, site.path, note))
        return True


class Pass:
    """A rewrite of the whole graph.

    A pass that looks at one site after the other has `rules`, or says in `change` what it does to a site. A plan over the whole
    graph stands in `rewrite`.

    Attributes:
        name: what the pass is called.
        rule: what the report calls what it does to a site, unless the change or the refusal says so; empty for the pass's name.
        rules: tried in order on each operator.
        depth: how many operators deep a rule sees.
        changes: how the pass changes the function on purpose, as the rest of a sentence about it. Such a pass is not held
            against the original; its SQNR is reported. Empty for an identity.
        tells: are the notes of its rewrites among those of the report?
        writes: the kind of norm that each of its rewrites leaves as arithmetic, if it does.
        precedes: the pass of the default pipeline before which it must stand where it is asked for together with "default".
        leaves_affines: may it make an `Affine`, so that `realise` must run after it?
    """

    name: str
    rule: str = ""
    rules: tuple[Rule, ...] = ()
    depth: int = 3
    changes: str = ""
    tells: bool = False
    writes: str = ""
    precedes: str = ""
    leaves_affines: bool = True

    def __call__(self, graph: Graph, run: Run | None = None) -> PassReport:
        """Rewrite the graph, and say what was done.

        Args:
            graph: is changed.
            run: what is permitted and what there is to calibrate on; None permits everything and has no samples.
        """
        start = perf_counter()
        work = Rewriting(graph, Run() if run is None else run)
        self.rewrite(work)
        graph.clean()
        return PassReport(
            self.name,
            tuple(work.applied),
            tuple(work.refused),
            seconds=perf_counter() - start,
            quantization=tuple(work.quantization),
        )

    def rewrite(self, work: Rewriting) -> None:
        """Everything that the pass does to a graph: `change`, for each site in turn."""
        for node in self.sites(work.graph):
            work.attempt(self.rule or self.name, node, partial(self.change, work.graph, node))

    def sites(self, graph: Graph) -> Iterable[fx.Node]:
        """The nodes that the pass looks at, in order."""
        return graph

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """What to do to a site: what the first of `rules` makes of the operator. None where there is nothing to do.

        Raises:
            Refuse: the site is the pass's, but may not be rewritten.
        """
        op = graph.view(node, self.depth)
        for rule in self.rules if isinstance(op, Op) else ():
            with under(rule.__name__):
                value = rule(op)  # type: ignore[arg-type]
            if value is not None:
                return Change(value, rule=rule.__name__)
        return None

    @staticmethod
    def of(given: Any) -> Pass:
        """A pass; any other callable with a `name` that takes a graph and returns a `PassReport` becomes one.

        Raises:
            TypeError: it is neither; or it is the class of one.
        """
        if isinstance(given, type) or not callable(given) or not isinstance(getattr(given, "name", None), str):
            raise TypeError(f"{given!r} is no pass (a callable with a `name`)")
        return given if isinstance(given, Pass) else _Callable(given)


class _Callable(Pass):
    """A pass that takes nothing but the graph: it finds `permit` and `samples` of the run there."""

    def __init__(self, given: Any) -> None:
        self.name = given.name
        self._given = given
        for attribute in ("changes", "tells", "writes", "precedes", "leaves_affines"):
            setattr(self, attribute, getattr(given, attribute, getattr(Pass, attribute)))

    def __call__(self, graph: Graph, run: Run | None = None) -> PassReport:
        run = Run() if run is None else run
        lent = {"permit": run.permit, "samples": run.samples}
        vars(graph).update(lent)
        try:
            report: PassReport = self._given(graph)
        finally:
            for name in lent:
                delattr(graph, name)
        return report


@contextmanager
def under(rule: str) -> Iterator[None]:
    """A refusal within goes by the name of this rule."""
    try:
        yield
    except Refuse as refusal:
        refusal.rule = refusal.rule or rule
        raise
