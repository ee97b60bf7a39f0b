"""Reparametrizations are evaluated once, and parallel branches become one operator; what may not be merged stays."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import normfuse
from normfuse.passes.bake import Bake
from tests.zoo import randomise_norms

aten = torch.ops.aten
BAKE = Bake()
PIPELINE = [BAKE, "cleanup", "expose", "affine", BAKE, "mean_free", "affine", "realise", "select", "cleanup"]


def baked(model, *example, given=True, passes=PIPELINE):
    """The optimized model and its report, after checks that hold for every model here."""
    model = randomise_norms(model).eval()
    fast = normfuse.optimize(model, example if given else None, passes=passes)
    report = normfuse.report(fast)
    with torch.no_grad():
        expected, found = model(*example), fast(*example)
    assert float((found - expected).abs().max()) <= 3e-5 * float(expected.abs().max())
    assert not report.undone
    if given:
        assert report.exact.max_rel <= 1e-9
    again = normfuse.optimize(fast, passes=passes)
    assert not normfuse.report(again).applied
    return fast, report


def calls(fast, *targets):
    return [n for n in fast.graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]


def refusals(report):
    return " / ".join(site.note for site in report.refused if site.rule.startswith("parallel"))


# -- reparametrizations ------------------------------------------------------------------------------------------------


class WeightStandardized(nn.Conv2d):
    def __init__(self, *args, how):
        super().__init__(*args)
        self.how = how

    def forward(self, x):
        w = self.weight
        if self.how == "std":
            w = w - w.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
            w = w / (w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5).expand_as(w)
        elif self.how == "var_mean":
            v, m = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
            w = (w - m) / torch.sqrt(v + 1e-6)
        elif self.how == "cast":
            w = (1.5 * torch.atan(w.double() / 0.7)).to(torch.float32)
        elif self.how == "groups":
            w = w * w.abs().amax((1, 2, 3))[::2].repeat_interleave(2).reshape(-1, 1, 1, 1)
        return F.conv2d(x, w, self.bias)


class ZeroMean(nn.Module):
    def forward(self, w):
        return w - w.mean(0, keepdim=True)


def compander(linear):
    parametrize.register_parametrization(linear, "weight", ZeroMean())
    return linear


def old(f, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return f(*args)


LINEARS = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 6)),
    "weight_norm of all": lambda: parametrizations.weight_norm(nn.Linear(8, 6), dim=None),
    "old weight_norm": lambda: old(nn.utils.weight_norm, nn.Linear(8, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 6)),
    "old spectral_norm": lambda: old(nn.utils.spectral_norm, nn.Linear(8, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 6)),
    "zero mean": lambda: compander(nn.Linear(8, 6)),
    "large weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 9000)),
    "large spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 9000)),
}


@pytest.mark.filterwarnings("ignore:The tensor attribute")  # the old ones compute the weight as an attribute, in a hook
@pytest.mark.parametrize("given", [True, False], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("name", LINEARS)
def test_a_parametrized_linear_becomes_a_linear(name, given):
    fast, report = baked(nn.Sequential(LINEARS[name](), nn.ReLU()), torch.randn(3, 8), given=given)
    assert [n.target for n in calls(fast)] == [aten.linear.default, aten.relu.default]
    assert {"0.weight", "0.bias"} == set(fast.state_dict())
    assert [s.rule for s in report.passes[0].applied] == ["constant_folding"]


CONVS = {
    "std": lambda: WeightStandardized(4, 6, 3, how="std"),
    "var_mean": lambda: WeightStandardized(4, 6, 3, how="var_mean"),
    "cast": lambda: WeightStandardized(4, 6, 3, how="cast"),
    "groups": lambda: WeightStandardized(4, 6, 3, how="groups"),
    "timm": lambda: timm.layers.StdConv2d(4, 6, 3),  # type: ignore[attr-defined]
    "timm scaled": lambda: timm.layers.ScaledStdConv2d(4, 6, 3),  # type: ignore[attr-defined]
    "large": lambda: WeightStandardized(4, 2000, 3, how="std"),
}


@pytest.mark.parametrize("given", [True, False], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("name", CONVS)
def test_a_standardized_convolution_becomes_a_convolution_and_takes_its_batch_norm(name, given):
    conv = CONVS[name]()
    model = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
    fast, _ = baked(model, torch.randn(2, 4, 6, 6), given=given)
    assert [n.target for n in calls(fast)] == [aten.conv2d.default]
    assert {p.dtype for p in fast.parameters()} == {torch.float32}


def test_baking_is_done_in_float64_also_where_the_model_casts():
    torch.manual_seed(0)
    conv = WeightStandardized(4, 6, 3, 1, 0, 1, 1, False, how="cast").to(torch.bfloat16).eval()
    w = conv.weight.detach()
    fast = normfuse.optimize(conv, (torch.randn(1, 4, 5, 5),), passes=[BAKE])
    assert fast.weight.dtype == torch.float32  # what the operator gives in the model
    torch.testing.assert_close(fast.weight, (1.5 * torch.atan(w.double() / 0.7)).float(), rtol=1e-7, atol=0)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.a(torch.relu(self.a(x)))


def test_a_weight_that_is_computed_twice_is_one_constant():
    fast, _ = baked(Shared(), torch.randn(2, 8))
    assert set(fast.state_dict()) == {"a.weight", "a.bias"}


class Constants(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.v, self.i = how, nn.Parameter(torch.randn(40)), nn.Buffer(torch.arange(40, dtype=torch.int32))

    def forward(self, x):
        match self.how:
            case "table":
                return x + (self.v[:, None, None] * self.v[None, :, None] * self.v).sum(0).sum(0) + self.v.expand(30, 30, 40)[0, 0]
            case "outer":
                return x.mean() + (self.v.repeat(41)[:, None] * self.v.repeat(41))
            case "random":
                return x + torch.bernoulli(torch.sigmoid(self.v))
            case "integers":
                return x + (self.i * 2).to(torch.float32) * self.v.to(torch.int32)
        raise AssertionError


@pytest.mark.parametrize(
    ("how", "left"),
    [("outer", aten.mul.Tensor), ("random", aten.bernoulli.default)],
)
def test_large_tables_and_random_numbers_stay(how, left):
    torch.manual_seed(0)
    model = Constants(how).eval()
    x = torch.randn(40)
    fast = normfuse.optimize(model, (x,), passes=[BAKE], verify="off")  # float64 has other draws
    assert left in {n.target for n in calls(fast)}
    torch.manual_seed(1)
    found = fast(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("how", ["table", "integers"])
def test_small_growth_and_integers_are_folded(how):
    fast, _ = baked(Constants(how), torch.randn(40), passes=[BAKE, "cleanup"])
    assert {n.target for n in calls(fast)} == {aten.add.Tensor}


# -- parallel branches -------------------------------------------------------------------------------------------------


class Rep(nn.Module):
    """conv 3×3 + BN, conv 1×1 + BN and BN, added in an order of one's choice."""

    def __init__(self, nd=2, groups=1, kernel=3, dilation=1, stride=1, order=0, mode="zeros", norm=True, bias=False):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[nd]
        bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[nd] if norm else lambda c: nn.Identity()
        padding = dilation * (kernel - 1) // 2
        self.large = nn.Sequential(
            conv(8, 8, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode), bn(8)
        )
        self.small = nn.Sequential(conv(8, 8, 1, stride, groups=groups, bias=bias), bn(8))
        self.same, self.order = (bn(8) if stride == 1 else None), order

    def forward(self, x):
        a, b = self.large(x), self.small(x)
        c = self.same(x) if self.same is not None else 0
        return torch.relu([a + b + c, c + (a + b), b + (c + a)][self.order])


@settings(max_examples=16)
@given(
    nd=st.sampled_from([1, 2, 3]), groups=st.sampled_from([1, 2, 8]), kernel=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 2), stride=st.integers(1, 2), order=st.integers(0, 2), norm=st.booleans(), bias=st.booleans(),
    shapes=st.booleans(),
)  # fmt: skip
def test_parallel_convolutions_become_one(nd, groups, kernel, dilation, stride, order, norm, bias, shapes):
    model = Rep(nd, groups, kernel, dilation, stride, order, norm=norm, bias=bias)
    # without shapes nobody knows the rank of what BatchNorm1d gets
    fast, report = baked(model, torch.randn(2, 8, *[7] * nd), given=shapes or nd == 1)
    convs = [n for n in calls(fast) if n.target not in (aten.relu.default,)]
    assert len(convs) == 1
    assert sum(s.rule == "parallel_convs" for s in report.applied) == 1


@pytest.mark.parametrize("given", [True, False], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_blocks_of_timm_become_one_convolution_each(name, given):
    torch.manual_seed(0)
    stage = timm.create_model(name, num_classes=3).stages[0]
    first = next(m for m in stage.modules() if isinstance(m, nn.Conv2d))
    fast, report = baked(stage, torch.randn(1, first.in_channels, 8, 8), given=given)
    sums = sum(s.rule == "parallel_convs" for s in report.applied)
    assert len(calls(fast, aten.conv2d.default)) == sums
    assert {n.target for n in calls(fast)} == {aten.conv2d.default, aten.relu.default}


class Sum(nn.Module):
    """Two terms of a sum that differ in one thing."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        make = {
            "strides": lambda: (nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)),
            "groups": lambda: (nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1, groups=2)),
            "dilation": lambda: (nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 2, 2)),
            "centre": lambda: (nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, 2)),
            "padding": lambda: (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5, 1, 1)),
            "crossed": lambda: (nn.Conv2d(4, 4, (1, 5), padding=(0, 2)), nn.Conv2d(4, 4, (5, 1), padding=(2, 0))),
            "acnet": lambda: (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))),
            "even": lambda: (nn.Conv2d(4, 4, 4, padding=2), nn.Conv2d(4, 4, 2, padding=1)),
            "same": lambda: (nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 1, padding="valid")),
            "reflect": lambda: (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1)),
        }
        pair = make.get(how, lambda: (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)))
        self.a, self.b = pair()

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        match self.how:
            case "strides":
                return a + b[:, :, ::2, ::2]
            case "two readers":
                return (a + b).relu() + a.sigmoid()
            case "output":
                return torch.cat([a + b, b])
            case "two inputs":
                return a + self.b(x.relu())
            case "inner sum is read":
                s = a + b
                return (s + x) * s
            case "with another term":
                return a + x.tanh() + b
            case "twice the identity":
                return x + a + x
            case "residual":
                return x + self.a(x.relu())
        return a + b


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("groups", "2 groups beside 1"),
        ("dilation", "another dilation"),
        ("centre", "the kernel of b has another centre"),
        ("crossed", "25 taps would cost more than the 10"),
        ("two readers", "feeds 2 consumers"),
        ("output", "feeds 2 consumers"),
        ("strides", ""),
        ("reflect", ""),
        ("two inputs", ""),
        ("residual", ""),
    ],
)
def test_what_has_no_common_kernel_stays(how, reason):
    fast, report = baked(Sum(how), torch.randn(2, 4, 8, 8))
    assert not any(s.rule.startswith("parallel") for s in report.applied)
    assert len(calls(fast, aten.conv2d.default)) == 2 - (how == "residual")
    assert reason in refusals(report)
    assert bool(reason) == bool(refusals(report))


@pytest.mark.parametrize(
    "how", ["acnet", "even", "same", "padding", "inner sum is read", "with another term", "twice the identity"]
)
def test_what_has_one_is_merged(how):
    fast, report = baked(Sum(how), torch.randn(2, 4, 8, 8))
    assert len(calls(fast, aten.conv2d.default)) == 1
    assert any(s.rule == "parallel_convs" for s in report.applied)


class Linears(nn.Module):
    def __init__(self, residual=False, large=False, shared=False):
        super().__init__()
        d = 160 if large else 8
        self.a, self.b = nn.Linear(d, d, bias=False), nn.Linear(d, d)
        self.residual, self.shared = residual, shared

    def forward(self, x):
        if self.residual:
            return x + self.b(x)
        y = self.a(x) + self.b(x) + x
        return self.b(y.relu()) if self.shared else y


def test_parallel_linears_become_one_and_a_residual_stays():
    fast, report = baked(Linears(), torch.randn(2, 8))
    assert [n.target for n in calls(fast)] == [aten.linear.default]
    assert report.applied[-1].rule == "parallel_linears"
    fast, _ = baked(Linears(residual=True), torch.randn(2, 8))
    assert [n.target for n in calls(fast)] == [aten.linear.default, aten.add.Tensor]


def test_a_large_weight_that_others_read_is_not_stored_twice():
    _, report = baked(Linears(large=True, shared=True), torch.randn(2, 160))
    assert "is shared with b; merging would store its 0.1 MB twice" in refusals(report)
    _, report = baked(Linears(shared=True), torch.randn(2, 8))
    assert any(s.rule == "parallel_linears" for s in report.applied)


class Around(nn.Module):
    """Branches behind a gain, and what goes around both: a branch like the others once the gain is in the one convolution."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.a, self.b = (nn.Sequential(nn.Conv2d(4, 4, k, padding=k // 2), nn.BatchNorm2d(4)) for k in (3, 1))

    def forward(self, x):
        x = x.relu()
        y = x * self.gain
        return self.a(y) + self.b(y) - x


def test_once_is_enough():
    torch.manual_seed(0)
    model, x = randomise_norms(Around()).eval(), torch.randn(2, 4, 8, 8)
    fast = normfuse.optimize(model, (x,))
    assert [n.target for n in fast.graph.nodes if n.op == "call_function"] == [aten.relu.default, aten.conv2d.default]
    again = normfuse.optimize(fast)
    assert not normfuse.report(again).applied
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
