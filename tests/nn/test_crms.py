import pytest
import torch
from torch import nn

from normfuse.errors import UsageError
from normfuse.nn.crms import CRMSNorm
from tests.nn.contract import compiles, exports, optimized, randomised, reads_any_layout, unshaped, wide_statistics


def test_crms_norm_gives_the_published_values():
    found = CRMSNorm(2, eps=0.0)(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([0.46291005, 0.92582010]))


@pytest.mark.parametrize("eps", [pytest.param(1e-5, id="eps"), pytest.param(0.3, id="large eps"), pytest.param(0.0, id="no eps")])
def test_crms_norm_is_rms_norm_of_the_whole_vector(eps):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    expected = torch.nn.functional.rms_norm(x, (8,), eps=eps)[..., :-1]
    torch.testing.assert_close(CRMSNorm(7, eps)(x[..., :-1]), expected, rtol=1e-12, atol=1e-12)


def test_crms_norm_is_layer_norm_of_the_whole_vector():
    x = torch.randn(4, 8, dtype=torch.float64)
    x = x - x.mean(-1, keepdim=True)
    expected = torch.nn.functional.layer_norm(x, (8,), eps=1e-5)[..., :-1]
    torch.testing.assert_close(CRMSNorm(7)(x[..., :-1]), expected, rtol=1e-12, atol=1e-12)


def test_crms_norm_has_no_parameters_unless_asked_for():
    assert list(CRMSNorm(7).state_dict()) == []
    layer = CRMSNorm(7, elementwise_affine=True)
    layer.load_state_dict({"weight": torch.full((7,), 2.0)}, strict=True)
    x = torch.randn(3, 7)
    torch.testing.assert_close(layer(x), 2 * CRMSNorm(7)(x))


@pytest.mark.parametrize("affine", [pytest.param(False, id="plain"), pytest.param(True, id="affine")])
def test_crms_norm_has_the_right_gradient(affine):
    layer = randomised(CRMSNorm(5, elementwise_affine=affine).double())
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True))


def test_crms_norm_of_zeros_is_zero_and_has_a_finite_gradient():
    x = torch.zeros(2, 7, requires_grad=True)
    y = CRMSNorm(7)(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("affine", [pytest.param(False, id="plain"), pytest.param(True, id="affine")])
def test_crms_norm_sums_in_float32(affine):
    layer = randomised(CRMSNorm(300, elementwise_affine=affine))
    wide_statistics(layer, torch.randn(2, 3, 300) * 100 + 60)


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 7), id="one token"), pytest.param((2, 3, 7), id="batch")])
def test_crms_norm_reads_any_layout(shape):
    layer = randomised(CRMSNorm(7, elementwise_affine=True))
    x = torch.randn(shape)
    assert layer(x).shape == x.shape
    reads_any_layout(layer, torch.randn(2, 3, 7))


def test_crms_norm_refuses_another_width():
    with pytest.raises(UsageError, match=r"shape \(2, 8\); expected .* \(…, 7\)"):
        CRMSNorm(7)(torch.randn(2, 8))
    with pytest.raises(UsageError, match="width=0"):
        CRMSNorm(0)


@pytest.mark.parametrize("affine", [pytest.param(False, id="plain"), pytest.param(True, id="affine")])
def test_crms_norm_exports_compiles_and_optimizes(affine):
    model = randomised(nn.Sequential(nn.Linear(8, 7), CRMSNorm(7, elementwise_affine=affine), nn.Linear(7, 4)))
    x = torch.randn(3, 5, 8)
    exports(model, (x,))
    compiles(model, (x,))
    for left in (optimized(model, (x,)), unshaped(model, (x,))):
        assert left.count("linear") == 2
        assert left.count("mul") <= 1  # the division by d; γ is in the linear
        assert left[-1] == "linear"
