import math

import pytest
import torch
from torch import nn

from normfuse.errors import UsageError
from normfuse.nn.dynamic import DynamicErf, DynamicTanh
from tests.nn.contract import compiles, exports, optimized, randomised, reads_any_layout, unshaped, wide_statistics

KINDS = [pytest.param(DynamicTanh, id="tanh"), pytest.param(DynamicErf, id="erf")]


def test_dynamic_tanh_gives_its_formula_number_by_number():
    layer = randomised(DynamicTanh(3).double())
    x = [[0.3, -2.0, 0.0], [5.0, 0.1, -0.7]]
    alpha, gamma, beta = layer.alpha.item(), layer.weight.tolist(), layer.bias.tolist()
    expected = [[g * math.tanh(alpha * v) + b for v, g, b in zip(row, gamma, beta, strict=True)] for row in x]
    torch.testing.assert_close(layer(torch.tensor(x, dtype=torch.float64)).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_dynamic_erf_gives_its_formula_number_by_number():
    layer = randomised(DynamicErf(3).double())
    x = [[0.3, -2.0, 0.0], [5.0, 0.1, -0.7]]
    alpha, shift, gamma, beta = layer.alpha.item(), layer.shift.item(), layer.weight.tolist(), layer.bias.tolist()
    expected = [[g * math.erf(alpha * v + shift) + b for v, g, b in zip(row, gamma, beta, strict=True)] for row in x]
    torch.testing.assert_close(layer(torch.tensor(x, dtype=torch.float64)).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_dynamic_layers_load_the_official_keys():
    tanh = {"alpha": torch.randn(1), "weight": torch.randn(6), "bias": torch.randn(6)}
    DynamicTanh(6).load_state_dict(tanh, strict=True)
    DynamicErf(6).load_state_dict(tanh | {"shift": torch.randn(1)}, strict=True)
    DynamicTanh(6, 0.8, bias=False).load_state_dict({"alpha": torch.randn(1), "weight": torch.randn(6)}, strict=True)
    DynamicTanh(6, elementwise_affine=False).load_state_dict({"alpha": torch.randn(1)}, strict=True)
    DynamicErf(6, elementwise_affine=False).load_state_dict({"alpha": torch.randn(1), "shift": torch.randn(1)}, strict=True)


def test_dynamic_layers_start_as_the_official_ones():
    tanh, erf = DynamicTanh(4), DynamicErf(4, 0.7, 0.1)
    assert tanh.alpha.tolist() == [0.5]
    assert erf.alpha.item() == pytest.approx(0.7)
    assert erf.shift.item() == pytest.approx(0.1)
    for layer in (tanh, erf):
        assert layer.weight.tolist() == [1.0] * 4
        assert layer.bias.tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=["affine", "no bias", "bare"])
def test_dynamic_layers_have_the_right_gradient(kind, options):
    layer = randomised(kind(3, **options).double())
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (torch.randn(2, 3, dtype=torch.float64, requires_grad=True), *values))


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_layers_with_channels_first_equal_those_with_channels_last(kind):
    first, last = kind(5, channels_last=False), kind(5)
    last.load_state_dict(randomised(first).state_dict(), strict=True)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(UsageError, match="channels_last=False"):
        kind((3, 4), channels_last=False)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_layers_read_any_layout_and_keep_the_dtype(kind):
    layer = randomised(kind(7))
    reads_any_layout(layer, torch.randn(2, 3, 7))
    wide_statistics(layer, torch.randn(2, 3, 7) * 3)
    assert layer(torch.zeros(1, 1, 7)).shape == (1, 1, 7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=["affine", "no bias", "bare"])
def test_dynamic_layers_export_compile_and_leave_one_function(kind, options):
    model = randomised(nn.Sequential(nn.Linear(8, 8), kind(8, **options), nn.Linear(8, 4)))
    x = torch.randn(3, 5, 8)
    exports(model, (x,))
    compiles(model, (x,))
    # α and the shift go up into the first linear, γ and β down into the second
    for left in (optimized(model, (x,)), unshaped(model, (x,))):
        assert left == ["linear", "tanh" if kind is DynamicTanh else "erf", "linear"]


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_layers_fold_into_readers_of_a_residual_stream(kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = kind(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    model, x = randomised(nn.Sequential(Block(), Block())), torch.randn(3, 5, 8)
    left = optimized(model, (x,))
    # α stays, since the stream has other readers; γ and β are gone
    shift = 0 if kind is DynamicTanh else 2
    assert left.count("mul") == 2
    assert left.count("add") == 2 + shift
    assert sorted(unshaped(model, (x,))) == sorted(left)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_layers_with_channels_first_fold_into_convolutions(kind):
    model = randomised(nn.Sequential(nn.Conv2d(3, 5, 3), kind(5, channels_last=False), nn.Conv2d(5, 2, 1)))
    x = torch.randn(2, 3, 6, 6)
    exports(model, (x,))
    assert optimized(model, (x,)) == ["conv2d", "tanh" if kind is DynamicTanh else "erf", "conv2d"]
