"""A scale goes through what commutes with it, and nothing else: without a proof, the function stays all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.capture.capture import capture
from normfuse.ir.graph import Graph
from normfuse.ir.operators import CHECKS
from normfuse.ir.passes import Run
from normfuse.passes.streams.half_range import HalfRange
from normfuse.reports.model import PassReport
from tests.passes.guarded import Function
from tests.zoo_entry import randomise_norms

D = 8
X = torch.randn(3, 4, D)


def _parts() -> dict[str, Any]:
    torch.manual_seed(0)
    parts = {
        "a": nn.Linear(D, D), "b": nn.Linear(D, D), "bare": nn.Linear(D, D, bias=False), "norm": nn.LayerNorm(D),
        "plain": nn.LayerNorm(D, elementwise_affine=False), "rms": nn.RMSNorm(D), "batch": nn.BatchNorm1d(4),
        "instance": nn.InstanceNorm1d(4), "table": torch.randn(4, D), "gain": torch.rand(D) + 0.5, "tokens": nn.Embedding(9, D),
        "conv": nn.Conv1d(4, 4, 3, padding=1), "counts": torch.arange(D),
    }  # fmt: skip
    for name in ("a", "bare"):
        for p in parts[name].parameters():  # type: ignore[attr-defined]
            p.data.mul_(2e5)
    return parts


def scaled(function: Callable[..., Any], x: Tensor = X, skip: Sequence[tuple[str, str]] = ()) -> PassReport:
    """What the pass did; values that are finite must be what they were, up to the roundings of numbers 2^k times as small."""
    model = randomise_norms(Function(function, **_parts())).eval()
    graph = Graph.of(capture(model, (x,), None).gm)
    for check in [n for n in graph.fx.nodes if n.target in CHECKS]:
        graph.fx.erase_node(check)  # it would count as a reader
    report = HalfRange()(graph, Run([[x]], skip=skip))
    with torch.no_grad():
        expected, found = model(x), graph.to_module()(x)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    return report


SCALED: dict[str, Callable[[Any, Tensor], Any]] = {
    "without a bias": lambda m, x: m.norm(m.bare(x)),
    "written by a norm": lambda m, x: m.rms(m.norm(x) * 1e5 + x),
    "read by a norm without a gain": lambda m, x: m.plain(m.a(x)),
    "read by a norm that keeps statistics": lambda m, x: m.batch(m.a(x)) * 1e-6,
    "read by a norm that keeps none": lambda m, x: m.instance(m.a(x)),
    "read by a convolution": lambda m, x: m.norm(m.conv(m.a(x))),
    "a sum with a part that fits": lambda m, x: m.norm(m.a(x) + x.tanh()),
    "a sum with a table": lambda m, x: m.norm(m.table + m.a(x)),
    "a difference": lambda m, x: m.norm(x.sin() - m.a(x)),
    "joined with a table": lambda m, x: m.norm(torch.cat([m.a(x), m.table.expand(3, 4, D)], 1)),
    "padded with zeros": lambda m, x: m.norm(F.pad(m.a(x), (0, 0, 1, 1))),
    "times a gate": lambda m, x: m.norm(m.a(x) * x.sigmoid()),
    "a gate times it": lambda m, x: m.norm(x.sigmoid() * m.a(x)),
    "a product with weights": lambda m, x: m.norm(x.sin() * m.a(x)),
    "over a gate": lambda m, x: m.norm(m.a(x) / (x.sigmoid() + 1)),
    "times a matrix": lambda m, x: m.norm(m.a(x) @ x.transpose(1, 2).softmax(-1) @ x),
    "a matrix times it": lambda m, x: m.norm(x.softmax(-1) @ m.a(x).transpose(1, 2) @ x),
    "attention": lambda m, x: m.norm(F.scaled_dot_product_attention(x[None], x[None], m.a(x)[None])),
    "in float64": lambda m, x: m.norm(m.a(x).double().float()),
    "a number that brings it down": lambda m, x: (m.a(x) * 1e-5).tanh(),
    "a number that lifts it": lambda m, x: m.norm(m.a(x) * 3.0 + x),
    "a number below it": lambda m, x: m.norm(m.a(x) / 3.0),
    "read twice": lambda m, x: (lambda s: m.norm(s) + m.rms(s))(m.a(x)),
    "read by a mask": lambda m, x: m.norm(m.a(x)) + torch.where(x > 0, 0.0, -1e30).softmax(-1),
    "one small part leaves": lambda m, x: (lambda s: (m.norm(s + m.a(x)), s.tanh()))(m.b(x)),
    "numbers that lift it, read in between": lambda m, x: (lambda s: m.norm(s * 3.0 + x) + m.rms(s))(m.a(x)),
    "a number that lifts what fits": lambda m, x: (lambda s: m.norm(s * 1e6 + m.a(s)) + m.rms(s))(m.b(x)),
    "a layer that reads and writes": lambda m, x: (lambda s: m.norm(s + m.a(s)))(m.b(x)),
    "a norm that reads and writes": lambda m, x: (lambda s: m.rms(s + m.a(x) + m.norm(s)))(m.b(x) * 1e-4),
    "two streams": lambda m, x: m.b(m.norm(m.a(x))) + m.norm(m.bare(x.sin())),
}


TWO = {"two streams", "read by a norm that keeps statistics", "read by a convolution"}  # which gives large numbers, too


@pytest.mark.parametrize("how", SCALED)
def test_what_commutes_is_scaled(how: str) -> None:
    report = scaled(SCALED[how])
    assert len(report.applied) == 1 + (how in TWO)  # what was scaled once fits
    assert not report.refused


def test_a_set_that_may_not_be_scaled_is_not_tried_from_elsewhere() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.a(x) + m.bare(x))

    (site,) = scaled(twice).applied
    assert not scaled(twice, skip=[(site.rule, site.path)]).applied


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "made by what has nothing to scale": (lambda m, x: m.norm(x.abs().exp() * 0 + torch.exp(x.abs() + 12)), "nothing to scale"),
    "a part with nothing to scale": (lambda m, x: m.norm(m.a(x) + torch.exp(x.abs() + 12)), "nothing to scale"),
    "an output": (lambda m, x: (m.a(x), m.norm(m.a(x))), "gives it out"),
    "times itself": (lambda m, x: (lambda s: m.norm(s * s))(m.a(x)), "by itself"),
    "times its part": (lambda m, x: (lambda s: m.norm(s * (s + x)))(m.a(x)), "by itself"),
    "over itself": (lambda m, x: (lambda s: m.norm(s + (s / (s.abs() + 1))))(m.a(x)), ""),
    "a number over it": (lambda m, x: m.norm(m.a(x)) + 1.0 / m.a(x), "does not commute"),
    "padded with ones": (lambda m, x: m.norm(F.pad(m.a(x), (0, 0, 1, 1), value=1.0)), "does not commute"),
    "attention with it": (lambda m, x: m.norm(F.scaled_dot_product_attention(m.a(x)[None], x[None], x[None])), "does not commute"),
    "compared": (lambda m, x: torch.where(m.a(x) > 3.0, x, -x), "does not commute"),
    "cast to integers": (lambda m, x: m.a(x).long(), "does not commute"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_commute_is_refused(how: str) -> None:
    call, words = REFUSED[how]
    report = scaled(call)
    assert any(words in site.note for site in report.refused)


@pytest.mark.parametrize("call", [lambda m, x: m.norm(m.b(x)), lambda m, x: x.long() * 100000 + m.counts])
def test_what_fits_or_is_no_float_stays(call: Callable[..., Any]) -> None:
    report = scaled(call)
    assert (report.applied, report.refused) == ((), ())
