"""L1 statistics: the formula, the constant from data, what is told about the loss, and when there is nothing to learn from."""

import math

import pytest
import torch
from torch import nn

import normfuse
from normfuse.capture.capture import capture, flat_inputs
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Run
from normfuse.passes.l1 import L1
from tests.zoo import randomise_norms


def one(norm, *data, **options):
    """The pass alone on one norm, calibrated on the data: the new module and the site."""
    fast = normfuse.optimize(norm.eval(), (data[0],), passes=[L1(**options)], calibration=[(d,) for d in data])
    report = normfuse.report(fast)
    assert not report.undone
    return fast, report


def expected(x, c, eps, dims=(-1,), center=True):
    x = x - x.mean(dims, keepdim=True) if center else x
    return x / (c * x.abs().mean(dims, keepdim=True)).clamp_min(math.sqrt(eps))


def constant(x, dims=(-1,), center=True):
    x = x - x.mean(dims, keepdim=True) if center else x
    return float(x.square().mean(dims).sqrt().sum() / x.abs().mean(dims).sum())


def affine_of(norm, y):
    y = y if norm.weight is None else y * norm.weight
    return y if getattr(norm, "bias", None) is None else y + norm.bias


@pytest.mark.parametrize(
    ("make", "dims", "center"),
    [
        pytest.param(lambda: nn.LayerNorm(6), (-1,), True, id="LayerNorm"),
        pytest.param(lambda: nn.LayerNorm(6, bias=False), (-1,), True, id="no shift"),
        pytest.param(lambda: nn.LayerNorm(6, elementwise_affine=False), (-1,), True, id="no affine"),
        pytest.param(lambda: nn.LayerNorm((5, 6)), (-2, -1), True, id="two axes"),
        pytest.param(lambda: nn.RMSNorm(6, eps=1e-6), (-1,), False, id="RMSNorm"),
        pytest.param(lambda: nn.RMSNorm(6, elementwise_affine=False), (-1,), False, id="RMSNorm without gain or eps"),
    ],
)
@torch.no_grad()
def test_formula(make, dims, center):
    norm = randomise_norms(make()).double()
    x = torch.randn(4, 5, 6, dtype=torch.float64) + 0.3
    fast, report = one(norm, x)
    eps = norm.eps or torch.finfo(torch.float64).eps
    torch.testing.assert_close(fast(x), affine_of(norm, expected(x, constant(x, dims, center), eps, dims, center)))
    (site,) = report.applied
    assert site.note.startswith(f"c = {constant(x, dims, center):.4f}, SQNR ")
    assert not any("norm" in str(n.target) for n in fast.graph.nodes if n.op == "call_function")
    assert report.norms_after.get("layer_norm", 0) + report.norms_after.get("rms_norm", 0) == 0


@pytest.mark.parametrize(
    ("draw", "c"),
    [
        pytest.param(torch.randn, math.sqrt(math.pi / 2), id="Gaussian"),
        pytest.param(torch.rand, 2 / math.sqrt(3), id="uniform"),
        pytest.param(lambda *s: torch.distributions.Laplace(0.0, 1.0).sample(s), math.sqrt(2), id="Laplace"),
    ],
)
def test_constant_of_known_distributions(draw, c):
    _, report = one(nn.LayerNorm(512), draw(400, 512) * 3)
    assert float(report.applied[0].note.split()[2].rstrip(",")) == pytest.approx(c, rel=0.01)


@torch.no_grad()
def test_sqnr_is_that_of_the_normalized_values():
    norm, x = nn.LayerNorm(16, elementwise_affine=False).double(), torch.randn(50, 16, dtype=torch.float64)
    fast, report = one(norm, x)
    y, found = norm(x), fast(x)
    sqnr = float(10 * torch.log10(y.square().sum() / (y - found).square().sum()))
    assert report.applied[0].note.endswith(f"SQNR {sqnr:.1f} dB")
    assert report.passes[0].sqnr is not None


@torch.no_grad()
def test_all_calibration_batches_count_by_tokens():
    a, b = torch.randn(10, 6, dtype=torch.float64), torch.rand(30, 6, dtype=torch.float64) * 5
    norm = nn.LayerNorm(6).double()
    fast, _ = one(norm, a, b)
    torch.testing.assert_close(fast(a), expected(a, constant(torch.cat([a, b])), norm.eps))


@torch.no_grad()
def test_small_and_constant_tokens_behave_like_the_original():
    """√(σ² + ε) tends to √ε: tokens far below ε must not be blown up to unit size, and constant ones stay zero."""
    norm = nn.LayerNorm(8).double()
    x = torch.randn(100, 8, dtype=torch.float64)
    fast, _ = one(norm, x)
    tiny = x * 1e-5
    torch.testing.assert_close(fast(tiny), norm(tiny), rtol=0.01, atol=1e-12)
    assert not fast(torch.full((100, 8), 7.0, dtype=torch.float64)).any()


class Two(nn.Module):
    """A LayerNorm and a RMSNorm on one value, and a second LayerNorm behind them."""

    def __init__(self, d=8):
        super().__init__()
        self.a, self.b, self.c = nn.LayerNorm(d), nn.RMSNorm(d, eps=1e-6), nn.LayerNorm(d)
        self.mix, self.head = nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, x):
        return self.head(self.c(self.mix(self.a(x) + self.b(x)) + x))


@torch.no_grad()
def test_every_norm_has_its_own_constant():
    model, x = randomise_norms(Two()).eval(), torch.randn(64, 8) * 2 + 1
    _, report = one(model, x)
    assert [s.path for s in report.applied] == ["a", "b", "c"]
    assert len({s.note for s in report.applied}) == 3
    assert 10 < report.passes[0].sqnr < 60
    _, report = one(model, x, rms=False)
    assert [s.path for s in report.applied] == ["a", "c"]


@torch.no_grad()
def test_half_precision():
    model, x = randomise_norms(Two()).to(torch.bfloat16).eval(), torch.randn(64, 8).bfloat16()
    fast, _ = one(model, x)
    assert fast(x).dtype is torch.bfloat16
    assert float((fast(x) - model(x)).float().norm() / model(x).float().norm()) < 0.3


@torch.no_grad()
def test_gains_fold_when_it_comes_first_and_the_batch_stays_free():
    model, x = randomise_norms(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))).double().eval(), torch.randn(6, 8).double()
    fast = normfuse.optimize(model, (x,), passes=[L1(), "default"], dynamic_shapes=({0: torch.export.Dim.AUTO},))
    names = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
    left = ("mean.dim", "sub.Tensor", "abs.default", "mean.dim", "clamp_min.default", "div.Tensor", "linear.default")
    assert sorted(names) == sorted(f"aten.{n}" for n in left)
    other = torch.randn(11, 8).double()
    torch.testing.assert_close(fast(other), model[1](affine_of(model[0], expected(other, constant(x), 1e-5))))


def test_without_data_it_refuses():
    captured = capture(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval(), (torch.randn(2, 8),))
    graph = Graph.of(captured.gm)
    report = L1()(graph)
    assert not report.applied
    assert report.refused[0].note == "needs calibration data"
    assert report.refused[0].remedy == "pass example_inputs or calibration="
    run = Run([flat_inputs(captured.gm, captured.args, captured.kwargs or {})])
    assert len(L1()(graph, run).applied) == 1


def test_a_model_without_inputs_refuses():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    fast = normfuse.optimize(model, passes=[L1()])
    assert normfuse.report(fast).refused[0].note == "needs calibration data"
    x = torch.randn(2, 8)
    torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("value", [0.0, math.nan], ids=["constant", "nan"])
def test_data_that_say_nothing_are_refused(value):
    captured = capture(nn.LayerNorm(8).eval(), (torch.randn(2, 8),))
    graph = Graph.of(captured.gm)
    (site,) = L1()(graph, Run([[torch.full((2, 8), value)]])).refused
    assert "does not vary, or is not finite" in site.note


def test_nothing_to_do():
    fast = normfuse.optimize(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), passes=[L1()])
    assert not normfuse.report(fast).applied
