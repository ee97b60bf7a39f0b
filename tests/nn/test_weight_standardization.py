"""Weight standardization: four conventions, all of them a plain convolution at inference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.weight_standardization import (
    CONVENTIONS,
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
    standardize,
)
from tests.tolerances import TOLERANCES

LAYERS = [
    pytest.param(WeightStandardizedConv1d, nn.Conv1d, 1, id="1d"),
    pytest.param(WeightStandardizedConv2d, nn.Conv2d, 2, id="2d"),
    pytest.param(WeightStandardizedConv3d, nn.Conv3d, 3, id="3d"),
]


def _by_hand(weight: Tensor, convention: str, eps: float) -> Tensor:
    out = []
    for row in weight.flatten(1):
        values = [float(v) for v in row]
        n = len(values)
        mean = sum(values) / n
        squares = sum((v - mean) ** 2 for v in values)
        den = {
            "torch": math.sqrt(squares / (n - 1)) + eps,
            "tensorflow": math.sqrt(squares / n) + eps,
            "bcn": math.sqrt(squares / (n - 1) + eps),
            "timm": math.sqrt(squares / n + eps),
        }[convention]
        out.append([(v - mean) / den for v in values])
    return torch.tensor(out, dtype=weight.dtype).reshape(weight.shape)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("eps", [None, 0.03])
def test_weight_follows_its_convention(convention: str, eps: float | None) -> None:
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    default = {"torch": 1e-5, "tensorflow": 1e-5, "bcn": 1e-5, "timm": 1e-6}[convention]
    expected = _by_hand(weight, convention, default if eps is None else eps)
    assert torch.allclose(standardize(weight, convention, eps), expected, rtol=1e-13, atol=0)


def test_biased_weight_is_larger_by_the_known_factor() -> None:
    """n = 18: σ_unbiased / σ_biased = √(18/17), 2.9 % (WeightStandardization README)."""
    weight = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    ratio = standardize(weight, "tensorflow", 0.0) / standardize(weight, "torch", 0.0)
    assert torch.allclose(ratio, torch.full_like(ratio, math.sqrt(18 / 17)))


def test_timm_layer_gives_the_same() -> None:
    std_conv = pytest.importorskip("timm.layers.std_conv")
    theirs = std_conv.StdConv2d(4, 6, 3, padding=1, bias=True).double()
    ours = WeightStandardizedConv2d(4, 6, 3, padding=1, convention="timm").double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "plain", "dims"), LAYERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_layer_is_the_convolution_of_the_standardized_weight(
    layer: type, plain: type, dims: int, groups: int, padding_mode: str
) -> None:
    ours = layer(4, 6, 3, padding=1, groups=groups, padding_mode=padding_mode, convention="bcn").double()
    other = plain(4, 6, 3, padding=1, groups=groups, padding_mode=padding_mode).double()
    assert set(ours.state_dict()) == {"weight", "bias"}
    other.load_state_dict({"weight": standardize(ours.weight, "bcn"), "bias": ours.bias}, strict=True)
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    assert torch.allclose(ours(x), other(x), rtol=1e-13, atol=1e-13)
    assert ours(x[:0]).shape == other(x[:0]).shape
    assert torch.allclose(ours(x.transpose(-1, 2).contiguous().transpose(-1, 2)), ours(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradient_flows_through_mean_and_denominator(convention: str) -> None:
    layer = WeightStandardizedConv2d(2, 3, 2, convention=convention).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return out

    assert torch.autograd.gradcheck(run, (x, layer.weight, layer.bias))
    loss = layer(x).square().sum()
    (grad,) = torch.autograd.grad(loss, layer.weight)
    assert torch.allclose(grad.sum((1, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-10)  # adding a constant changes nothing


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_constant_filter_has_a_finite_gradient(convention: str) -> None:
    layer = WeightStandardizedConv2d(2, 2, 2, convention=convention)
    nn.init.constant_(layer.weight, 0.5)
    layer(torch.randn(1, 2, 3, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("convention", ["torch", "bcn"])
def test_single_tap_is_refused_where_it_divides_by_zero(convention: str) -> None:
    with pytest.raises(UsageError, match="n = 1"):
        WeightStandardizedConv2d(4, 4, 1, groups=4, convention=convention)
    with pytest.raises(UsageError, match="n = 1"):
        standardize(torch.randn(4, 1, 1, 1), convention)


@pytest.mark.parametrize("convention", ["tensorflow", "timm"])
def test_single_tap_is_zero_where_it_is_defined(convention: str) -> None:
    layer = WeightStandardizedConv2d(4, 4, 1, groups=4, convention=convention, bias=False)
    assert torch.equal(layer(torch.randn(2, 4, 3, 3)), torch.zeros(2, 4, 3, 3))


def test_unknown_convention_is_refused() -> None:
    with pytest.raises(UsageError, match="'torch', 'tensorflow', 'bcn', 'timm'"):
        WeightStandardizedConv2d(4, 4, 3, convention="keras")


def test_half_weights_are_standardized_in_float32() -> None:
    weight = (torch.randn(3, 4, 3, 3) * 400).half()  # squares overflow float16
    ours = standardize(weight, "bcn")
    assert ours.dtype == torch.float16
    assert torch.equal(ours, standardize(weight.float(), "bcn").half())


def test_autocast_changes_the_convolution_only() -> None:
    layer = WeightStandardizedConv2d(4, 6, 3)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert layer.standardized_weight().dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.1)


def test_checkpointing_changes_no_gradient() -> None:
    layer = WeightStandardizedConv2d(2, 3, 3)
    x = torch.randn(2, 2, 5, 5, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (repeated,) = torch.autograd.grad(again.square().sum(), layer.weight)
    assert torch.equal(plain, repeated)


@pytest.mark.parametrize(("layer", "plain", "dims"), LAYERS)
def test_export_and_compile_work(layer: type, plain: type, dims: int) -> None:
    del plain
    model = layer(2, 3, 3, convention="timm").eval()
    x = torch.randn(2, 2, *[5] * dims)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-6)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_optimize_leaves_one_plain_convolution(convention: str, groups: int) -> None:
    model = nn.Sequential(
        WeightStandardizedConv2d(4, 6, 3, groups=groups, convention=convention), nn.BatchNorm2d(6), nn.ReLU()
    ).eval()
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 4, 6, 6)
    fast = normfuse.optimize(model, (x,))
    calls = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
    assert calls == ["aten.conv2d.default", "aten.relu.default"]
    assert normfuse.report(fast).exact.max_rel < 1e-12
    expected = model(x).detach()
    assert torch.allclose(fast(x), expected, rtol=0, atol=float(expected.abs().max()) * TOLERANCES[torch.float32].rtol)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_optimize_without_inputs_computes_the_same(convention: str) -> None:
    model = nn.Sequential(WeightStandardizedConv2d(4, 6, 3, convention=convention), nn.ReLU()).eval()
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(normfuse.optimize(model)(x), model(x), atol=1e-5)
