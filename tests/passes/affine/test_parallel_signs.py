"""Branches that are subtracted merge like those that are added, with their signs."""

import pytest
import torch
from torch import nn

import normfuse
from tests.passes.guarded import Function, left, unproven

aten = torch.ops.aten


def convolutions(fast):
    return [n for n in fast.graph.nodes if n.target in (aten.conv2d.default, aten.linear.default)]


def convs():
    return {
        "a": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "b": nn.Conv2d(4, 4, 1, groups=4),
        "n": nn.BatchNorm2d(4),
        "g": torch.randn(4, 1, 1),
    }


@pytest.mark.parametrize(
    "sum_of",
    [
        pytest.param(lambda m, x: m.a(x) - m.b(x), id="a - b"),
        pytest.param(lambda m, x: m.b(x) - (m.a(x) - x), id="b - (a - x)"),
        pytest.param(lambda m, x: x - (m.n(x) - m.a(x)), id="x - (n - a)"),
        pytest.param(lambda m, x: m.a(x) - x - x, id="a - x - x"),
        pytest.param(lambda m, x: x - m.a(x) + x - m.n(x), id="x - a + x - n"),
        pytest.param(lambda m, x: x + m.g * (m.a(x) + m.n(x) - m.n(x)), id="a + n - n"),
        pytest.param(lambda m, x: x + m.g * (m.a(x) + m.b(x) - m.n(x)), id="a mixer of tokens with its norm subtracted"),
    ],
)
def test_one_convolution_is_left(sum_of):
    fast, report = unproven(Function(lambda m, x: sum_of(m, torch.tanh(x)), **convs()), torch.randn(2, 4, 6, 6))
    assert left(report) == 0
    assert [str(n.target) for n in fast.graph.nodes if n.op == "call_function"] == ["aten.tanh.default", "aten.conv2d.default"]


@pytest.mark.parametrize("forward", [lambda m, x: m.a(x) - m.b(x), lambda m, x: x.exp() - m.a(x) + m.b(x)])
def test_linear_operators(forward):
    fast, _ = unproven(Function(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4, bias=False)), torch.randn(2, 3, 4))
    assert len(convolutions(fast)) == 1


def test_what_stays_keeps_its_sign():
    fast, _ = unproven(Function(lambda m, x, y: y - m.a(x) - y.exp() + m.b(x), **convs()), *torch.randn(2, 2, 4, 6, 6))
    assert len(convolutions(fast)) == 1


def test_another_reader_of_a_subtracted_branch():
    def forward(m, x):
        b = m.b(x)
        return m.a(x) - b, b.tanh()

    fast, report = unproven(Function(forward, **convs()), torch.randn(2, 4, 6, 6))
    assert len(convolutions(fast)) == 2
    assert "consumers" in " ".join(s.note for s in report.refused)


def test_a_second_run_finds_nothing():
    fast, _ = unproven(Function(lambda m, x: x + m.g * (m.a(x) + m.b(x) - m.n(x)), **convs()), torch.randn(2, 4, 6, 6))
    assert not normfuse.report(normfuse.optimize(fast)).applied


def test_branches_of_two_kinds_are_two_convolutions():
    branches = {"c": nn.Conv2d(4, 4, 3, padding=1), "d": nn.Conv2d(4, 4, 1)}
    model = Function(lambda m, x: m.a(x) + m.c(x) - (m.d(x) - m.b(x)), **convs(), **branches)
    fast, _ = unproven(model, torch.randn(2, 4, 6, 6), passes=["bake"])
    assert len(convolutions(fast)) == 2
    assert not normfuse.report(normfuse.optimize(fast)).applied
