"""A norm whose readers are normalized again: dropped where all of them are, kept where one is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.api import DEFAULT
from normfuse.capture.capture import capture
from normfuse.ir.graph import Graph
from normfuse.numerics.evaluate import evaluate
from normfuse.passes import PASSES
from normfuse.passes.cancel import Cancel
from tests.zoo import ZOO, randomise_norms

D, HEADS = 16, 4


class Attention(nn.Module):
    """RMSNorm, bias-free projections, norms of each head: Gemma's order."""

    def __init__(self, special="", eps=1e-6, bias=False):
        super().__init__()
        self.special, head = special, D // HEADS
        self.norm = nn.RMSNorm(D, eps=eps)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=bias) for _ in range(4))
        self.q_norm, self.k_norm, self.v_norm = nn.RMSNorm(head, eps=eps), nn.LayerNorm(head, eps=eps), nn.RMSNorm(head, eps=eps)
        self.tokens = nn.RMSNorm((5, head), eps=eps)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.special == "tokens together":
            v = self.tokens(v)
        elif self.special != "values are not normalized":
            v = self.v_norm(v)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(model, passes=DEFAULT):
    """The graph without the default pipeline's undoing: `cancel` is not an identity."""
    captured = capture(randomise_norms(model).double().eval(), (X,))
    graph = Graph.of(captured.gm)
    for name in passes:
        PASSES[name](graph)
    before = graph.copy()
    report = Cancel()(graph)
    expected, found = (evaluate(g, [X], exact=True)[0] for g in (before, graph))
    return graph, report, float((found - expected).abs().max() / expected.abs().max())


def norms(graph):
    return sum(n.op == "call_function" and "norm" in str(n.target) for n in graph)


def test_dropped_where_every_reader_is_normalized_again():
    graph, report, error = run(Attention())
    assert [s.path for s in report.applied] == ["norm"]
    assert norms(graph) == 3
    assert error < 1e-4
    assert "ε" in report.applied[0].note
    assert Cancel.changes


def test_the_error_is_of_the_order_of_epsilon():
    errors = [run(Attention(eps=eps))[2] for eps in (1e-4, 1e-8, 0.0)]
    assert errors[0] > 1e2 * errors[1] > 0
    assert errors[2] < 1e-14


@pytest.mark.parametrize(
    ("special", "bias", "reason"),
    [
        pytest.param("values are not normalized", False, "is not normalized again", id="values are not normalized"),
        pytest.param("tokens together", False, "normalizes several tokens together", id="several tokens together"),
        pytest.param("", True, "has a bias", id="bias"),
    ],
)
def test_refused(special, bias, reason):
    _, report, error = run(Attention(special, bias=bias))
    assert not report.applied
    assert error == 0
    assert [reason in s.note for s in report.refused] == [True] if not bias else not report.refused


def test_a_gain_has_to_go_first():
    _, report, _ = run(Attention(), passes=("cleanup",))
    assert [(s.path, s.remedy) for s in report.refused] == [("norm", "run weightless before cancel")]


@pytest.mark.parametrize("name", ["llama_rms", "preln_gpt"])
def test_ordinary_models_report_nothing(name):
    entry = ZOO[name]
    graph = Graph.of(capture(entry.build(), entry.args).gm)
    for step in DEFAULT:
        PASSES[step](graph)
    report = Cancel()(graph)
    assert not report.applied
    assert not report.refused


def test_without_shapes_nothing_is_done():
    report = normfuse.report(normfuse.optimize(Attention().eval(), passes=["cleanup", Cancel()]))
    assert not [s for s in report.applied if s.rule == "norm_before_norm_cancels"]
