import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.errors import UsageError
from normfuse.nn.region import RegionNormB, RegionNormL
from tests.nn.contract import compiles, exports, optimized, randomised, reads_any_layout, unshaped, wide_statistics


def by_region(x, mask, eps):
    """Each channel and region normalized value by value; ε counts for the whole batch, so a small region has a larger one."""
    y = torch.zeros_like(x)
    for channel in range(x.shape[1]):
        for inside in (mask[:, 0] > 0.5, mask[:, 0] <= 0.5):
            values = x[:, channel][inside]
            if values.numel():
                effective = eps * inside.numel() / values.numel()
                y[:, channel][inside] = (values - values.mean()) / (values.var(correction=0) + effective).sqrt()
    return y


def some_mask(batch=4, size=12):
    torch.manual_seed(1)
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, : size // 3] = 1
    mask[0, :, :, size // 2 :] = 1
    return mask


@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
@pytest.mark.parametrize("size", [pytest.param(12, id="full size"), pytest.param(24, id="resized"), pytest.param(9, id="odd")])
def test_region_norm_b_normalizes_each_region(size, training):
    layer = randomised(RegionNormB(3, eps=1e-2).double()).train(training)
    x, mask = torch.randn(4, 3, 12, 12, dtype=torch.float64) * 2 + 1, some_mask(size=size).double()
    small = F.interpolate(mask, (12, 12), mode="nearest")
    gamma = [p.reshape(3, 1, 1) for p in (layer.foreground_gamma, layer.background_gamma)]
    beta = (layer.foreground_beta + layer.background_beta).reshape(3, 1, 1)
    expected = by_region(x, small, 1e-2) * (small * (1 + gamma[0]) + (1 - small) * (1 + gamma[1])) + beta
    torch.testing.assert_close(layer(x, mask), expected, rtol=1e-12, atol=1e-12)


def test_region_norm_b_equals_the_official_order_of_operations():
    x, mask = torch.randn(4, 3, 6, 6, dtype=torch.float64), some_mask(size=6).double()
    y = 0
    for m in (mask, 1 - mask):
        count = m.sum()
        mean = (x * m).sum((0, 2, 3)) / count
        filled = x * m + (1 - m) * mean.reshape(3, 1, 1)
        y = y + F.batch_norm(filled, None, None, training=True) * (count / m.numel()).sqrt()
    torch.testing.assert_close(RegionNormB(3).double()(x, mask), y, rtol=1e-10, atol=1e-10)


def test_region_norm_l_normalizes_the_regions_that_it_finds():
    layer = randomised(RegionNormL(3, threshold=0.5, eps=1e-2).double(), seed=3)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    conv = layer.sa.conv1.weight
    importance = torch.sigmoid(F.conv2d(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1), conv, padding=3))
    mask = (importance >= 0.5).double()
    assert 0.1 < mask.mean() < 0.9
    gamma = F.conv2d(importance, layer.sa.gamma_conv.weight, layer.sa.gamma_conv.bias, padding=3)
    beta = F.conv2d(importance, layer.sa.beta_conv.weight, layer.sa.beta_conv.bias, padding=3)
    expected = by_region(x, mask, 1e-2) * (1 + gamma) + beta
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_region_norms_load_the_official_keys():
    names = ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta")
    RegionNormB(5).load_state_dict({name: torch.randn(5) for name in names}, strict=True)
    assert not any(p.any() for p in RegionNormB(5).parameters())
    state = {"sa.conv1.weight": torch.randn(1, 2, 7, 7)}
    for name in ("sa.gamma_conv", "sa.beta_conv"):
        state |= {f"{name}.weight": torch.randn(1, 1, 7, 7), f"{name}.bias": torch.randn(1)}
    RegionNormL(5).load_state_dict(state, strict=True)
    assert RegionNormL(5).threshold == 0.8


def test_region_norm_b_has_the_right_gradient():
    layer, mask = randomised(RegionNormB(2).double()), some_mask(2, 4).double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, mask))

    assert torch.autograd.gradcheck(call, (torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True), *values))


def test_region_norm_l_has_the_right_gradient():
    layer = randomised(RegionNormL(2, threshold=0.5).double(), seed=3)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.parametrize("fill", [pytest.param(0.0, id="no foreground"), pytest.param(1.0, id="no background")])
def test_an_empty_region_gives_nothing_and_a_finite_gradient(fill):
    layer = randomised(RegionNormB(3).double())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x, torch.full((2, 1, 4, 4), fill, dtype=torch.float64))
    gamma = layer.foreground_gamma if fill else layer.background_gamma
    shift = (layer.foreground_beta + layer.background_beta).reshape(3, 1, 1)
    expected = F.batch_norm(x, None, None, training=True) * (1 + gamma.reshape(3, 1, 1)) + shift
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_equal_values_give_the_shift():
    layer = randomised(RegionNormB(2))
    y = layer(torch.full((2, 2, 6, 6), 4.0), some_mask(2, 6))
    torch.testing.assert_close(y, (layer.foreground_beta + layer.background_beta).reshape(2, 1, 1).expand_as(y))


def test_region_norms_read_any_layout_and_keep_the_dtype():
    b, learned = randomised(RegionNormB(3)).eval(), randomised(RegionNormL(3, 0.5), seed=3).eval()
    x, mask = torch.randn(4, 3, 6, 6), some_mask(size=6)
    reads_any_layout(b, x, mask)
    reads_any_layout(learned, x)
    wide_statistics(b, x * 300, mask)
    assert b(x, mask.bool()).shape == x.shape  # a boolean mask will do
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert learned(x.to(dtype)).dtype == dtype
        assert RegionNormL(3).to(dtype)(x.to(dtype) * 300).isfinite().all()
    assert b(x[:1, :, :1, :1], mask[:1]).shape == (1, 3, 1, 1)


def test_region_norms_refuse_what_they_cannot_normalize():
    mask = some_mask()
    for layer, rest in ((RegionNormB(3), (mask,)), (RegionNormL(3), ())):
        with pytest.raises(UsageError, match=r"expected \(N, 3, H, W\)"):
            layer(torch.randn(4, 2, 12, 12), *rest)
        with pytest.raises(UsageError, match=r"expected \(N, 3, H, W\)"):
            layer(torch.randn(4, 3, 12), *rest)
        with pytest.raises(UsageError, match="an empty batch in training"):
            layer(torch.randn(0, 3, 12, 12), *(m[:0] for m in rest))


class _Inpainting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), RegionNormB(4), nn.Conv2d(4, 2, 1)

    def forward(self, x, mask):
        return self.last(self.norm(self.first(x), mask))


def test_region_norm_b_exports_compiles_and_adds_its_constants_beforehand():
    model = randomised(_Inpainting())
    inputs = torch.randn(4, 3, 8, 8), some_mask(size=12)
    exports(model, inputs)
    compiles(model, inputs)
    left = optimized(model, inputs)
    assert len(unshaped(model, inputs)) >= len(left)
    bare = optimized(randomised(_WithoutConstants()), inputs)
    assert len(left) - len(bare) == 3  # s m + t, and its product with the regions; the shift is in the last convolution


class _WithoutConstants(_Inpainting):
    def forward(self, x, mask):
        return self.last(_normalized(self.first(x), mask))


def _normalized(x, mask):
    from normfuse.nn.region import _by_region

    return _by_region(x, F.interpolate(mask, size=x.shape[2:], mode="nearest"), 1e-5)


def test_region_norm_l_exports_compiles_and_optimizes():
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), RegionNormL(4, 0.5), nn.Conv2d(4, 2, 1)), seed=3)
    x = torch.randn(4, 3, 8, 8)
    exports(model, (x,))
    compiles(model, (x,))
    left = optimized(model, (x,))
    assert left.count("conv2d") == unshaped(model, (x,)).count("conv2d") == 5
