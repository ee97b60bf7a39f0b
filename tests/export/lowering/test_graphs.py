"""An exported program becomes a graph for passes and a program again, whatever its inputs and outputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.lowering.graphs import graph_of, with_graph


class Held(nn.Module):
    """Tensors of all kinds, and `call` on them and on inputs that have their names."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call, self.w = call, nn.Parameter(torch.randn(4))
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("dropped", torch.randn(4), persistent=False)

    def forward(self, w: Tensor, kept: Tensor) -> Any:
        return self.call(self, w, kept)


CALLS: dict[str, Callable[..., Any]] = {
    "inputs with the names of tensors": lambda m, x, y: x * m.w + y * m.kept + m.dropped,
    "a tensor that is written down": lambda m, x, y: x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + m.w + y,
    "a size among the outputs": lambda m, x, y: (x + m.w, x.shape[0], y, None, 3),
    "branches": lambda m, x, y: torch.cond(x.sum() > 0, lambda v: v * m.w, lambda v: v + m.kept, (x,)) + y,
}


@pytest.mark.parametrize("how", CALLS)
def test_there_and_back(how: str) -> None:
    inputs = torch.randn(3, 4), torch.randn(4)
    free = None if how == "branches" else ({0: torch.export.Dim("rows")}, None)
    found = torch.export.export(Held(CALLS[how]).eval(), inputs, dynamic_shapes=free)
    signature = found.graph_signature
    again = with_graph(found, graph_of(found))
    read = {n.name for n in found.graph.nodes if n.users}  # what nobody reads is left out
    assert [(s.kind, s.target, s.persistent) for s in again.graph_signature.input_specs if s.target] == [
        (s.kind, s.target, s.persistent) for s in signature.input_specs if s.target and s.arg.name in read
    ]
    assert again.graph_signature.user_inputs == signature.user_inputs
    assert [type(s.arg) for s in again.graph_signature.output_specs] == [type(s.arg) for s in signature.output_specs]
    for x in (inputs[0], -inputs[0]):
        for a, b in zip(found.module()(x, inputs[1]), again.module()(x, inputs[1]), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert [n.target for n in found.graph.nodes if n.op == "call_function"] == [
        n.target for n in again.graph.nodes if n.op == "call_function"
    ]


def test_tensors_are_constants_of_the_graph_and_inputs_are_not() -> None:
    inputs = torch.randn(3, 4), torch.randn(4)
    graph = graph_of(torch.export.export(Held(CALLS["inputs with the names of tensors"]).eval(), inputs))
    assert sorted(graph.constants) == ["dropped", "kept", "w"]
    assert [n.name for n in graph.fx.find_nodes(op="placeholder")] == ["w", "kept"]
