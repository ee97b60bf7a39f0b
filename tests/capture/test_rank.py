"""What a graph without shapes says about numbers of dimensions and dtypes: right, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normfuse.capture.symbolic.symbolic import symbolic
from normfuse.ir.dtypes import dtype_of, floating


class Known(nn.Module):
    """A function of `x` (2, 4, 6, 6) whose rank the model states, and of a value of which nothing is known."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.norm, self.layer = function, nn.BatchNorm2d(4), nn.Linear(6, 6)
        self.table = nn.Parameter(torch.rand(1, 1, 1, 1, 6))
        self.wide = nn.Parameter(torch.rand(6, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(self, self.norm(x), y)


def result(function: Callable[..., Any]) -> fx.Node:
    out = symbolic(Known(function).eval()).graph.output_node().args[0]
    assert isinstance(out, fx.Node)
    return out


@pytest.mark.parametrize(
    ("function", "rank"),
    [
        pytest.param(lambda m, x, y: x * 2, 4, id="number"),
        pytest.param(lambda m, x, y: x * x.shape[1], 4, id="size"),
        pytest.param(lambda m, x, y: x + m.table, 5, id="constant that adds a dimension"),
        pytest.param(lambda m, x, y: x.masked_fill(m.table > 0.5, 0), 5, id="mask that adds a dimension"),
        pytest.param(lambda m, x, y: x.clamp(min=m.table), 5, id="bound that adds a dimension"),
        pytest.param(lambda m, x, y: torch.rsub(x, m.table), 5, id="rsub"),
        pytest.param(lambda m, x, y: x + y, None, id="unknown"),
        pytest.param(lambda m, x, y: x.masked_fill(y > 0, 0), None, id="unknown mask"),
        pytest.param(lambda m, x, y: x.sum(()), 0, id="all dimensions"),
        pytest.param(lambda m, x, y: x.sum((1, 2)), 2, id="two dimensions"),
        pytest.param(lambda m, x, y: x.mean((2, 3), keepdim=True), 4, id="kept dimensions"),
        pytest.param(lambda m, x, y: x.squeeze(), None, id="squeeze"),
    ],
)
def test_rank(function: Callable[..., Any], rank: int | None) -> None:
    assert result(function).meta.get("rank") == rank
    out = Known(function).eval()(torch.rand(2, 4, 6, 6), torch.rand(1, 1, 2, 4, 6, 6))
    assert rank in (None, out.ndim)


@pytest.mark.parametrize(
    ("function", "dtype", "is_floating"),
    [
        pytest.param(lambda m, x, y: y, None, None, id="input"),
        pytest.param(lambda m, x, y: y / 255, None, None, id="division"),
        pytest.param(lambda m, x, y: m.layer(y / 255), torch.float32, True, id="layer"),
        pytest.param(lambda m, x, y: torch.count_nonzero(y, 1), torch.int64, False, id="count"),
        pytest.param(lambda m, x, y: torch.count_nonzero(y, 1) * 2, torch.int64, False, id="count times an integer"),
        pytest.param(lambda m, x, y: torch.count_nonzero(y, 1) * 1.0, torch.float32, True, id="count times a float"),
        pytest.param(lambda m, x, y: m.layer(x).argmax(-1), torch.int64, False, id="argmax"),
        pytest.param(lambda m, x, y: m.layer(x) > 0, torch.bool, False, id="comparison"),
        pytest.param(lambda m, x, y: (m.layer(x) > 0) * 2.0, torch.float32, True, id="mask times a float"),
        pytest.param(lambda m, x, y: m.layer(x) * m.wide, torch.float64, True, id="promotion"),
        pytest.param(lambda m, x, y: m.layer(x) / x.shape[-1] ** 0.5, torch.float32, True, id="computed number"),
        pytest.param(lambda m, x, y: F.softmax(m.layer(x), -1, dtype=torch.float64), torch.float64, True, id="dtype="),
        pytest.param(lambda m, x, y: m.layer(x).half(), torch.float16, True, id="cast"),
        pytest.param(lambda m, x, y: m.layer(x).max(1)[1], torch.int64, False, id="indices"),
        pytest.param(lambda m, x, y: m.layer(x).chunk(2)[1], torch.float32, True, id="part"),
        pytest.param(lambda m, x, y: x, None, True, id="norm"),
    ],
)
def test_dtype(function: Callable[..., Any], dtype: torch.dtype | None, is_floating: bool | None) -> None:
    node = result(function)
    assert dtype_of(node) == dtype
    assert floating(node) is is_floating


def test_a_layer_says_what_its_input_is() -> None:
    gm = symbolic(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(6, 6).half()))
    assert {dtype_of(n) for n in gm.graph.nodes if n.op != "output"} == {torch.float16}
    images = symbolic(Known(lambda m, x, y: m.layer(torch.exp(y))))
    y = list(images.graph.find_nodes(op="placeholder"))[1]
    assert floating(y) is None  # exp makes floats of integers, too
