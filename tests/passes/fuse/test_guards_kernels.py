"""What is nearly the left side of a rule for kernels stays; what is the left side, in any spelling, becomes the operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.capture.capture import capture
from normfuse.ir.graph import Graph
from normfuse.ir.operators import CHECKS
from normfuse.ir.passes import Run
from normfuse.passes.fuse.kernels import KERNELS
from tests.passes.guarded import Function

D = 12
X = torch.randn(D, D, dtype=torch.float64)
HALF, INTEGERS = X.half(), (X * 9).long()


def _parts() -> dict[str, Any]:
    torch.manual_seed(0)
    made = {
        "vector": torch.randn(D),
        "column": torch.randn(D, 1),
        "table": torch.randn(D, D),
        "row": torch.randn(1, D),
        "deep": torch.randn(1, 1, D),
    }
    return {name: t.double() for name, t in made.items()} | {
        "single": torch.randn(D),
        "ones": torch.ones(D),
        "whole": torch.arange(D),
        "free": nn.Linear(D, 8, bias=False).double(),
        "shared": nn.Linear(D, D).double(),
    }


def fused(function: Callable[..., Tensor], *inputs: Tensor, free: int | None = None) -> Counter[str]:
    """The operators of ours that the graph has afterwards; dtype and values must be those of the model."""
    model = Function(function, **_parts()).eval()
    shapes = None if free is None else tuple({free: torch.export.Dim("size", min=2)} for _ in inputs)
    graph = Graph.of(capture(model, inputs, None if shapes is None else (shapes,)).gm)
    for check in [n for n in graph.fx.nodes if n.target in CHECKS]:
        graph.fx.erase_node(check)  # as who calls these passes does: it would count as a reader
    for each in KERNELS:
        each(graph, Run())
    with torch.no_grad():
        torch.testing.assert_close(graph.copy().to_module()(*inputs), model(*inputs))
    ours = [n for n in graph.fx.nodes if str(n.target).startswith("normfuse.")]
    assert all(n.all_input_nodes[0].meta["val"].is_floating_point() for n in ours)
    return Counter(str(n.target).split(".")[1] for n in ours)


def rms(x: Tensor, w: Tensor | None = None, eps: float | None = 1e-3) -> Tensor:
    return torch.rms_norm(x, (D,), w, eps)


def crms(a: Tensor, b: Tensor, x: Tensor, scale: float = 1 / (D + 1)) -> Tensor:
    return (x / ((a + b) * scale + 0.1).sqrt()).sin()


def squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, True)


def total(x: Tensor) -> Tensor:
    return x.sum(-1, True)


def l1(x: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    centred = x - x.mean(-1, True)
    return centred / (size(centred) + 0.1)


def spread(x: Tensor) -> Tensor:
    return x.abs().mean(-1, True)


STAY: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "other squares, then the sum": lambda m, x: crms(squares(x.sin()), total(x).square(), x),
    "the sum, then other squares": lambda m, x: crms(total(x).square(), squares(x.sin()), x),
    "squares behind another sum": lambda m, x: crms(total(x.sin()).square(), squares(x), x),
    "a product that is no square": lambda m, x: crms((x * x.sin()).sum(-1, True), total(x).square(), x),
    "another product that is no square": lambda m, x: crms((x.sin() * x).sum(-1, True), total(x).square(), x),
    "a product of two sums": lambda m, x: crms(squares(x), total(x) * total(x.sin()), x),
    "squares without their axis": lambda m, x: crms(x.square().sum(-1), total(x).square(), x),
    "squares over the other axis": lambda m, x: crms(x.square().sum(0, True), total(x).square(), x),
    "a sum without its axis": lambda m, x: crms(squares(x), x.sum(-1).square(), x),
    "a sum over the other axis": lambda m, x: crms(squares(x), x.sum(0, True).square(), x),
    "a negative factor": lambda m, x: (x / ((squares(x) + total(x).square()) * -1e-3 + 10.0).sqrt()).sin(),
    "a division by 0": lambda m, x: (x / ((squares(x) + total(x).square()) / 0 + 0.1).sqrt()).sin(),
    "the mean of another value": lambda m, x: (lambda c: c / (spread(c) + 0.1))(x - x.sin().mean(-1, True)),
    "the mean over the other axis": lambda m, x: (lambda c: c / (spread(c) + 0.1))(x - x.mean(0, True)),
    "the mean without its axis": lambda m, x: (lambda c: c / (spread(c) + 0.1))(x - x.mean(-1)),
    "the largest": lambda m, x: l1(x, lambda c: c.abs().amax(-1, True)),
    "a size without its axis": lambda m, x: l1(x, lambda c: c.abs().mean(-1)),
    "a size over the other axis": lambda m, x: l1(x, lambda c: c.abs().mean(0, True)),
    "the size of another function": lambda m, x: l1(x, lambda c: c.sin().mean(-1, True)),
    "the size of another value": lambda m, x: l1(x, lambda c: x.abs().mean(-1, True)),
    "a negative size": lambda m, x: l1(x, lambda c: spread(c) * -0.01),
    "no size": lambda m, x: l1(x, lambda c: spread(c) * 0.0),
}


@pytest.mark.parametrize("how", STAY)
def test_what_is_nearly_a_norm_stays(how: str) -> None:
    assert not fused(STAY[how], X)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda m, x: crms(total(x).square(), squares(x), x), "crms_norm"),
        (lambda m, x: crms((x * x).sum(-1, True), total(x).pow(2), x), "crms_norm"),
        (lambda m, x: (lambda t: crms(x.pow(2).sum(-1, True), t * t, x))(total(x)), "crms_norm"),
        (lambda m, x: (lambda t: (x / ((squares(x) + t * t) / (D + 1) + 0.1).sqrt()).sin())(total(x)), "crms_norm"),
        (lambda m, x: l1(x, spread), "l1_norm"),
        (lambda m, x: l1(x, lambda c: 1.25 * spread(c)), "l1_norm"),
    ],
)
def test_other_spellings_are_the_norm(function: Callable[..., Tensor], op: str) -> None:
    assert fused(function, X) == {op: 1}


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda m, x: rms(x) * m.vector, ""),
        (lambda m, x: rms(x) * m.vector * m.vector, ""),
        (lambda m, x: rms(x) * m.row, ""),
        (lambda m, x: rms(x) * m.column, "mul"),
        (lambda m, x: rms(x) * m.table, "mul"),
        (lambda m, x: rms(x) * m.deep, "mul"),
        (lambda m, x: rms(x) * m.whole, "mul"),
        (lambda m, x: rms(x) + m.vector, "add"),
        (lambda m, x: (lambda y: y * m.vector + y)(rms(x)), "mul add"),
        (lambda m, x: l1(x, spread) * m.vector + m.vector, ""),
        (lambda m, x: l1(x, spread) + m.column, "add"),
        (lambda m, x: l1(x, spread) + m.vector + m.vector, "add"),
        (lambda m, x: (l1(x, spread) + m.vector) * m.vector, "mul"),
    ],
)
def test_constants_behind_a_norm(function: Callable[..., Tensor], left: str) -> None:
    """What is taken is one value a feature, the gain before the shift; what is left stands behind the operator."""
    model = Function(function, **_parts()).eval()
    graph = Graph.of(capture(model, (X,), None).gm)
    for each in KERNELS:
        each(graph, Run())
    names = [str(n.target).split(".")[1] for n in graph.fx.nodes if n.op == "call_function"]
    assert names[0] in ("rms_norm", "l1_norm")
    assert names[1:] == left.split()
    torch.testing.assert_close(graph.to_module()(X), model(X))


@pytest.mark.parametrize(
    ("function", "x", "ops"),
    [
        (lambda m, x: rms(x, eps=None), HALF * 1e-3, {"rms_norm": 1}),  # which adds the ε of float32
        (lambda m, x: rms(x.float()).half(), HALF, {"rms_norm": 1}),
        (lambda m, x: (rms(x.float()) * m.single).half(), HALF, {"rms_norm": 1}),
        (lambda m, x: rms(x) * m.single, HALF, {"rms_norm": 1}),
        (lambda m, x: rms(x).half(), X, {"rms_norm": 1}),
        (lambda m, x: rms(x.float()).bfloat16(), HALF, {"rms_norm": 1}),
        (lambda m, x: rms(x.float()).bfloat16().half(), HALF, {"rms_norm": 1}),
        (lambda m, x: rms(x.float()).to(x.dtype), INTEGERS, {"rms_norm": 1}),
        (lambda m, x: rms(x + m.single).half(), HALF, {"rms_norm": 1}),
        (lambda m, x: rms(x.float()).softmax(-1, dtype=torch.float16), HALF, {"rms_norm": 1}),
        (lambda m, x: x.to(torch.float64).type_as(rms(x.float())), HALF, {"rms_norm": 1}),
        (lambda m, x: x.softmax(-1, dtype=torch.float32).softmax(-1, dtype=torch.float16), HALF, {}),
        (lambda m, x: x.softmax(-1, dtype=torch.float32).bfloat16(), HALF, {}),
        (lambda m, x: x.softmax(-1, dtype=torch.float32).half(), HALF, {"two_pass_softmax": 1}),
    ],
)
def test_dtypes_stay(function: Callable[..., Tensor], x: Tensor, ops: dict[str, int]) -> None:
    """`fused` holds the dtypes of the results; a norm between casts from half and back to it is one in half."""
    assert fused(function, x) == ops


@pytest.mark.parametrize("function", [lambda m, x: rms(x.float()).half(), lambda m, x: (rms(x.float()) * m.single).half()])
def test_casts_around_a_norm_go(function: Callable[..., Tensor]) -> None:
    graph = Graph.of(capture(Function(function, **_parts()).eval(), (HALF,), None).gm)
    for check in [n for n in graph.fx.nodes if n.target in CHECKS]:
        graph.fx.erase_node(check)
    for each in KERNELS:
        each(graph, Run())
    assert [n.target for n in graph.fx.find_nodes(op="call_function", target=torch.ops.normfuse.rms_norm.default)]
    assert not [n for n in graph.fx.nodes if n.target is torch.ops.aten.to.dtype]


class Every(nn.Module):
    """All of them at once."""

    def forward(self, x: Tensor) -> Tensor:
        return rms(x) + crms(squares(x), total(x).square(), x) + l1(x, spread) + x.softmax(-1)


def test_without_shapes_nothing_is_found() -> None:
    graph = Graph.of(capture(Every().eval(), None, None).gm)
    for each in KERNELS:
        assert not each(graph, Run()).applied


@pytest.mark.parametrize("x", [torch.tensor(2.0), torch.zeros(2, 0)])
def test_without_a_row_nothing_is_found(x: Tensor) -> None:
    assert not fused(lambda m, x: x.softmax(-1), x)


@pytest.mark.parametrize("function", [lambda m, x: x.softmax(-1), lambda m, x: l1(x, spread)])
def test_rows_of_free_length_stay(function: Callable[..., Tensor]) -> None:
    assert not fused(function, X, free=1)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of the gain
@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda m, x: rms(x + x.sin()).tanh(), {"add_rms_norm": 1}),
        (lambda m, x: rms(x + 1.0).tanh(), {"rms_norm": 1}),
        (lambda m, x: rms(x * x.sin()).tanh(), {"rms_norm": 1}),
        (lambda m, x: rms(x[:1] + x.sin()).tanh(), {"rms_norm": 1}),
        (lambda m, x: m.free(rms(x)), {"rms_norm_linear": 1}),
        (lambda m, x: m.free(rms(x, m.single)), {"rms_norm": 1}),
        (lambda m, x: m.free(x), {}),
        (lambda m, x: m.shared(rms(m.shared(x).tanh())), {"rms_norm_linear": 1}),
        (lambda m, x: m.shared(rms(m.shared(x).tanh(), m.vector)), {"rms_norm": 1}),
    ],
)
def test_neighbours(function: Callable[..., Tensor], ops: dict[str, int]) -> None:
    assert fused(function, X) == ops
