"""Views of columns, against what PyTorch says: a root that holds its own column numbers shows which columns a head reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normfuse.export.lowering.graphs import graph_of
from normfuse.passes.attention.heads import Heads, heads
from tests.export.models import AUTO


def _views(forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Heads]:
    class Module(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return forward(y.relu())

    graph = graph_of(torch.export.export(Module(), (x,), dynamic_shapes=({0: AUTO, 1: AUTO},)))
    (out,) = graph.fx.output_node().all_input_nodes
    return [found for found in heads(graph, out) if found.root.target is torch.ops.aten.relu.default]


LAYOUTS = {
    "packed": lambda y: y.reshape(*y.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)[1],
    "unbind": lambda y: y.reshape(*y.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)[2],
    "split": lambda y: y.split(32, 2)[1].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "chunk": lambda y: y.chunk(3, -1)[2].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "slice": lambda y: y[..., 16:48].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "interleaved": lambda y: y.view(*y.shape[:2], 4, 3, 8).transpose(1, 2).unbind(3)[1],
    "innermost": lambda y: y.view(*y.shape[:2], 4, 8, 3).permute(4, 0, 2, 1, 3)[0],
    "narrow": lambda y: y.narrow(-1, 64, 32).view(*y.shape[:2], 4, 8).transpose(1, 2),
    "copies": lambda y: y[..., :32].contiguous().unflatten(-1, (4, 8)).transpose(-3, -2).to(torch.float32),
    "uneven split": lambda y: y.split([16, 32, 48], 2)[1].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "one axis more": lambda y: y[..., :32].view(*y.shape[:2], 1, 4, 8).squeeze(2).transpose(1, 2).clone(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_columns(layout: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(96.0).expand(2, 5, 96)
    (found,) = _views(layout, x)
    assert torch.equal(found.columns, layout(x)[0, :, 0].long())  # (heads, channels): the column number that stands there


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda y: y.view(*y.shape[:2], 4, 24).transpose(1, 2).flip(1), id="reversed heads"),
        pytest.param(lambda y: y[:, 1:].reshape(y.shape[0], y.shape[1] - 1, 4, 24).transpose(1, 2), id="not every token"),
        pytest.param(lambda y: y.reshape(y.shape[0], 4, y.shape[1], 24), id="tokens and channels mixed"),
        pytest.param(lambda y: y.view(*y.shape[:2], 4, 24).permute(1, 2, 0, 3), id="batch and tokens swapped"),
        pytest.param(lambda y: y[..., ::2].view(*y.shape[:2], 4, 12).transpose(1, 2), id="every other channel"),
        pytest.param(lambda y: y.view(*y.shape[:2], 4, 24).transpose(1, 2).to(torch.float64), id="another dtype"),
    ],
)
def test_what_is_no_view_of_all_tokens_is_not_taken_for_one(layout: Callable[[Tensor], Tensor]) -> None:
    assert _views(layout, torch.randn(3, 5, 96)) == []


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_no_values_has_no_order() -> None:
    assert _views(lambda y: y.view(*y.shape[:2], 4, 8).transpose(1, 2), torch.randn(0, 5, 32)) == []
