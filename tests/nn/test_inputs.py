"""What layers take is checked where the input is known, and known where it is traced without one."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.capture.capture import capture
from normfuse.errors import UsageError
from normfuse.nn import CRMSNorm, DynamicErf, DynamicTanh, L1LayerNorm, PowerNorm, UnifiedNorm
from tests.nn.contract import operators, randomised

LAYERS = [
    pytest.param(lambda: CRMSNorm(6), id="CRMSNorm"),
    pytest.param(lambda: DynamicErf(6), id="DynamicErf"),
    pytest.param(lambda: DynamicTanh(6), id="DynamicTanh"),
    pytest.param(lambda: L1LayerNorm(6), id="L1LayerNorm"),
    pytest.param(lambda: PowerNorm(6), id="PowerNorm"),
    pytest.param(lambda: PowerNorm(6, group_num=0), id="PowerNorm without groups"),
    pytest.param(lambda: UnifiedNorm(6), id="UnifiedNorm"),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(
    "x", [torch.randn(2, 3, 1), torch.randn(2, 3, 5), torch.tensor(1.0), torch.ones(2, 6, dtype=torch.int64)], ids=str
)
def test_an_input_that_is_none_is_refused_and_not_broadcast(make, x):
    with pytest.raises(UsageError, match=r"the input is .*; expected floating-point values of shape \(…, 6\)"):
        make().eval()(x)


def test_channels_first_are_told_from_channels_last():
    layer = DynamicTanh(6, channels_last=False)
    assert layer(torch.randn(2, 6, 4, 5)).shape == layer(torch.randn(1, 2, 6, 4, 5)).shape[1:] == (2, 6, 4, 5)
    with pytest.raises(UsageError, match=r"\(…, 6, ·, ·\)"):
        layer(torch.randn(2, 4, 5, 6))
    with pytest.raises(UsageError, match=r"\(…, 6, ·, ·\)"):
        layer(torch.randn(4, 6))


@pytest.mark.parametrize("between", [nn.GELU(), nn.Hardswish(), nn.Softplus(), nn.Dropout()], ids=lambda m: type(m).__name__)
def test_gains_fold_over_functions_of_elements_without_inputs(between):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(6))

        def forward(self, x):
            return x * self.gain

    model, x = randomised(nn.Sequential(nn.Linear(4, 6), between, Gain(), nn.Linear(6, 3))).eval(), torch.randn(2, 4)
    fast = normfuse.optimize(model)
    torch.testing.assert_close(fast(x), model(x))
    assert "mul" not in operators(fast)


def test_gains_of_a_score_spread_and_stay_without_inputs():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.gain, self.out = nn.Linear(3, 1), nn.Parameter(torch.rand(6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.score(x)) * self.gain)

    model, x = randomised(Spread()).eval(), torch.randn(5, 3)
    fast = normfuse.optimize(model)
    torch.testing.assert_close(fast(x), model(x))
    assert operators(fast) == ["linear", "tanh", "mul", "linear"]


def test_what_a_layer_takes_is_not_said_of_what_its_input_is_made_of():
    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = DynamicTanh(6)

        def forward(self, x):
            return self.norm(x[:, 1:, 0])

    made = {n.name: n.meta.get("takes") for n in capture(Picked().eval(), None, None).gm.graph.nodes}
    assert made["select"] == {-1: 6}
    assert [made[n] for n in ("x", "slice_1")] == [None, None]
