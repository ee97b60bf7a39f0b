"""Whose ranges are noted: images that convolutions with static scales give, and images that are made of these."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import normfuse
from normfuse.capture.capture import capture
from normfuse.ir.graph import Graph
from normfuse.ir.ranges import range_of
from normfuse.ir.views import Conv
from normfuse.passes.quantize.between import note_ranges, observed_ranges
from normfuse.passes.quantize.layers.conv2d import read_conv2d
from normfuse.passes.quantize.reach import Reach

aten = torch.ops.aten


class Branches(nn.Module):
    """Two convolutions, and a linear layer in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.a, self.b = nn.Linear(8, 8), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(x)
        y = self.a(x).relu()
        return y.log(), y > 1, y.flatten(2).tanh(), self.b(x).sigmoid()


def _graph() -> tuple[Graph, list[Any]]:
    graph = Graph.of(capture(Branches().eval(), (torch.randn(2, 4, 8, 8),), None).gm)
    layers: list[Any] = []
    nodes = graph.fx.find_nodes(op="call_function", target=aten.conv2d.default)
    for node, activations in zip(nodes, ("static", "dynamic"), strict=True):
        op = graph.view(node, 2)
        assert isinstance(op, Conv)
        layers.append(read_conv2d(node, op, "", normfuse.ShiftQuant(activations=activations)))  # type: ignore[arg-type]
    (linear,) = graph.fx.find_nodes(op="call_function", target=aten.linear.default)
    return graph, [*layers, SimpleNamespace(node=linear, spec=normfuse.ShiftQuant(activations="static"))]


def test_images_behind_static_convolutions_are_watched() -> None:
    graph, layers = _graph()
    found = observed_ranges(graph, [[torch.randn(2, 4, 8, 8)]], layers)
    assert [n.target for n in found] == [aten.conv2d.default, aten.relu.default, aten.log.default]
    assert observed_ranges(graph, [], layers) == {}


def test_what_is_known_is_noted_where_the_value_is_now() -> None:
    _, (layer, other, _) = _graph()
    note_ranges({layer.node: Reach(-1.0, 2.0), other.node: Reach(0.0, 1.0, finite=False)}, {layer.node: layer.x})
    assert range_of(layer.x) == (-1.0, 2.0)
    assert range_of(layer.node) is None
    assert "custom" not in other.node.meta
