"""Neighbours of quantized layers become one operator: the same numbers, and a reason where they may not."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from normfuse.capture.capture import capture
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Pass, Run
from normfuse.passes.fuse import FUSED, CodesBetween, NormCodes, Residual, SharedCodes
from normfuse.reports.model import PassReport
from tests.export.quantized_models import linear

K = 16


def _captured(model: nn.Module, *inputs: Tensor) -> Graph:
    for norm in (m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))):
        for p in norm.parameters():
            nn.init.normal_(p, 1, 0.3)
    return Graph.of(capture(model.eval(), inputs, None).gm)


def _fused(model: nn.Module, passes: tuple[Pass, ...], *inputs: Tensor) -> tuple[Counter[str], list[PassReport]]:
    """The operators that the graph has afterwards; it must compute what the model does, in float64, where all is the definition."""
    graph = _captured(model, *inputs)
    before = graph.copy().to_module()
    reports = [each(graph, Run()) for each in passes]
    after = graph.copy().to_module()
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    for a, b in zip(_outputs(before.double().forward, exact), _outputs(after.double().forward, exact), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    nodes = [n for n in graph.fx.nodes if n.op == "call_function" and "normfuse" in str(n.target)]
    return Counter(_name(n) for n in nodes), reports


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1]


def _outputs(model: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(torch.utils._pytree.tree_leaves(model(*inputs)))


class Model(nn.Module):
    """`call` on the layers of the model and on its inputs."""

    def __init__(self, call: Callable[..., Any], norm: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.call, self.norm = call, nn.LayerNorm(K) if norm is None else norm
        self.a, self.b = linear(K, K, epilogue="gelu", **options), linear(K, K, **options)
        self.static, self.narrow = linear(K, K, static=0.03), linear(K, K, activation_bits=4)

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self, *inputs)


X = (torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.parametrize("static", [None, 0.03])
def test_a_residual_is_added_by_the_layer(static: float | None) -> None:
    names, (report,) = _fused(Model(lambda m, x: x + m.a(x), static=static), (Residual(),), *X)
    assert names == {"shiftquant_linear": 1}
    assert [(s.rule, s.path) for s in report.applied] == [("residual", report.applied[0].path)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: (y := m.a(x), y + x), "read elsewhere"),
        (lambda m, x: m.a(x) + x[:1], "shape and dtype"),
        (lambda m, x: m.a(x) + 1.0, "shape and dtype"),
    ],
)
def test_a_residual_that_stays(call: Callable[..., Any], words: str) -> None:
    _, (report,) = _fused(Model(call), (Residual(),), *X)
    assert not report.applied
    assert words in report.refused[0].note


@pytest.mark.parametrize("call", [lambda m, x: m.a(x) * x, lambda m, x: (y := m.a(x)) + y], ids=["a product", "the layer itself"])
def test_what_is_no_residual(call: Callable[..., Any]) -> None:
    _, (report,) = _fused(Model(call), (Residual(),), *X)
    assert not report.applied
    assert not report.refused


def test_one_residual_a_layer() -> None:
    names, (report,) = _fused(Model(lambda m, x: x + m.a(x) + x.sin()), (Residual(),), *X)
    assert names == {"shiftquant_linear": 1}
    assert len(report.applied) == 1


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(K), nn.RMSNorm(K, eps=1e-6), nn.LayerNorm(K, elementwise_affine=False), nn.RMSNorm(K, eps=1e-3)]
)
def test_a_norm_writes_codes_and_the_sum(norm: nn.Module) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        x = x + x.roll(1, 0)
        y: Tensor = m.norm(x)
        return x + m.a(y) * m.b(y)

    names, (report,) = _fused(Model(call, norm), (NormCodes(),), *X)
    assert names == {"norm_quantize": 1, "shiftquant_matmul": 2}
    assert "with the sum" in report.applied[0].note


@pytest.mark.parametrize(
    ("call", "norm", "words"),
    [
        (lambda m, x: (y := m.norm(x), m.a(y)), None, "gives it out"),
        (lambda m, x: m.a(m.norm(x)) + m.norm(x).relu(), None, None),
        (lambda m, x: (y := m.norm(x)).relu() + m.a(y), None, "read as floats"),
        (lambda m, x: m.a(m.norm(x)), nn.LayerNorm((5, K)), "last axis alone"),
    ],
)
def test_a_norm_that_stays(call: Callable[..., Any], norm: nn.Module | None, words: str | None) -> None:
    """Two calls of one norm are two norms: the one that only a layer reads writes codes."""
    names, (report,) = _fused(Model(call, norm), (NormCodes(),), *X)
    assert names["norm_quantize"] == (words is None)
    assert [words in s.note for s in report.refused] == ([True] if words else [])


@pytest.mark.parametrize(
    "call", [lambda m, x: m.a(m.norm(x * x.roll(1, 0))), lambda m, x: m.a(m.norm(x[:1] + x)), lambda m, x: m.a(m.norm(x + 1.0))]
)
def test_a_norm_writes_codes_without_a_sum(call: Callable[..., Any]) -> None:
    names, (report,) = _fused(Model(call), (NormCodes(),), *X)
    assert names == {"norm_quantize": 1, "shiftquant_matmul": 1}
    assert "with the sum" not in report.applied[0].note


def test_a_gain_of_ones_is_none() -> None:
    norm = nn.LayerNorm(K)
    graph = _captured(Model(lambda m, x: m.a(m.norm(x)), norm), *X)
    (gain,) = [c for name, c in graph.constants.items() if name.endswith("norm.weight")]
    for reader in graph.readers_of(gain):
        op = graph.view(reader, 1)
        graph.replace(reader, dataclasses.replace(op, gamma=Constant.of(torch.ones(K)), node=None))  # type: ignore[call-arg]
    NormCodes()(graph, Run())
    (call,) = [n for n in graph.fx.nodes if n.target is torch.ops.normfuse.norm_quantize.default]
    assert call.args[2] is None
    assert call.args[3] is not None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: m.static(m.norm(x)), None),
        (lambda m, x: (y := m.norm(x), m.a(y) + m.static(y))[1], "read as floats"),
        (lambda m, x: (y := m.norm(x), m.a(y) + m.narrow(y))[1], "different widths"),
        (lambda m, x: (y := m.norm(x), m.a(y) + y)[1], "read as floats"),
        (lambda m, x: (y := m.norm(x), m.a(x) + y)[1], None),
    ],
)
def test_who_reads_codes(call: Callable[..., Any], words: str | None) -> None:
    """Scales that are found by rows, of one width; and what a layer adds is no code."""
    names, (_, report) = _fused(Model(call), (Residual(), NormCodes()), *X)
    assert not names["norm_quantize"]
    assert not report.applied
    assert [words in s.note for s in report.refused] == ([True] if words else [])


def test_a_check_is_no_reader() -> None:
    """`to` leaves one behind, which fails where codes stand in the place of floats."""
    graph = _captured(Model(lambda m, x: m.a(m.norm(x))), *X)
    (norm,) = [n for n in graph.fx.nodes if n.target is torch.ops.aten.layer_norm.default]
    with graph.fx.inserting_after(norm):
        graph.fx.call_function(torch.ops.aten._assert_tensor_metadata.default, (norm,), {"dtype": torch.float32})
    assert NormCodes()(graph, Run()).applied
    graph.to_module()(*X)


def test_products_write_codes_for_products() -> None:
    names, (report,) = _fused(Model(lambda m, x: m.b(m.b(m.a(x)))), (CodesBetween(),), *X)
    assert names == {"quantize_rows": 1, "shiftquant_matmul_quantize": 2, "shiftquant_matmul": 1}
    assert len(report.applied) == 2


@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        (lambda m, x: m.b(y := m.a(x)) + y, {}, "read as floats"),
        (lambda m, x: m.b(m.a(x) + x), {}, None),
        (lambda m, x: m.b(m.a(x)), {"static": 0.03}, None),
        (lambda m, x: m.b(m.static(x)), {}, "scale is static"),
    ],
)
def test_products_that_write_floats(call: Callable[..., Any], options: dict[str, Any], words: str | None) -> None:
    _, (_, report) = _fused(Model(call, **options), (Residual(), CodesBetween()), *X)
    assert not report.applied
    if words is not None:
        assert words in report.refused[0].note


def test_a_product_with_a_residual_writes_floats() -> None:
    _, (_, report) = _fused(Model(lambda m, x: m.b(m.a(x) + x)), (Residual(), CodesBetween()), *X)
    assert "residual" in report.refused[0].note


def test_one_quantization_serves_all_readers() -> None:
    names, _ = _fused(Model(lambda m, x: m.a(x) * m.b(x) + m.a(x)), (SharedCodes(),), *X)
    assert names == {"quantize_rows": 1, "shiftquant_matmul": 3}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda m, x: m.a(x), {"shiftquant_linear": 1}),
        (lambda m, x: m.static(x) * m.static(x), {"shiftquant_linear": 2}),
        (lambda m, x: m.a(x) * m.static(x), {"shiftquant_linear": 2}),
        (lambda m, x: m.a(x) * m.narrow(x), {"shiftquant_linear": 2}),
        (lambda m, x: m.a(x.sin()) + x * m.b(x), {"shiftquant_linear": 2}),
        (lambda m, x: x * m.a(x) * m.b(x), {"quantize_rows": 1, "shiftquant_matmul": 2}),
    ],
)
def test_who_shares_a_quantization(call: Callable[..., Any], names: dict[str, int]) -> None:
    found, _ = _fused(Model(call), (SharedCodes(),), *X)
    assert found == names


def test_what_a_layer_adds_is_no_reader_of_codes() -> None:
    found, _ = _fused(Model(lambda m, x: m.b(x).sin() * (m.a(x.sin()) + x)), (Residual(), SharedCodes()), *X)
    assert found == {"shiftquant_linear": 2}


def test_the_first_of_several_readers_decides_for_all() -> None:
    graph = _captured(Model(lambda m, x: m.a(x) * m.b(x)), *X)
    path = SharedCodes()(graph.copy(), Run()).applied[0].path
    assert not SharedCodes()(graph, Run(skip=[("shared_codes", path)])).applied


@pytest.mark.parametrize("each", [SharedCodes(), CodesBetween()])
def test_layers_in_half_keep_to_floats(each: Pass) -> None:
    graph = _captured(Model(lambda m, x: m.b(m.a(x)) * m.a(x)), X[0].half())
    report = each(graph, Run())
    assert not report.applied
    assert all("float32" in site.note for site in report.refused)


def test_all_together_and_what_half_does() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        y: Tensor = x + m.b(m.a(m.norm(x)))
        return m.b(m.norm(y)) + y

    names, _ = _fused(Model(call), FUSED, *X)
    assert names == {"norm_quantize": 2, "shiftquant_matmul_quantize": 1, "shiftquant_matmul": 2}
    model = Model(call)
    model.norm.half()
    graph = _captured(model, X[0].half())
    report = NormCodes()(graph, Run())
    assert not report.applied
    assert "float32" in report.refused[0].note


def test_a_run_may_forbid_a_site() -> None:
    graph = _captured(Model(lambda m, x: x + m.a(x)), *X)
    path = Residual()(graph.copy(), Run()).applied[0].path
    assert not Residual()(graph, Run(skip=[("residual", path)])).applied
