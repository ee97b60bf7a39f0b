"""Where the weights of layers lie, held against what the operators compute."""

import dataclasses

import pytest
import torch

from normfuse.ir.constants import Constant
from normfuse.ir.views import VIEWS, Addmm, Conv, ConvTranspose, Embedding, Linear, MatMul, Value

aten = torch.ops.aten


def constant(*shape, seed=0):
    return Constant.of(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def x(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def run(op, value):
    """The operator on a tensor, as the schema orders its arguments."""
    fields = [getattr(op, f.name) for f in dataclasses.fields(op) if f.name not in ("node", "target")]
    return op.operator(*(value if isinstance(f, Value) else f.value if isinstance(f, Constant) else f for f in fields))


V = Value()
LAYERS = {
    "linear": (Linear(V, constant(5, 4), constant(5, seed=1)), x(3, 4)),
    "linear without a bias": (Linear(V, constant(5, 4)), x(3, 4)),
    "addmm": (Addmm(constant(5), V, constant(4, 5)), x(3, 4)),
    "matmul": (MatMul(V, constant(4, 5)), x(2, 3, 4)),
    "conv2d": (Conv(V, constant(6, 4, 3, 3), constant(6, seed=1), [1, 1], [0, 0], [1, 1]), x(2, 4, 5, 5)),
    "grouped": (Conv(V, constant(6, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 2), x(2, 4, 5, 5)),
    "depthwise": (Conv(V, constant(8, 1, 3), constant(8), [2], [0], [1], 4, target=aten.conv1d.default), x(2, 4, 7)),
    "transposed": (ConvTranspose(V, constant(4, 6, 2, 2), constant(6), [2, 2], [0, 0], [0, 0]), x(2, 4, 3, 3)),
    "transposed, grouped": (ConvTranspose(V, constant(4, 3, 2, 2), None, [2, 2], [0, 0], [0, 0], 2), x(2, 4, 3, 3)),
    "embedding": (Embedding(constant(7, 5), V), torch.tensor([[0, 6], [3, 3]])),
}  # fmt: skip
layers = pytest.mark.parametrize(("op", "value"), LAYERS.values(), ids=LAYERS)


def along(vector, axis, rank):
    return vector.reshape([-1 if i == rank + axis else 1 for i in range(rank)])


@layers
def test_outputs_lie_where_the_layer_says(op, value):
    w, y = op.weight, run(op, value)
    assert y.shape[w.axis] == w.outputs
    s = constant(w.outputs, seed=2)
    scaled = op.with_weight(w.value * w.beside(s, w.out), None if w.bias is None else w.bias * s)
    torch.testing.assert_close(run(scaled, value), y * along(s.value, w.axis, y.ndim))


@layers
def test_inputs_lie_where_the_layer_says(op, value):
    w = op.weight
    if w.into is None:
        assert isinstance(op, Embedding)
        return
    assert value.shape[w.axis] == w.inputs
    s = constant(w.inputs, seed=2)
    scaled = op.with_weight(w.value * w.beside(s, w.into), w.bias)
    torch.testing.assert_close(run(scaled, value), run(op, value * along(s.value, w.axis, value.ndim)))


@layers
def test_a_shift_of_all_inputs_is_one_of_all_outputs_unless_it_says_why_not(op, value):
    w = op.weight
    if w.into is None or w.unshifted:
        assert isinstance(op, Embedding | ConvTranspose)
        return
    t = constant(w.inputs, seed=3)
    total = w.total(t)
    shifted = run(op, value + along(t.value, w.axis, value.ndim))
    torch.testing.assert_close(shifted, run(op, value) + along(total.value, w.axis, shifted.ndim))
    bias = total if w.bias is None else w.bias + total
    torch.testing.assert_close(run(op.with_weight(w.value, bias), value), shifted)


@layers
def test_a_layer_without_its_bias(op, value):
    w = op.weight
    bare = run(op.with_weight(w.value), value)
    torch.testing.assert_close(bare if w.bias is None else bare + along(w.bias.value, w.axis, bare.ndim), run(op, value))


def test_padding_hides_a_shift():
    padded = dataclasses.replace(LAYERS["conv2d"][0], padding=[1, 1])  # type: ignore[call-arg]
    assert "zero padding" in padded.weight.unshifted
    assert padded.weight.remedy


def test_every_view_that_holds_a_weight_says_where():
    holding = {view for view in VIEWS.values() if any(f.name == "W" for f in dataclasses.fields(view))}
    assert holding | {MatMul} == {type(op) for op, _ in LAYERS.values()}
    assert Value().weight is None
    assert MatMul(V, V).weight is None
    assert MatMul(constant(3, 3), constant(3, 3)).weight is None
    assert MatMul(V, constant(2, 3, 3)).weight is None
