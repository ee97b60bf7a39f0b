"""Values inside a graph are those that the model computes, in its own dtype or in float64, and only what is asked for is kept."""

import pytest
import torch
from torch import nn

from normfuse.capture.capture import capture, flat_inputs
from normfuse.errors import UsageError
from normfuse.ir.graph import Graph
from normfuse.numerics.observe import observe


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        left, right = h.split(3, dim=-1)
        return self.b(h) + left * right


def captured(model, x):
    found = capture(model, (x,))
    return Graph.of(found.gm), flat_inputs(found.gm, found.args, found.kwargs or {})


def node(graph, target):
    return next(n for n in graph if n.target is target)


@pytest.mark.parametrize("exact", [False, True], ids=["native", "float64"])
def test_values_are_those_of_the_model(exact):
    model, x = Two().eval(), torch.randn(5, 4)
    graph, inputs = captured(model, x)
    relu, linear = node(graph, torch.ops.aten.relu.default), node(graph, torch.ops.aten.linear.default)
    before = str(graph.fx)
    found = observe(graph, [relu, linear], inputs, exact=exact)
    kind = torch.float64 if exact else torch.float32
    assert found[linear].dtype is kind
    reference = model.double() if exact else model
    torch.testing.assert_close(found[linear], reference.a(x.to(kind)))
    torch.testing.assert_close(found[relu], torch.relu(found[linear]))
    assert str(graph.fx) == before


def test_inputs_and_reduced_values_can_be_observed():
    graph, inputs = captured(Two().eval(), torch.randn(5, 4))
    start, relu = next(iter(graph)), node(graph, torch.ops.aten.relu.default)
    start = next(n for n in graph if n.op == "placeholder") if start.op != "placeholder" else start
    found = observe(graph, [start, relu], inputs, reduce=lambda v: v.sum(0))
    torch.testing.assert_close(found[start], inputs[0].sum(0))
    assert found[relu].shape == (6,)


def test_what_is_not_needed_is_not_computed():
    graph, inputs = captured(Two().eval(), torch.randn(5, 4))
    called = []
    for n in graph:
        if n.target is torch.ops.aten.mul.Tensor:
            n.target = lambda *a: called.append(a)
    observe(graph, [node(graph, torch.ops.aten.relu.default)], inputs)
    assert called == []


def test_no_nodes_no_work():
    graph, _ = captured(Two().eval(), torch.randn(5, 4))
    assert observe(graph, [], []) == {}


def test_several_tensors_at_once_are_refused():
    graph, inputs = captured(Two().eval(), torch.randn(5, 4))
    split = next(n for n in graph if "split" in str(n.target))
    with pytest.raises(UsageError, match="observe the pieces"):
        observe(graph, [split], inputs)
