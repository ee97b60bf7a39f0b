"""Softmax over an axis in front of others: the same values in another layout, and reasons where it stays."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse
from normfuse.export import to_onnx
from normfuse.export.lowering.lowering import lowered
from normfuse.export.onnx.program import program
from normfuse.export.onnx.runtime import session
from normfuse.passes.fuse.softmaxes import DividedLast, FlatSoftmax

aten = torch.ops.aten


class Distances(nn.Module):
    """The expectation over bins by which a detector reads distances."""

    def __init__(self, bins=16, outputs=1, moved=True, bias=False, again=False, **conv):
        super().__init__()
        self.bins, self.moved, self.again = bins, moved, again
        self.conv = nn.Conv2d(bins, outputs, **({"kernel_size": 1} | conv), bias=bias)
        if outputs == 1 and self.conv.weight.numel() == bins:
            self.conv.weight.data = torch.arange(bins, dtype=torch.float32).reshape(1, bins, 1, 1)

    def forward(self, x):
        batch, _, positions = x.shape
        x = x.reshape(batch, -1, self.bins, positions).transpose(2, 1) if self.moved else x.reshape(batch, self.bins, -1, positions)
        p = x.softmax(1)
        return self.conv(p) + p.sum() if self.again else self.conv(p)


class Classes(nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis

    def forward(self, x):
        return (2 * x).softmax(self.axis)


def rewritten(model, x, passes, shapes=None):
    """The program behind the passes, and the one before."""
    before = program(model.eval(), (x,), shapes)
    return lowered(before.exported, passes), before.exported


def result(exported, x):
    (y,) = exported.module()(x)
    return y


def targets(exported):
    return [n.target for n in exported.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize(("outputs", "bias"), [(1, False), (5, True)])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-6])
def test_the_division_comes_behind_the_product(moved, outputs, bias, scale):
    torch.manual_seed(0)
    model, x = Distances(outputs=outputs, moved=moved, bias=bias), scale * torch.randn(2, 64, 50)
    done, before = rewritten(model, x, (DividedLast(), FlatSoftmax()))
    assert aten.softmax.int not in targets(done.exported)
    assert aten.conv2d.default not in targets(done.exported)
    assert aten.transpose.int not in targets(done.exported)
    torch.testing.assert_close(
        result(done.exported, x), result(before, x), rtol=2e-6, atol=2e-6 * float(model.conv.weight.detach().abs().max())
    )


def test_rows_without_a_finite_maximum_are_not_numbers_in_both():
    x = torch.randn(1, 64, 50)
    x[:, :, 3], x[:, 5, 4], x[:, 6, 7], x[:, 7, 8] = -torch.inf, -torch.inf, torch.inf, torch.nan
    done, before = rewritten(Distances(), x, (DividedLast(),))
    torch.testing.assert_close(result(done.exported, x), result(before, x), equal_nan=True)


def test_sizes_that_vary():
    shapes = ({0: Dim("batch"), 2: Dim("positions")},)
    for moved in (True, False):
        done, before = rewritten(Distances(moved=moved), torch.randn(2, 64, 50), (DividedLast(), FlatSoftmax()), shapes)
        assert aten.softmax.int not in targets(done.exported), done.failures
        other = torch.randn(3, 64, 7)
        torch.testing.assert_close(result(done.exported, other), result(before, other))


def test_a_flat_softmax_of_sizes_that_vary():
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    done, before = rewritten(Classes(1), torch.randn(2, 5, 6, 7), (FlatSoftmax(),), shapes)
    assert done.passes[0].applied
    x = torch.randn(1, 5, 9, 2)
    assert torch.equal(result(done.exported, x), result(before, x))


@pytest.mark.parametrize(
    ("model", "positions", "why"),
    [
        (Distances(again=True), 50, "read elsewhere"),
        (Distances(bins=64), 50, "64 channels: of more than 32"),
        (Distances(moved=False), 9, "36 positions: of fewer than 40"),
        (Distances(outputs=16), 50, "16 outputs of 16 channels"),
        (Distances().double(), 50, "not in float32"),
    ],
)
def test_what_would_be_no_faster_stays(model, positions, why):
    x = torch.randn(1, 64, positions, dtype=model.conv.weight.dtype)
    done, before = rewritten(model, x, (DividedLast(),))
    (refused,) = done.passes[0].refused
    assert why in refused.note
    assert done.exported is before


@pytest.mark.parametrize("conv", [{"kernel_size": 3}, {"stride": 2}, {"padding": 1}, {"groups": 2, "outputs": 2}])
def test_a_convolution_that_is_no_product_is_left_alone(conv):
    done, before = rewritten(Distances(**conv), torch.randn(1, 64, 50), (DividedLast(),))
    assert done.passes[0].refused == ()
    assert done.exported is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 6, 7), 1), ((2, 5, 6, 7), -3), ((2, 5, 6, 7), 0), ((2, 3, 4, 5, 6), 2)])
def test_a_flat_softmax_is_equal_to_the_bit(shape, axis, dtype):
    x = torch.randn(shape, dtype=dtype)
    done, before = rewritten(Classes(axis), x, (FlatSoftmax(),))
    (site,) = done.passes[0].applied
    assert site.rule == "flat_softmax"
    assert torch.equal(result(done.exported, x), result(before, x))


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 6, 7), -1), ((2, 5, 6, 7), 2), ((2, 5, 1, 7), 1), ((2, 5, 7), 1), ((4, 3), 0)])
def test_one_axis_behind_is_what_the_kernel_takes(shape, axis):
    done, before = rewritten(Classes(axis), torch.randn(shape), (FlatSoftmax(),))
    assert done.exported is before


def ops_of(path):
    return [n.op_type for n in onnx.load(path).graph.node]


@pytest.mark.parametrize("opset", [17, 23])
def test_a_file_for_onnx_runtime_has_neither_softmax_nor_transposes(tmp_path, opset):
    torch.manual_seed(0)
    model, x = Distances().eval(), 8 * torch.randn(2, 64, 50)
    fast = normfuse.optimize(model, (x,), dynamic_shapes=({0: Dim("batch"), 2: Dim("positions")},))
    to_onnx(fast, tmp_path / "a.onnx", opset=opset)
    assert "Softmax" not in ops_of(tmp_path / "a.onnx")
    assert "Conv" not in ops_of(tmp_path / "a.onnx")
    run = session(tmp_path / "a.onnx", threads=1)
    for shape in ((2, 64, 50), (3, 64, 9)):
        x = 8 * torch.randn(shape)
        found = run.run(None, {run.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, model(x).detach(), rtol=1e-5, atol=1e-5)


def test_in_halves_and_for_other_readers_softmax_stays_one_operator(tmp_path):
    model, x = Distances().eval(), torch.randn(2, 64, 50)
    fast = normfuse.optimize(model, (x,))
    to_onnx(fast, tmp_path / "half.onnx", dtype="fp16")
    to_onnx(fast, tmp_path / "portable.onnx", target="portable")
    assert "Softmax" in ops_of(tmp_path / "half.onnx")
    assert "Softmax" in ops_of(tmp_path / "portable.onnx")
