"""Sizes that weights fix, where a graph has no shapes."""

import pytest
import torch
from torch import Tensor, nn

from normfuse.capture.capture import capture
from normfuse.ir.graph import Graph
from normfuse.passes.patterns.known import infer

CASES = [
    pytest.param(lambda y: torch.tanh(y), id="tanh"),
    pytest.param(lambda y: torch.where(y > 0, y, 0.1 * y), id="where"),
    pytest.param(lambda y: nn.functional.hardswish(y), id="hardswish"),
    pytest.param(lambda y: y.softmax(-1), id="softmax"),
    pytest.param(lambda y: y.double(), id="cast"),
    pytest.param(lambda y: y.unflatten(-1, (2, 3)), id="unflatten"),
    pytest.param(lambda y: y.unflatten(-1, (2, 3)).flatten(-2), id="flatten"),
    pytest.param(lambda y: y.reshape(-1, 2, 6), id="reshape"),
    pytest.param(lambda y: y.reshape(-1, 2, 6).transpose(1, 2), id="transpose"),
    pytest.param(lambda y: y.reshape(-1, 2, 6).permute(2, 0, 1).flatten(0, 1), id="permute and flatten"),
    pytest.param(lambda y: y.reshape(-1, 2, 6).flatten(1, 2), id="flatten with positive axes"),
    pytest.param(lambda y: y.mean(-1), id="mean"),
    pytest.param(lambda y: nn.functional.max_pool1d(y, 2), id="max_pool1d"),
    pytest.param(lambda y: nn.functional.adaptive_avg_pool2d(y.reshape(-1, 4, 2, 3), 1), id="adaptive_avg_pool2d"),
]


class _Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 6), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


@pytest.mark.parametrize("function", CASES)
def test_inferred_sizes_are_those_of_the_values(function):
    model = _Model(function).eval()
    graph = Graph.of(capture(model, None, None).gm)
    infer(graph)
    output = next(iter(graph.fx.find_nodes(op="output"))).args[0]
    found = (output[0] if isinstance(output, tuple | list) else output).meta["sizes"]
    for x in (torch.randn(8, 4), torch.randn(2, 4, 4)):
        shape = model(x).shape
        assert all(shape[axis] == size for axis, size in found.items())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda y: torch.tanh(y), {-1: 6}, id="tanh"),
        pytest.param(lambda y: y.unflatten(-1, (2, 3)).exp(), {-2: 2, -1: 3}, id="unflatten"),
        pytest.param(lambda y: y.unflatten(-1, (2, 3)).flatten(-2), {-1: 6}, id="flatten"),
        pytest.param(lambda y: y.reshape(-1, 2, 6).transpose(1, 2), {-2: 6, -1: 2}, id="transpose"),
        pytest.param(lambda y: nn.functional.max_pool2d(y.reshape(-1, 5, 4, 2), 2), {-3: 5}, id="max_pool2d"),
    ],
)
def test_sizes_that_follow_are_inferred(function, expected):
    graph = Graph.of(capture(_Model(function).eval(), None, None).gm)
    infer(graph)
    output = next(iter(graph.fx.find_nodes(op="output"))).args[0]
    assert (output[0] if isinstance(output, tuple | list) else output).meta["sizes"] == expected
