import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from normfuse.errors import UsageError
from normfuse.nn.l1 import L1LayerNorm
from normfuse.nn.scaled import ScaledNorm, lns_init_
from normfuse.nn.zero_mean import ZeroMean
from tests.nn.contract import compiles, exports, optimized, randomised, reads_any_layout, unshaped, wide_statistics

NORMS = [
    pytest.param(nn.LayerNorm, id="layer norm"),
    pytest.param(nn.RMSNorm, id="rms norm"),
    pytest.param(L1LayerNorm, id="l1 norm"),
]


def test_scaled_norm_has_the_published_factors():
    found = [ScaledNorm(nn.Identity(), depth).factor for depth in (1, 2, 3, 4)]
    assert found == pytest.approx([1, 0.707107, 0.577350, 0.5], abs=1e-6)
    assert found[0] == 1
    assert found[3] == 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_scaled_norm_scales_gain_and_shift(norm):
    layer = ScaledNorm(randomised(norm(8).double()), 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.norm(x) / math.sqrt(3), rtol=1e-12, atol=1e-12)
    folded = copy.deepcopy(layer.norm)
    with torch.no_grad():
        for p in folded.parameters():
            p.div_(math.sqrt(3))
    torch.testing.assert_close(layer(x), folded(x), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_scaled_norm_refuses_a_depth_of_zero():
    with pytest.raises(UsageError, match="depth=0"):
        ScaledNorm(nn.LayerNorm(4), 0)


class _Block(nn.Module):
    def __init__(self, depth, scaled=True):
        super().__init__()

        def norm():
            return ScaledNorm(nn.RMSNorm(8), depth) if scaled else nn.RMSNorm(8)

        self.input_layernorm, self.attention = norm(), nn.Linear(8, 8)
        self.post_attention_layernorm = norm()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


def _model(scaled=True):
    return nn.Sequential(*(_Block(i + 1, scaled) for i in range(3)), nn.RMSNorm(8), nn.Linear(8, 4))


def test_scaled_norm_saves_and_loads_the_keys_of_a_plain_model():
    plain, scaled = randomised(_model(scaled=False)), _model()
    assert "0.input_layernorm.weight" in plain.state_dict()
    assert list(scaled.state_dict()) == list(plain.state_dict())
    scaled.load_state_dict(plain.state_dict(), strict=True)
    for key, value in scaled.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
    _model(scaled=False).load_state_dict(scaled.state_dict(), strict=True)
    before = list(plain.state_dict())
    state = plain.state_dict()
    scaled.load_state_dict(state, strict=True)
    assert list(state) == before  # the caller's dictionary is not changed


def test_scaled_norm_alone_saves_and_loads_plain_keys():
    layer = ScaledNorm(nn.BatchNorm1d(4), 2)
    assert set(layer.state_dict()) == set(nn.BatchNorm1d(4).state_dict())
    layer.load_state_dict(randomised(nn.BatchNorm1d(4)).state_dict(), strict=True)
    assert {"prefix.weight"} < set(layer.state_dict(prefix="prefix."))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"weight": torch.ones(4)}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(nn.BatchNorm1d(4).state_dict() | {"surplus": torch.ones(1)}, strict=True)


def test_scaled_norm_may_wrap_a_norm_that_wraps_another():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x)

    for layer in (ScaledNorm(Inner(), 2), ScaledNorm(ScaledNorm(nn.LayerNorm(4), 2), 2)):
        state = {k: torch.randn(4) for k in layer.state_dict()}
        layer.load_state_dict(state, strict=True)
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())


def test_scaled_norm_survives_copies_pickles_and_optimizers():
    model = randomised(_model())
    x = torch.randn(2, 8)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    expected.sum().backward()
    sgd.step()
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_scaled_norm_reads_any_layout_and_keeps_the_dtype(norm):
    layer = ScaledNorm(randomised(norm(7)), 5)
    reads_any_layout(layer, torch.randn(2, 3, 7))
    assert layer(torch.randn(1, 1, 7)).shape == (1, 1, 7)
    if norm is L1LayerNorm:  # torch's own norms give float32 under autocast
        wide_statistics(layer, torch.randn(2, 3, 7) * 100)


def test_scaled_norm_costs_nothing_at_inference():
    scaled, plain = _model(), _model(scaled=False)
    randomised(scaled)
    plain.load_state_dict(scaled.state_dict(), strict=True)
    x = torch.randn(3, 5, 8)
    exports(scaled, (x,))
    compiles(scaled, (x,))
    found = optimized(scaled, (x,))
    assert found == optimized(plain, (x,))
    assert "mul" not in found
    assert unshaped(scaled, (x,)) == unshaped(plain, (x,))


def test_lns_init_draws_all_weights_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 64, padding_idx=3), nn.Linear(64, 300), ScaledNorm(nn.LayerNorm(300), 12))
    model.append(nn.Sequential(nn.Linear(300, 64, bias=False)))
    randomised(model[2])
    before = model[2].norm.weight.clone()
    assert lns_init_(model) is model
    assert not model[0].weight[3].any()
    for weight in (model[0].weight, model[1].weight, model[3][0].weight):
        assert weight.mean().abs() < 1e-3
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model[1].bias.any()
    assert torch.equal(model[2].norm.weight, before)  # norms keep what they have
    lns_init_(model, std=0.5)
    assert model[1].weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_lns_init_reaches_parametrized_weights():
    torch.manual_seed(0)
    layer = nn.Linear(64, 300)
    parametrize.register_parametrization(layer, "weight", ZeroMean(0))
    lns_init_(layer)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(0.02, rel=0.05)
