"""Widths under a budget, and layers that measure slower."""

import pytest
from torch import nn

import normfuse
from normfuse import ShiftQuant
from normfuse.errors import UsageError
from normfuse.passes.quantize.shiftquant import ShiftQuantize
from tests.passes.quantize.quantized import ConvNet, Mlp, draw, entries, made


def test_size_budget_is_met_and_sensitivities_are_told():
    model, x = made(ConvNet), draw(4, 4, 10, 10)
    fast = normfuse.optimize(model, (x,), quantize=ShiftQuant(size_budget=0.25, prefer="size"))
    total = normfuse.report(fast).quantization[-1]
    assert total.bytes_after <= 0.25 * total.bytes_before
    layers = entries(normfuse.report(fast))
    assert all([b for b, _ in e.sensitivity] == [8, 6, 4, 3, 2] for e in layers)
    assert all(dict(e.sensitivity)[8] > dict(e.sensitivity)[2] for e in layers)
    assert len({e.weight_bits for e in layers}) > 1


def test_sqnr_budget_is_met_with_fewer_bytes_for_less():
    model, x = made(Mlp), draw(256, 24)
    sizes = []
    for budget in (35.0, 12.0):
        fast = normfuse.optimize(model, (x,), quantize=ShiftQuant(sqnr_budget=budget, prefer="size"))
        total = normfuse.report(fast).quantization[-1]
        assert total.sqnr >= budget
        sizes.append(total.bytes_after)
    assert sizes[1] < sizes[0]


def test_layers_stay_in_float_for_an_sqnr_that_eight_bits_do_not_reach():
    model, x = made(Mlp), draw(256, 24)
    with pytest.raises(UsageError, match="none of 2 layers: 2 because sqnr_budget=120 is not met"):
        normfuse.optimize(model, (x,), quantize=ShiftQuant(sqnr_budget=120.0, prefer="size"))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        pytest.param({"size_budget": 0.01}, "at their least", id="size"),
        pytest.param({"size_budget": 0.2, "sqnr_budget": 90.0}, "asks for more", id="both"),
    ],
)
def test_budgets_that_cannot_be_met(spec, text):
    with pytest.raises(UsageError, match=text):
        normfuse.optimize(made(Mlp), (draw(64, 24),), quantize=ShiftQuant(prefer="size", **spec))


def test_budgets_need_data():
    with pytest.raises(UsageError, match="need data"):
        normfuse.optimize(nn.Linear(8, 8).eval(), quantize=ShiftQuant(size_budget=0.5))


@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_a_layer_that_measures_slower_stays_in_float(prefer):
    def timer(integers, floats):
        return 0.5 if floats().shape[-1] == 12 else 3.0

    graph_pass = ShiftQuantize(ShiftQuant(prefer=prefer), timer)
    fast = normfuse.optimize(made(Mlp), (draw(64, 24),), passes=["default", graph_pass])
    up, down = entries(normfuse.report(fast))
    assert (up.speedup, up.measured, up.kept) == (3.0, True, "")
    assert (down.speedup, down.measured) == (0.5, True)
    assert down.kept == ("measured 0.50 times as fast as in float on this machine" if prefer == "speed" else "")


def test_layers_of_one_shape_are_timed_once():
    calls = []

    def timer(integers, floats):
        calls.append(tuple(integers().shape))
        return 2.0

    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 4)).eval()
    normfuse.optimize(model, (draw(8, 16),), passes=[ShiftQuantize(ShiftQuant(groups=1), timer)])
    assert calls == [(8, 16), (8, 4)]
