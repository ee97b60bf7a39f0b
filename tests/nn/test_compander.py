import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normfuse.errors import UsageError
from normfuse.nn.compander import WeightCompander
from tests.nn.contract import compiles, exports, optimized, unshaped


def companded(layer, learnable=False):
    parametrize.register_parametrization(layer, "weight", WeightCompander.fitted(layer.weight, 3.0, learnable=learnable))
    return layer


def test_compander_is_odd_steep_at_zero_and_saturates():
    psi = WeightCompander(1.5, 0.5).double()
    v = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(psi(v).tolist(), [1.5 * math.atan(x / 0.5) for x in v.tolist()], rtol=1e-12, atol=1e-12)
    assert torch.equal(psi(-v), -psi(v))
    slope = torch.func.grad(psi)
    assert slope(torch.tensor(0.0, dtype=torch.float64)).item() == pytest.approx(3)
    assert psi(torch.tensor(1e9)).item() == pytest.approx(1.5 * math.pi / 2)
    assert (psi(v).diff() > 0).all()


@pytest.mark.parametrize("learnable", [pytest.param(False, id="fixed"), pytest.param(True, id="learnable")])
def test_registering_a_compander_keeps_the_weight(learnable):
    layer = nn.Conv2d(3, 4, 3)
    before = layer.weight.detach().clone()
    companded(layer, learnable)
    torch.testing.assert_close(layer.weight, before)
    layer.weight = before / 2
    torch.testing.assert_close(layer.weight, before / 2)
    names = {n for n, _ in layer.named_parameters()}
    constants = {"parametrizations.weight.0.a", "parametrizations.weight.0.b"}
    assert (constants <= names) == learnable
    assert constants <= set(layer.state_dict())


def test_compander_has_the_right_gradient():
    psi = WeightCompander(1.5, 0.5, learnable=True).double()

    def call(v, a, b):
        return torch.func.functional_call(psi, {"a": a, "b": b}, (v,))

    assert torch.autograd.gradcheck(call, (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), psi.a, psi.b))


def test_compander_trains_its_constants():
    layer = companded(nn.Linear(4, 3), learnable=True)
    before = copy.deepcopy(layer.state_dict())
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(5, 4)).square().sum().backward()
    sgd.step()
    assert all(not torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_compander_refuses_weights_outside_its_range():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0, 0] = 7.0
    with pytest.raises(UsageError, match=r"is 7, expected less than a π / 2 = 1\.571"):
        WeightCompander().right_inverse(layer.weight)
    companded(layer)
    assert layer.weight[0, 0].item() == pytest.approx(7)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        pytest.param(1, 1, id="slope 1"),
        pytest.param(1, 2, id="flat"),
        pytest.param(1, 0, id="step"),
        pytest.param(-2, -1, id="negative"),
    ],
)
def test_compander_refuses_constants_without_a_steep_slope(a, b):
    with pytest.raises(UsageError, match="a > b > 0"):
        WeightCompander(a, b)


@pytest.mark.parametrize(
    "weight", [pytest.param(torch.zeros(2), id="zero"), pytest.param(torch.full((2,), math.inf), id="infinite")]
)
def test_compander_cannot_be_fitted_to_nothing(weight):
    with pytest.raises(UsageError, match="expected a positive number"):
        WeightCompander.fitted(weight)
    with pytest.raises(UsageError, match="a > b > 0"):
        WeightCompander.fitted(torch.ones(2), slope=-1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["fp16", "bf16", "fp64"])
def test_compander_keeps_the_dtype(dtype):
    layer = companded(nn.Linear(4, 3)).to(dtype)
    assert layer.weight.dtype == dtype
    assert layer(torch.randn(1, 4, dtype=dtype)).dtype == dtype
    assert companded(nn.Linear(4, 3).to(dtype)).weight.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert companded(nn.Linear(4, 3))(torch.randn(0, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("learnable", [pytest.param(False, id="fixed"), pytest.param(True, id="learnable")])
def test_compander_exports_compiles_and_leaves_a_plain_linear(learnable):
    torch.manual_seed(0)
    model = nn.Sequential(companded(nn.Linear(8, 6), learnable), nn.ReLU(), companded(nn.Linear(6, 4), learnable))
    x = torch.randn(3, 8)
    exports(model, (x,))
    compiles(model, (x,))
    assert optimized(model, (x,)) == unshaped(model, (x,)) == ["linear", "relu", "linear"]
