"""GELU and SiLU written as arithmetic become the operator; what only looks like them stays."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

import normfuse
from normfuse import ShiftQuant
from tests.passes.quantize.quantized import draw, made, operators

aten = torch.ops.aten


class Of(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def optimized(f, x, **kwargs):
    fast = normfuse.optimize(Of(f).eval(), (x,), passes=["cleanup", "recognise"], **kwargs)
    report = normfuse.report(fast)
    assert not report.undone
    return fast, [n for n in fast.graph.nodes if n.op == "call_function"], report.refused


TANH = {
    "new_gelu": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "fast_gelu": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "distribution": lambda x: x * (0.5 * (torch.tanh((x**3 * 0.044715 + x) * (2 / math.pi) ** 0.5) + 1)),
    "halves": lambda x: x * (0.5 + 0.5 * torch.tanh((2 / math.pi) ** 0.5 * x + (2 / math.pi) ** 0.5 * 0.044715 * x.square() * x)),
    "divided": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2,
    "hugging_face": ACT2FN["gelu_new"],
    "hugging_face_fast": ACT2FN["gelu_fast"],
}
ERF = {
    "product": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "distribution": lambda x: x * (0.5 * (torch.erf(x * 0.5**0.5) + 1)),
    "hugging_face": ACT2FN["gelu_python"],
}
SILU = {
    "left": lambda x: x * torch.sigmoid(x),
    "right": lambda x: torch.special.expit(x) * x,
    "method": lambda x: x.sigmoid().mul(x),
}


@pytest.mark.parametrize(
    ("f", "target", "kwargs"),
    [pytest.param(f, aten.gelu.default, {"approximate": "tanh"}, id=f"tanh-{k}") for k, f in TANH.items()]
    + [pytest.param(f, aten.gelu.default, {}, id=f"erf-{k}") for k, f in ERF.items()]
    + [pytest.param(f, aten.silu.default, {}, id=f"silu-{k}") for k, f in SILU.items()],
)
def test_arithmetic_becomes_the_operator(f, target, kwargs):
    x = draw(5, 7) * 3
    fast, (call,), refused = optimized(f, x)
    assert (call.target, dict(call.kwargs)) == (target, kwargs)
    assert not refused
    assert normfuse.report(fast).exact.max_rel < 1e-10
    torch.testing.assert_close(fast(x), f(x), rtol=1e-5, atol=1e-6)


def test_dynamic_sizes():
    batch = torch.export.Dim("batch", min=2, max=64)
    fast, calls, _ = optimized(TANH["new_gelu"], draw(5, 7), dynamic_shapes=({0: batch},))
    assert [n.target for n in calls] == [aten.gelu.default]
    torch.testing.assert_close(fast(draw(9, 7)), F.gelu(draw(9, 7), approximate="tanh"))


def test_another_reader_of_a_part_keeps_it():
    def f(x):
        gate = torch.sigmoid(x)
        return x * gate + gate

    _, calls, _ = optimized(f, draw(5, 7))
    assert [n.target for n in calls] == [aten.sigmoid.default, aten.silu.default, aten.add.Tensor]


@pytest.mark.parametrize(
    ("f", "constant"),
    [
        pytest.param(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.0447 * x**3))), "0.0447 ", id="cubic"),
        pytest.param(lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))), "0.79788456 ", id="slope"),
        pytest.param(lambda x: x * 0.5 * (1 + torch.erf(x / 1.4142)), "0.70711", id="root"),
        pytest.param(lambda x: x * 0.499 * (1 + torch.erf(x / math.sqrt(2))), "0.499 ", id="half"),
        pytest.param(lambda x: x * 0.5 * (1.001 + torch.erf(x / math.sqrt(2))), "0.5005 ", id="one"),
    ],
)
def test_a_constant_that_deviates_is_refused(f, constant):
    _, calls, (site,) = optimized(f, draw(5, 7))
    assert aten.gelu.default not in [n.target for n in calls]
    assert site.rule == "activation_by_hand"
    assert f"GELU with {constant}" in site.note


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda x: x * torch.sigmoid(1.702 * x), id="quick_gelu"),
        pytest.param(lambda x: x * torch.sigmoid(x + 1), id="shifted"),
        pytest.param(lambda x: x * torch.sigmoid(x.flip(0)), id="gated"),
        pytest.param(lambda x: x.flip(0) * 0.5 * (1 + torch.erf(x / math.sqrt(2))), id="another_factor"),
        pytest.param(lambda x: 2 * x * torch.sigmoid(x), id="twice"),
        pytest.param(lambda x: x * 0.5 * (1 + torch.erf(x * x / math.sqrt(2))), id="square"),
        pytest.param(lambda x: x * 0.5 * (1 - torch.erf(x / math.sqrt(2))), id="complement"),
        pytest.param(lambda x: 0.5 * x * (1 + torch.tanh(x)), id="tanh"),
        pytest.param(lambda x: x * x * torch.sigmoid(x), id="x_squared"),
    ],
)
def test_other_functions_stay(f):
    _, calls, _ = optimized(f, draw(5, 7))
    found = [n.target for n in calls]
    assert aten.gelu.default not in found
    assert aten.silu.default not in found


def test_integers_have_no_such_operator():
    _, calls, (site,) = optimized(lambda i: i * torch.sigmoid(i), torch.arange(6))
    assert aten.silu.default not in [n.target for n in calls]
    assert "int64" in site.note


def test_a_constant_of_a_wider_dtype_with_axes_is_no_number():
    half = torch.tensor([0.5], dtype=torch.float64)
    _, calls, _ = optimized(lambda x: x * half * (1 + torch.erf(x / math.sqrt(2))), draw(5, 7))
    assert aten.gelu.default not in [n.target for n in calls]


def test_without_inputs_a_value_that_a_layer_computes_is_known_to_be_float():
    fast = normfuse.optimize(nn.Sequential(nn.Linear(4, 4), Of(ERF["product"])).eval(), passes=["recognise"])
    assert [n.target for n in fast.graph.nodes if n.op == "call_function"] == [aten.linear.default, aten.gelu.default]
    bare = normfuse.optimize(Of(SILU["left"]).eval(), passes=["recognise"])
    assert any("dtype" in s.note for s in normfuse.report(bare).refused)


def test_it_goes_into_the_epilogue_of_a_quantized_layer():
    model = made(lambda: nn.Sequential(nn.Linear(16, 32), ACT2FN["gelu_new"], nn.Linear(32, 16), Of(SILU["left"])))
    fast = normfuse.optimize(model, (draw(6, 16),), quantize=ShiftQuant(weight_bits=8, prefer="size"))
    assert operators(fast) == ["normfuse.shiftquant_linear.default"] * 2
    assert [n.args[-1] for n in fast.graph.nodes if n.op == "call_function"] == ["gelu_tanh", "silu"]


def test_what_a_gain_has_hidden_is_recognised_in_the_same_run():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.linear = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 8)

        def forward(self, x):
            return self.linear(x * self.gain * torch.sigmoid(x))

    fast = normfuse.optimize(Hidden().eval(), (torch.randn(2, 9, 6),))
    assert [n.target for n in fast.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.silu.default,
        torch.ops.aten.linear.default,
    ]
