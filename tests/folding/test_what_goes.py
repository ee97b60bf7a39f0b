"""What becomes less in a copy: norms that go, norms that become lighter, at every size."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.app.random_norms import randomise_norms
from tests.folding.models import IMAGE, PreNorm, TwoViews, classes, folded, reasons


class Branches(nn.Module):
    """A BatchNorm of the value that convolutions beside it read, added or subtracted."""

    def __init__(self, sign=1, groups=3):
        super().__init__()
        self.conv, self.sign = nn.Conv2d(3, 3, 3, padding=1, groups=groups, bias=False), sign
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        a, b, c = self.norms
        x = x.relu()
        return a(self.conv(x)) + self.sign * b(x) if self.sign > 0 else c(x) - (a(self.conv(x)) - b(x))


class Gained(nn.Module):
    """A branch whose result the forward multiplies by a parameter of its own."""

    def __init__(self, d=16):
        super().__init__()
        self.start, self.norm, self.mlp, self.last = nn.Linear(8, d), nn.LayerNorm(d), nn.Linear(d, d), nn.LayerNorm(d)
        self.gain, self.head = nn.Parameter(torch.rand(d) + 0.5), nn.Linear(d, 3)

    def forward(self, x):
        x = self.start(x)
        x = x + self.gain * self.mlp(self.norm(x))
        return self.head(self.last(x)), x


def test_batch_norm_is_an_identity_and_its_shift_a_bias():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    made = folded(model)
    assert classes(made) == ["Conv2d", "Identity", "ReLU"]
    assert sorted(made.state_dict()) == ["0.bias", "0.weight"]
    assert normfuse.report(made).norms_after == {"batch_norm": 0}
    assert normfuse.report(made).applied[0].note == "BatchNorm2d is nn.Identity; into 0"


@pytest.mark.parametrize("size", [7, 8, 13])
def test_copy_takes_every_size_that_the_model_takes(size):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    made, x = folded(model), torch.randn(5, 3, size, size)
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), id="down"),
        pytest.param(lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8)), id="transposed"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double(), id="float64"),
        pytest.param(lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), id="graph"),
    ],
)
def test_batch_norms_go(model):
    model = model()
    dtype = next(model.parameters()).dtype
    made = folded(model, (IMAGE.to(dtype),))
    assert isinstance(made, torch.fx.GraphModule) is isinstance(model, torch.fx.GraphModule)
    assert "BatchNorm2d" not in classes(made)


def test_layer_norms_are_rms_norms():
    made = folded(PreNorm(), (torch.randn(4, 5, 8),))
    assert classes(made) == ["Linear", "RMSNorm", "Linear", "RMSNorm", "Linear"]
    assert made.norm1.weight is None
    assert made.head.bias is not None


def test_frozen_batch_norm_and_norm_with_activation():
    torchvision, layers = pytest.importorskip("torchvision"), pytest.importorskip("timm.layers")
    made = folded(nn.Sequential(nn.Conv2d(3, 8, 3), torchvision.ops.FrozenBatchNorm2d(8), layers.ConvNormAct(8, 4, 3)))
    assert classes(made) == ["Conv2d", "Identity", "Conv2d", "ReLU"]
    assert isinstance(made[2].bn.act, nn.ReLU)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("groups", [1, 3])
def test_batch_norms_beside_a_convolution_are_identities(sign, groups):
    """Nothing can become one convolution in a copy; the convolution takes s − 1, and the value itself is added."""
    made = folded(Branches(sign, groups))
    assert [type(n).__name__ for n in made.norms] == ["Identity"] * 2 + ["BatchNorm2d" if sign > 0 else "Identity"]


def test_gain_in_the_code_is_one_where_that_lets_norms_become_rms_norms():
    class Whole(Gained):
        def forward(self, x):
            return super().forward(x)[0]

    made = folded(Whole(), (torch.randn(4, 5, 8),))
    assert isinstance(made.last, nn.RMSNorm)
    assert bool((made.gain == 1).all())


def test_gain_in_the_code_stays_where_nothing_comes_of_it():
    model = randomise_norms(Gained(), seed=0).eval()
    made = normfuse.fold(model, (torch.randn(4, 5, 8),))
    assert isinstance(made.last, nn.LayerNorm)  # the stream is an output
    assert torch.equal(made.gain, model.gain)
    assert "it would stay, as a multiplication by one" in reasons(made)


def test_without_inputs_nothing_is_proven():
    model = randomise_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), seed=0).eval()
    made = normfuse.fold(model)
    torch.testing.assert_close(made(IMAGE), model(IMAGE), rtol=0, atol=1e-5)
    assert classes(made) == ["Conv2d", "Identity"]
    assert "not verified" in normfuse.report(made).notes[0]


def test_modules_that_are_called_more_than_once_are_folded_on_their_own():
    made = folded(TwoViews())
    assert classes(made) == ["Conv2d", "Identity", "ReLU", "Conv2d", "Identity"]
    assert {s.path for s in normfuse.report(made).applied} == {"encoder.1", "head.1"}
    assert normfuse.report(made).norms_before == {"batch_norm": 4}
