import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normfuse.nn.zero_mean import LinearZeroMeanOutput, ZeroMean
from tests.nn.contract import compiles, exports, optimized, randomised, reads_any_layout, unshaped


@pytest.mark.parametrize("bias", [pytest.param(True, id="bias"), pytest.param(False, id="no bias")])
def test_zero_mean_linear_is_the_centered_output_of_a_linear(bias):
    layer = randomised(LinearZeroMeanOutput(8, 6, bias=bias).double())
    plain = nn.Linear(8, 6, bias=bias, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = plain(x)
    torch.testing.assert_close(layer(x), y - y.mean(-1, keepdim=True), rtol=1e-12, atol=1e-12)
    assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])


def test_zero_mean_linear_has_the_right_gradient():
    layer = randomised(LinearZeroMeanOutput(4, 3).double())

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), *(p.detach().requires_grad_() for p in layer.parameters())
    assert torch.autograd.gradcheck(call, inputs)


def test_zero_mean_linear_keeps_its_outputs_centered_while_it_is_trained():
    layer = randomised(LinearZeroMeanOutput(4, 3))
    sgd = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        x = torch.randn(5, 4)
        loss = (layer(x) - torch.randn(5, 3)).square().sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert layer(torch.randn(7, 4)).mean(-1).abs().max() < 1e-5


def test_zero_mean_linear_centers_half_precision_weights_in_float32():
    layer = LinearZeroMeanOutput(64, 512, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.add_(3.0)
    weight = layer.weight.detach().double()
    seen = layer(torch.eye(64, dtype=torch.bfloat16)).T
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, (weight - weight.mean(0)).to(torch.bfloat16))


def test_zero_mean_linear_reads_any_layout():
    reads_any_layout(nn.Sequential(randomised(LinearZeroMeanOutput(7, 7))), torch.randn(2, 3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        y = LinearZeroMeanOutput(7, 5)(torch.randn(1, 1, 7))
    assert y.dtype == torch.bfloat16  # what nn.Linear gives


@pytest.mark.parametrize(
    ("module", "name", "dim"),
    [
        pytest.param(nn.Linear(4, 6), "weight", 0, id="weight"),
        pytest.param(nn.Linear(4, 6), "bias", 0, id="bias"),
        pytest.param(nn.Conv2d(3, 6, 2), "weight", 0, id="patch"),
        pytest.param(nn.Embedding(9, 6), "weight", -1, id="table"),
    ],
)
def test_zero_mean_parametrization_takes_the_mean_away(module, name, dim):
    randomised(module)
    before = getattr(module, name).detach().clone()
    parametrize.register_parametrization(module, name, ZeroMean(dim))
    after = getattr(module, name)
    torch.testing.assert_close(after, before - before.mean(dim, keepdim=True))
    assert after.mean(dim).abs().max() < 1e-6
    setattr(module, name, before + 1)  # a constant along the features does not count
    torch.testing.assert_close(getattr(module, name), after)
    after.square().sum().backward()
    grad = module.parametrizations[name].original.grad
    assert grad is not None
    assert grad.mean(dim).abs().max() < 1e-5


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.inner = LinearZeroMeanOutput(8, 8)
        self.first, self.last = nn.LayerNorm(8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        parametrize.register_parametrization(self.table, "weight", ZeroMean(-1))
        parametrize.register_parametrization(self, "cls", ZeroMean(-1))

    def forward(self, ids):
        x = self.table(ids) + self.cls
        return self.head(self.last(x + self.inner(self.first(x))))


def test_zero_mean_writers_export_compile_and_leave_rms_norms():
    model = randomised(_Tokens())
    ids = torch.randint(9, (3, 5))
    exports(model, (ids,))
    left = optimized(model, (ids,))
    assert "layer_norm" not in left
    assert left.count("rms_norm") == 2
    assert not {"mean", "sub"} & set(left)
    linear = randomised(nn.Sequential(LinearZeroMeanOutput(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
    compiles(linear, (torch.randn(3, 8),))
    assert optimized(linear, (torch.randn(3, 8),)) == ["linear", "rms_norm", "linear"]
    assert unshaped(linear, (torch.randn(3, 8),)) == ["linear", "layer_norm", "linear"]  # mean-free needs the shapes
