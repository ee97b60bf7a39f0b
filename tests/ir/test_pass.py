"""What a pass is given and what it declares: the driver that all passes share."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.capture.capture import capture
from normfuse.errors import UsageError
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass, Run
from normfuse.ir.views import Linear, Relu
from normfuse.reports.model import PassReport


def doubled(op):
    """relu(x) = relu(relu(x)), for the sake of the test"""
    match op:
        case Relu(Relu()):
            raise Refuse("it is doubled already", remedy="none")
        case Relu() as inner:
            return Relu(Relu(inner.x))
        case _:
            return None


class Doubling(Pass):
    name = "doubling"
    rules = (doubled,)


class Bias(Pass):
    """Does nothing to a linear but to name it."""

    name = "bias"
    rule = "bias_is_named"

    def sites(self, graph):
        return [n for n in graph if isinstance(graph.view(n, 1), Linear)]

    def change(self, graph, node):
        op = graph.view(node, 1)
        if op.b is None:
            raise Refuse("it has no bias")
        return Change(note="has one", do=lambda: None if op.W.shape[0] == 4 else "has another")


def relus():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.Linear(3, 3), nn.ReLU()).eval()
    return model, (torch.randn(2, 4),)


def graph_of(model, example):
    return Graph.of(capture(model, example).gm)


def relus_in(graph):
    return sum(isinstance(graph.view(n, 1), Relu) for n in graph)


def test_rules_are_walked_permitted_and_reported():
    graph, run = graph_of(*relus()), Run()
    report = Doubling()(graph, run)
    assert [(s.rule, s.path) for s in report.applied] == run.permitted == [("doubled", "1"), ("doubled", "4")]
    assert relus_in(graph) == 4
    again = Doubling()(graph)
    assert {(s.rule, s.note, s.remedy) for s in again.refused} == {("doubled", "it is doubled already", "none")}
    assert report.seconds > 0


def test_a_run_skips_and_runs_out_of_fuel():
    graph = graph_of(*relus())
    assert [s.path for s in Doubling()(graph, Run(skip={("doubled", "1")})).applied] == ["4"]
    graph = graph_of(*relus())
    assert [s.path for s in Doubling()(graph, Run(fuel=1)).applied] == ["1"]
    assert relus_in(graph) == 3
    used = Run([[1]], {("a", "b")}, fuel=1)
    assert used.permit("x", "y")
    assert not used.permit("x", "z")
    again = used.again({("c", "d")})
    assert (again.samples, again.skip, again.fuel, again.permitted) == ([[1]], {("a", "b"), ("c", "d")}, None, [])


def test_changes_by_site_with_notes_and_refusals():
    graph = graph_of(*relus())
    report = Bias()(graph)
    assert [(s.rule, s.path, s.note) for s in report.applied] == [
        ("bias_is_named", "0", "has one"),
        ("bias_is_named", "3", "has another"),
    ]
    assert [(s.rule, s.path, s.note) for s in report.refused] == [("bias_is_named", "2", "it has no bias")]


class Unnamed(Pass):
    """Refuses, and does, under its own name."""

    name = "unnamed"

    def change(self, graph, node):
        if isinstance(graph.view(node, 1), Linear):
            raise Refuse("it is linear")
        return Change(do=lambda: None) if isinstance(graph.view(node, 1), Relu) else None


def test_a_change_goes_by_the_name_of_the_pass_where_nothing_else_is_said():
    report = Unnamed()(graph_of(*relus()))
    assert {s.rule for s in (*report.applied, *report.refused)} == {"unnamed"}
    assert (len(report.applied), len(report.refused)) == (2, 3)


class Plain:
    """A callable that knows nothing of `Pass`."""

    name = "plain"
    tells = True

    def __init__(self):
        self.samples = None

    def __call__(self, graph):
        self.samples = graph.samples
        done = [graph.site("looked", n, note="seen") for n in graph if n.op == "call_function" and graph.permit("looked", n.name)]
        return PassReport(self.name, tuple(done))


def test_a_plain_callable_is_a_pass():
    model, example = relus()
    plain = Plain()
    report = normfuse.report(normfuse.optimize(model, example, passes=[plain]))
    assert len([s for s in report.applied if s.rule == "looked"]) == 5
    assert torch.equal(plain.samples[0][0], example[0])
    assert "plain: seen" in report.notes  # `tells`
    graph, run = graph_of(model, example), Run(fuel=2)
    assert len(Pass.of(plain)(graph, run).applied) == len(run.permitted) == 2
    assert not hasattr(graph, "permit")


def test_what_is_no_pass_is_refused():
    class Nameless(Pass):
        pass

    for given in (print, Nameless(), Doubling):
        with pytest.raises(TypeError, match="no pass"):
            Pass.of(given)
    with pytest.raises(UsageError, match="neither a name nor a pass"):
        normfuse.optimize(*relus(), passes=[lambda graph: None])  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match=r"pass an object of it, Doubling\(\)"):
        normfuse.optimize(*relus(), passes=[Doubling])
