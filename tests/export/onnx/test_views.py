"""The view algebra against ONNX Runtime: a root that holds its own column numbers shows which columns a head reads."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from normfuse.export.onnx.attention.views import heads
from normfuse.export.onnx.writer.translate import table


def _views(forward, x):
    class Module(torch.nn.Module):
        def forward(self, y):
            return forward(y.relu())

    exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},))
    program = torch.onnx.export(exported, opset_version=23, custom_translation_table=table(23), verbose=False)
    out = program.model.graph.outputs[0]
    return [found for found in heads(out) if found.root.producer().op_type == "Relu"]


LAYOUTS = {
    "packed": lambda y: y.reshape(*y.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)[1],
    "unbind": lambda y: y.reshape(*y.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)[2],
    "split": lambda y: y.split(32, 2)[1].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "chunk": lambda y: y.chunk(3, -1)[2].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "slice": lambda y: y[..., 16:48].view(*y.shape[:2], 4, 8).transpose(1, 2),
    "interleaved": lambda y: y.view(*y.shape[:2], 4, 3, 8).transpose(1, 2).unbind(3)[1],
    "innermost": lambda y: y.view(*y.shape[:2], 4, 8, 3).permute(4, 0, 2, 1, 3)[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_columns(layout):
    x = torch.arange(96.0).expand(2, 5, 96)
    (found,) = _views(layout, x)
    want = layout(x)[0, :, 0].numpy()  # (heads, channels): the column number that stands there
    np.testing.assert_array_equal(found.columns, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda y: y.view(*y.shape[:2], 4, 24).transpose(1, 2).flip(1), id="reversed heads"),
        pytest.param(lambda y: y[:, 1:].reshape(y.shape[0], y.shape[1] - 1, 4, 24).transpose(1, 2), id="not every token"),
        pytest.param(lambda y: y.reshape(y.shape[0], 4, y.shape[1], 24), id="tokens and channels mixed"),
        pytest.param(lambda y: y.view(*y.shape[:2], 4, 24).permute(1, 2, 0, 3), id="batch and tokens swapped"),
    ],
)
def test_what_is_no_view_of_all_tokens_is_not_taken_for_one(layout):
    assert _views(layout, torch.randn(3, 5, 96)) == []


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_no_values_has_no_order():
    assert _views(lambda y: y.view(*y.shape[:2], 4, 8).transpose(1, 2), torch.randn(0, 5, 32)) == []


def test_an_unknown_op_ends_the_view():
    x = ir.Value(name="x", shape=ir.Shape([2, 4, 5, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    assert list(heads(x)) == []
