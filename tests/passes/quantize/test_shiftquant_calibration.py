"""What quantization takes from data: static scales, second moments, biases, moved ranges, fine-tuning."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant
from tests.passes.quantize.quantized import SIZE, Mlp, draw, entries, made, sqnr


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@torch.no_grad()
def test_static_scales(observer):
    spec = ShiftQuant(weight_bits=8, activations="static", observer=observer, percentile=99.0, prefer="size")
    model, x = made(Mlp), draw(512, 24)
    fast = normfuse.optimize(model, (x,), quantize=spec, calibration=[x])
    layers = entries(normfuse.report(fast))
    assert [e.activations for e in layers] == ["static", "static"]
    assert [e.clipped == 0 for e in layers] == [observer == "minmax"] * 2 if observer != "mse" else True
    if observer == "percentile":
        assert all(0.005 < e.clipped < 0.02 for e in layers)
    assert sqnr(model(draw(512, 24, seed=1)), fast(draw(512, 24, seed=1))) > (18 if observer == "percentile" else 28)


def test_the_scale_of_least_squares_clips_outliers():
    """One value of 20 in 4096 Gaussian ones at 4 bits: steps as wide as the maximum asks for cost more than the one value."""
    x = draw(64, 64)
    x[0, 0] = 20.0
    found = {}
    for observer in ("minmax", "mse"):
        spec = ShiftQuant(activation_bits=4, activations="static", observer=observer, prefer="size", migration=False)
        gm = normfuse.optimize(nn.Linear(64, 8).eval(), (x,), quantize=spec, calibration=[x])
        found[observer] = next(float(t) for name, t in gm.state_dict().items() if name.endswith("input_scale"))
    assert found["minmax"] == pytest.approx(20 / 7)
    assert 2 / 7 < found["mse"] < 6 / 7


def test_gptq_beats_rounding_on_correlated_inputs():
    mix = draw(32, 32, seed=1) @ torch.diag(torch.linspace(0.05, 2, 32))
    model, data = made(nn.Linear, 32, 16), [draw(256, 32, seed=s) @ mix for s in range(3)]
    found = {}
    for rounding in ("nearest", "gptq"):
        spec = ShiftQuant(weight_bits=3, rounding=rounding, bias_correction=False, prefer="size")
        fast = normfuse.optimize(model, (data[0],), quantize=spec, calibration=data)
        found[rounding] = entries(normfuse.report(fast))[0].sqnr
    assert found["gptq"] > found["nearest"] + 1


@torch.no_grad()
def test_bias_correction_takes_the_mean_error_away():
    model, x = made(nn.Linear, 32, 16), draw(2048, 32) + 2.0
    spec = {"weight_bits": 3, "prefer": "size"}
    errors = []
    for correction in (False, True):
        fast = normfuse.optimize(model, (x,), quantize=ShiftQuant(bias_correction=correction, **spec))
        errors.append(float((model(x) - fast(x)).mean(0).abs().max()))
    assert errors[1] < 0.05 * errors[0]


def test_an_error_of_the_mean_that_may_be_chance_is_left():
    model, x = made(nn.Linear, 32, 16), draw(2, 32)
    kept = normfuse.optimize(model, (x,), quantize=ShiftQuant(weight_bits=8, prefer="size"))
    assert sum(torch.equal(t, model.bias) for t in kept.state_dict().values()) <= 1


@torch.no_grad()
def test_migration_moves_outliers_into_the_weights():
    model, x = made(Mlp, nn.Identity), draw(256, 24)
    model.norm.weight[3] *= 60
    quality = {}
    for migration in (False, True):
        spec = ShiftQuant(weight_bits=8, activation_bits=4, migration=migration, prefer="size")
        fast = normfuse.optimize(model, (x,), passes=["cleanup"], quantize=spec)
        moved = [s for s in normfuse.report(fast).applied if s.rule == "range_migration"]
        assert bool(moved) == migration
        quality[migration] = sqnr(model(x), fast(x))
    assert quality[True] > quality[False] + 1


def test_migration_is_exact_in_float():
    """A ReLU lets the powers of two through, so that a layer can take them into its rows; with all layers kept it would show."""
    from normfuse.capture.capture import capture
    from normfuse.ir.graph import Graph
    from normfuse.ir.passes import Rewriting, Run
    from normfuse.numerics.evaluate import evaluate
    from normfuse.passes.quantize.layers.find import find_layers
    from normfuse.passes.quantize.shiftquant.migration import migrate
    from normfuse.passes.quantize.statistics import collect

    model, x = made(Mlp, nn.ReLU), draw(256, 24)
    with torch.no_grad():
        model.norm.weight[3] *= 60
        model.up.weight[5] *= 40
        model.up.bias[5] *= 40
    graph = Graph.of(capture(model, (x,)).gm)
    work = Rewriting(graph, Run([[x]]))
    layers, _ = find_layers(graph, ShiftQuant(weight_bits=8, activation_bits=4))
    _, sites = migrate(work, layers, collect(graph, work.run.samples, layers, False))
    assert [s.path for s in sites] == ["norm", "act"]
    (found,) = evaluate(graph, [x], exact=True)
    torch.testing.assert_close(found, model.double()(x.double()), rtol=1e-12, atol=1e-12)


def test_fine_tuning_is_taken_when_it_helps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)).eval()
    data = [draw(64, 16, seed=s) for s in range(4)]
    spec = {"weight_bits": 2, "prefer": "size"}
    plain = normfuse.optimize(model, (data[0],), quantize=ShiftQuant(**spec), calibration=data)
    tuned = normfuse.optimize(model, (data[0],), quantize=ShiftQuant(finetune_steps=80, **spec), calibration=data)
    fresh = draw(64, 16, seed=9)
    with torch.no_grad():
        assert sqnr(model(fresh), tuned(fresh)) > sqnr(model(fresh), plain(fresh)) + 0.5
    assert next(s.rule for s in normfuse.report(tuned).applied) == "finetuning"


def test_fine_tuning_that_does_not_help_is_not_taken():
    model, x = made(Mlp), draw(4, 24)
    plain = normfuse.optimize(model, (x,), quantize=SIZE)
    tuned = normfuse.optimize(model, (x,), quantize=ShiftQuant(weight_bits=8, finetune_steps=1, prefer="size"))
    sites = [s for s in (*normfuse.report(tuned).applied, *normfuse.report(tuned).refused) if s.rule == "finetuning"]
    assert len(sites) == 1
    if sites[0] in normfuse.report(tuned).refused:
        assert torch.equal(plain(x), tuned(x))


@pytest.mark.parametrize(
    ("rows", "same_as"), [pytest.param(64, "gptq", id="enough"), pytest.param(20, "nearest", id="two_rows_an_input_are_missing")]
)
def test_auto_rounds_by_second_moments_where_there_is_data(rows, same_as):
    model = made(lambda: nn.Linear(16, 12))
    data = [draw(rows, 16) @ draw(16, 16, seed=3)]

    def weights(rounding):
        fast = normfuse.optimize(model, (data[0],), quantize=ShiftQuant(rounding=rounding, prefer="size"), calibration=data)
        return [t for t in fast.state_dict().values() if t.dtype == torch.uint8]

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert equal(weights("auto"), weights(same_as))
    assert not equal(weights("nearest"), weights("gptq"))
