"""Attention that is spelled out becomes one operator, exactly; what is no such attention, or is read in between, stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.lowering.graphs import graph_of
from normfuse.ir.graph import Graph
from normfuse.ir.operators import CHECKS
from normfuse.passes.attention.eager import EagerAttention
from normfuse.reports.model import PassReport
from tests.export.models import AUTO, relative

Spelled = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]
SDPA = torch.ops.aten.scaled_dot_product_attention.default


def _run(forward: Spelled, inputs: tuple[Tensor, ...]) -> tuple[Graph, PassReport]:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor | tuple[Tensor, ...]:
            return forward(q, k, v, m)

    shapes = ({0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO}, None)
    graph = graph_of(torch.export.export(Module(), inputs, dynamic_shapes=shapes, strict=False))
    for check in [n for n in graph.fx.nodes if n.target in CHECKS]:
        graph.fx.erase_node(check)
    return graph, EagerAttention()(graph)


def _inputs() -> tuple[Tensor, ...]:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    return q, k, v, torch.randn(5, 7)


SPELLED: dict[str, Spelled] = {
    "plain": lambda q, k, v, m: (q @ k.transpose(-2, -1)).softmax(-1) @ v,
    "scaled": lambda q, k, v, m: (q @ k.transpose(2, 3) * 0.3).softmax(3) @ v,
    "divided": lambda q, k, v, m: (torch.matmul(q, k.mT) / math.sqrt(8)).softmax(-1) @ v,
    "operands scaled": lambda q, k, v, m: ((q * 0.5) @ (k / 4).permute(0, 1, 3, 2)).softmax(-1) @ v,
    "mask": lambda q, k, v, m: (q @ k.mT * 0.3 + m).softmax(-1) @ v,
    "mask in front": lambda q, k, v, m: (m + q @ k.mT).softmax(-1) @ v,
    "casts and dropout": lambda q, k, v, m: (
        nn.functional.dropout((q @ k.mT + m).softmax(-1, dtype=torch.float32).to(q.dtype), 0.1, training=False) @ v
    ),
    "keys laid out otherwise": lambda q, k, v, m: (q @ k.flip(1).transpose(1, 2).permute(0, 2, 3, 1)).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", SPELLED)
def test_spelled_out_attention_is_one_operator(name: str) -> None:
    inputs = _inputs()
    graph, report = _run(SPELLED[name], inputs)
    assert [site.rule for site in report.applied] == ["eager_attention"]
    assert not report.refused
    assert [n.target for n in graph.fx.nodes].count(SDPA) == 1
    assert not graph.fx.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
    want = SPELLED[name](*inputs)
    got = graph.to_module()(*inputs)
    got = got if isinstance(got, Tensor) else got[0]
    assert isinstance(want, Tensor)
    assert relative(got, want) < 1e-5


OTHERS: dict[str, tuple[Spelled, str]] = {
    "over queries": (lambda q, k, v, m: (q @ k.mT).softmax(2) @ v, "not over"),
    "over the batch": (lambda q, k, v, m: (q @ k.mT).softmax(0) @ v, "not over"),
    "three axes": (lambda q, k, v, m: (q[0] @ k[0].mT).softmax(-1) @ v[0], "not over"),
    "selected": (lambda q, k, v, m: torch.where(m > 0, q @ k.mT, -1e9).softmax(-1) @ v, "mask selects"),
    "filled": (lambda q, k, v, m: (q @ k.mT).masked_fill(m > 0, -1e9).softmax(-1) @ v, "mask selects"),
    "a mask that is larger": (lambda q, k, v, m: (q[:1, :1] @ k[:1, :1].mT + m.expand(2, 4, 5, 7)).softmax(-1) @ v, "through add"),
    "a cap": (lambda q, k, v, m: (q @ k.mT).tanh().softmax(-1) @ v, "through tanh"),
    "two masks": (lambda q, k, v, m: (q @ k.mT + m + m.exp()).softmax(-1) @ v, "through add"),
    "another precision": (lambda q, k, v, m: (q @ k.mT).softmax(-1, dtype=torch.float64).to(q.dtype) @ v, "precision"),
    "a mask of integers": (lambda q, k, v, m: (q @ k.mT + m.round().int()).softmax(-1) @ v, "another dtype"),
    "a factor for each head": (
        lambda q, k, v, m: (q @ k.mT * torch.arange(1.0, 5.0)[:, None, None]).softmax(-1) @ v,
        "through mul",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_attention_that_the_operator_is_not_is_refused_with_the_reason(name: str) -> None:
    forward, words = OTHERS[name]
    graph, report = _run(forward, _inputs())
    assert not report.applied
    assert not graph.fx.find_nodes(op="call_function", target=SDPA)
    assert [words in site.note for site in report.refused] == [True]


NONE: dict[str, Spelled] = {
    "weights on the right": lambda q, k, v, m: q.mT @ (q @ k.mT).softmax(-1),
    "weights of one tensor": lambda q, k, v, m: q.relu().softmax(-1) @ q.mT,
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_attention_is_not_spoken_of(name: str) -> None:
    _, report = _run(NONE[name], _inputs())
    assert not report.applied
    assert not report.refused


READ: dict[str, Spelled] = {
    "weights": lambda q, k, v, m: ((p := (q @ k.mT).softmax(-1)) @ v, p),
    "scores": lambda q, k, v, m: ((s := q @ k.mT + m).softmax(-1) @ v, s.amax(-1)),
    "products": lambda q, k, v, m: ((s := q @ k.mT).mul(0.1).softmax(-1) @ v, s),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_in_between_is_refused_with_the_reason(name: str) -> None:
    _, report = _run(READ[name], _inputs())
    assert not report.applied
    (refused,) = report.refused
    assert "read elsewhere" in refused.note
    assert refused.blocker


def test_a_factor_of_queries_that_others_read_stays_with_them() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        scaled = q * 0.5
        return (scaled @ k.mT).softmax(-1) @ v, scaled

    inputs = _inputs()
    graph, report = _run(forward, inputs)
    assert len(report.applied) == 1
    for got, want in zip(graph.to_module()(*inputs), forward(*inputs), strict=True):
        assert relative(got, want) < 1e-5
