"""What the proof sees: the module as it was given, its dtypes, its memory, what it does to its inputs, and when it sees nothing."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.capture.capture import capture
from normfuse.errors import CaptureError, UsageError
from normfuse.given.original import Call, Original
from normfuse.ir.graph import Graph
from normfuse.ir.views import Linear, affine
from normfuse.numerics.evaluate import evaluate
from normfuse.numerics.modes import Float64, Stirred
from normfuse.passes import PASSES
from normfuse.proof.proof import Proof, moves
from normfuse.reports.model import PassReport


def lively(model):
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                m.weight.uniform_(-1.5, 1.5)
                m.bias.normal_()
    return model.eval()


class ConvNorm(nn.Module):
    """A convolution and a BatchNorm behind whatever `before` does to the input."""

    def __init__(self, before=lambda x: x, after=lambda y: y):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(self.bn(self.conv(self.before(x))))


def folded(model, *inputs, **options):
    fast = normfuse.optimize(model, inputs, **options)
    report = normfuse.report(fast)
    assert not report.undone
    with torch.no_grad():
        want, got = model(*copy.deepcopy(inputs)), fast(*copy.deepcopy(inputs))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5 * max(1.0, float(want.abs().max())))  # pixels are up to 255
    return fast, report


IMAGE = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)


# -- float64 is float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before",
    [
        lambda x: x / 255,
        lambda x: x * 0.5,
        lambda x: x.to(torch.float32) / 255,
        lambda x: x.float().mul(torch.linspace(0.1, 1, 8)),
        lambda x: x + torch.zeros(8) + torch.full((8,), 0.3),
        lambda x: torch.addcmul(torch.ones(8), x.float(), torch.arange(8) / 7),
        lambda x: x.float() @ torch.eye(8),
        lambda x: torch.fft.ifft(torch.fft.fft(x.float())).real,
        lambda x: x.bfloat16().float() / 100,
        lambda x: torch.where(x > 100, 1.0, 0.25) * x.float(),
    ],
)
def test_default_dtypes_casts_and_complex_numbers_are_proven_in_float64(before):
    _, report = folded(lively(ConvNorm(before)), IMAGE)
    assert report.exact.max_rel <= 1e-9
    assert report.norms_after == {"batch_norm": 0}


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (lambda: torch.zeros(2), torch.float64),
        (lambda: torch.tensor([7]) / 2, torch.float64),
        (lambda: torch.tensor([7]).sqrt(), torch.float64),
        (lambda: torch.ones(2, dtype=torch.complex64), torch.complex128),
        (lambda: torch.rand(2), torch.float64),
        (lambda: torch.arange(3), torch.int64),
        (lambda: torch.zeros(2, dtype=torch.long), torch.int64),
        (lambda: torch.ones(2).half(), torch.float64),
    ],
)
def test_the_mode_widens_what_has_the_default_dtype_and_leaves_integers(make, inside):
    with Float64():
        assert make().dtype == inside
    assert torch.zeros(1).dtype == torch.float32


def test_float64_is_local_to_the_thread():
    found = []
    with Float64():
        thread = threading.Thread(target=lambda: found.append(torch.zeros(1).dtype))
        thread.start()
        thread.join()
    assert found == [torch.float32]


@torch.library.custom_op("proof_test::gelu32", mutates_args=())
def gelu32(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("gelu32 is written for float32")
    return F.gelu(x)


@gelu32.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "after", [torch.ops.proof_test.gelu32, lambda y: y * ((y.view(torch.int32) >> 31) * 2 + 1)], ids=["kernel", "bits"]
)
def test_without_a_float64_form_the_proof_is_native_and_says_so(after):
    x = torch.randn(2, 3, 8, 8)
    _, report = folded(lively(ConvNorm(after=after)), x)
    assert report.norms_after == {"batch_norm": 0}
    assert report.exact is None
    assert report.drift.max_rel < 1e-5
    assert any("not proven in float64" in note for note in report.notes)


class Wrong:
    """Scales every linear layer: a rule with a bug."""

    name = "wrong"

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, graph):
        applied = []
        for node in graph:
            op = graph.view(node, 2)
            if isinstance(op, Linear) and graph.permit("wrong", graph.path(node)):
                graph.replace(node, Linear(op.x, op.W * self.factor, op.b))
                applied.append(graph.site("wrong", node))
        return PassReport(self.name, tuple(applied))


def test_without_a_float64_form_a_wrong_rewrite_is_taken_back_all_the_same():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.ops.proof_test.gelu32(self.a(x))

    model, x = Net().eval(), torch.randn(3, 4)
    fast = normfuse.optimize(model, (x,), passes=[Wrong(1.01)])
    (site,) = normfuse.report(fast).undone
    assert "more than the roundings of such a model" in site.note
    torch.testing.assert_close(fast(x), model(x))


# -- the module as it was given ----------------------------------------------------------------------------------------


def test_a_capture_that_is_another_function_is_an_error(monkeypatch):
    import normfuse.api as api

    true = api.capture  # type: ignore[attr-defined]

    def wrong(model, *rest):
        captured = true(model, *rest)
        for node in captured.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.sigmoid.default
        return captured

    monkeypatch.setattr(api, "capture", wrong)
    with pytest.raises(CaptureError, match="the captured graph is not the model"):
        normfuse.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))


def test_a_model_that_is_no_function_of_its_inputs_is_an_error():
    class Counting(nn.Module):
        calls = 0.0

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            type(self).calls += 1.0
            return self.a(x) * type(self).calls

    with pytest.raises(UsageError, match="other outputs when it is called again"):
        normfuse.optimize(Counting().eval(), (torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("model", "x", "named"),
    [
        (nn.Linear(4, 4), torch.ones(2, 4, dtype=torch.long), "input input is int64, the model computes in float32"),
        (nn.Linear(4, 4), torch.ones(2, 4).double(), "input input is float64, the model computes in float32"),
        (nn.Linear(4, 4).half(), torch.ones(2, 4), "input input is float32, the model computes in float16"),
        (nn.Linear(4, 4).double(), torch.ones(2, 4), "input input is float32, the model computes in float64"),
    ],
)
def test_an_input_of_another_dtype_is_named(model, x, named):
    with pytest.raises(UsageError, match=named):
        normfuse.optimize(model.eval(), (x,))


def test_an_embedding_that_renormalizes_its_table_leaves_the_users_alone():
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=0.1), nn.Linear(4, 4)).eval()
    before = model[0].weight.clone()
    with contextlib.suppress(CaptureError):
        normfuse.optimize(model, (torch.arange(8),))
    assert torch.equal(model[0].weight, before)


def test_the_caller_s_inputs_are_left_alone_and_the_result_writes_where_the_model_writes():
    def scaled(x):
        x.mul_(2.0)
        return x

    model, x = lively(ConvNorm(scaled)), torch.randn(2, 3, 8, 8)
    kept = x.clone()
    fast = normfuse.optimize(model, (x,))
    assert torch.equal(x, kept)
    mine, theirs = kept.clone(), kept.clone()
    with torch.no_grad():
        torch.testing.assert_close(fast(mine), model(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine, theirs)


# -- dtypes, memory ----------------------------------------------------------------------------------------------------


class Recast:
    """Gives the output another dtype."""

    name = "recast"

    def __call__(self, graph):
        if not graph.permit("recast", "out"):
            return PassReport(self.name)
        output = graph.fx.output_node()
        (leaf,) = output.args[0]
        node = graph.call(torch.ops.aten.to.dtype, (leaf, torch.bfloat16), output, leaf)
        output.args = ((node,),)
        return PassReport(self.name, (graph.site("recast", node),))


def test_another_dtype_of_an_output_is_seen():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    fast = normfuse.optimize(model, (x,), passes=[Recast()])
    (site,) = normfuse.report(fast).undone
    assert "output 0 became bfloat16, it was float32" in site.note
    assert fast(x).dtype == torch.float32


def test_outputs_do_not_become_the_memory_of_inputs_or_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return x.clone(), self.a.weight.clone(), self.a.weight * 2, self.a(x)

    model, x = Net().eval(), torch.randn(2, 4)
    fast = normfuse.optimize(model, (x,))
    want = [t.detach().clone() for t in model(x)]
    with torch.no_grad():
        for t in fast(x):
            t.zero_()
    assert not torch.equal(x, torch.zeros_like(x))
    for a, b in zip(fast(x), want, strict=True):
        torch.testing.assert_close(a, b)


# -- what was compared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "word"),
    [
        (lambda y: y * 0, "zero"),
        (lambda y: y / 0 * 0, "NaN"),
        (lambda y: torch.ones_like(y), "constant"),
        (lambda y: (y * 0, torch.full_like(y, 3)), "zero or constant"),
    ],
)
def test_where_nothing_was_compared_the_report_says_so(after, word):
    report = normfuse.report(normfuse.optimize(lively(ConvNorm(after=after)), (torch.randn(2, 3, 8, 8),)))
    assert report.nothing_compared.startswith("nothing was compared")
    assert word in report.nothing_compared
    assert report.nothing_compared in report.notes
    assert str(report).split("\n\nnotes")[0].count("nothing was compared") == 1
    assert normfuse.Report.from_json(report.to_json()) == report


def test_an_output_that_tells_something_is_enough():
    fast = normfuse.optimize(lively(ConvNorm(after=lambda y: (y, y * 0))), (torch.randn(2, 3, 8, 8),))
    assert normfuse.report(fast).nothing_compared == ""


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after",
    [
        lambda y: (y - y.mean((2, 3), keepdim=True)).mean((2, 3)),  # rounding noise around 0
        lambda y: torch.sigmoid(y - 9),
        lambda y: (y + 1e6) - 1e6,
        lambda y: y * 1e-30,
    ],
    ids=["noise", "sigmoid", "cancelling", "tiny"],
)
def test_values_that_cancel_do_not_blame_the_rewrites(after):
    fast = normfuse.optimize(lively(ConvNorm(after=after)), (torch.randn(2, 3, 8, 8),))
    report = normfuse.report(fast)
    assert not report.undone
    assert report.norms_after == {"batch_norm": 0}


def test_outputs_that_choose_between_close_scores_are_no_error():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(8, 64), nn.BatchNorm1d(64)
            with torch.no_grad():
                self.a.weight[1::2] = self.a.weight[::2]  # each score stands twice, up to roundings
                self.a.bias[1::2] = self.a.bias[::2]

        def forward(self, x):
            y = self.n(self.a(x))
            values, places = (y * torch.linspace(1, 1 + 1e-7, 64)).topk(5)
            return values, places

    model = Choosing().eval()
    with torch.no_grad():
        model.n.running_mean.fill_(0.3)
        model.n.running_var.fill_(1.7)
    report = normfuse.report(normfuse.optimize(model, (torch.randn(4, 8),)))
    assert report.norms_after == {"batch_norm": 0}
    assert not report.undone


def test_half_that_overflows_is_taken_back():
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[1].running_mean.fill_(250.0)
        net[1].running_var.fill_(2e-5)
        net[1].weight.fill_(1.5)
    net, x = net.half(), (250 + 0.125 * torch.randint(-1, 2, (2, 4, 8, 8))).half()
    fast = normfuse.optimize(net, (x,))
    torch.testing.assert_close(fast(x), net(x), rtol=2e-2, atol=2e-2)


def test_stirring_moves_values_by_roundings_and_leaves_views_and_integers():
    x = torch.randn(64, 64)
    with Stirred(0):
        y, view, whole = x + 1, x.t(), torch.arange(5) + 1
    assert 0 < float(((y - (x + 1)) / (x + 1)).abs().max()) <= 2 * torch.finfo(torch.float32).eps
    assert view.data_ptr() == x.data_ptr()
    assert torch.equal(whole, torch.arange(1, 6))


def test_the_norm_of_a_complex_model_folds():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.a = nn.BatchNorm1d(8), nn.Linear(8, 8)
            self.f = nn.Parameter(torch.randn(5, dtype=torch.complex64))

        def forward(self, x):
            return torch.fft.rfft(self.a(self.n(x))) * self.f

    model = lively(Spectral())
    _, report = folded(model, torch.randn(3, 8))
    assert report.norms_after == {"batch_norm": 0}


def test_a_graph_that_writes_to_its_input_is_evaluated_on_copies():
    x = torch.randn(2, 3, 8, 8)
    graph = Graph.of(capture(lively(ConvNorm(lambda x: x.mul_(2.0))), (x,)).gm)
    kept = x.clone()
    assert not Proof(graph, [x]).judge(graph).fault
    assert torch.equal(x, kept)
    assert evaluate(graph, [x.clone()], exact=True)[0].dtype == torch.float64


class Affines:
    """A `realise` that is wrong as a whole: no single site of it is."""

    name = "realise"

    def __call__(self, graph):
        PASSES["realise"](graph)
        output = graph.fx.output_node()
        (leaf,) = output.args[0]
        output.args = ((graph.call(torch.ops.aten.mul.Tensor, (leaf, 2.0), output, leaf),),)
        return PassReport(self.name)


def test_without_realise_no_pass_stands():
    model, x = lively(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))), torch.randn(3, 4)
    fast = normfuse.optimize(model, (x,), passes=["expose", Affines()])
    assert [site.path for site in normfuse.report(fast).undone] == [""]
    assert not any(n.target is affine for n in fast.graph.nodes)
    torch.testing.assert_close(fast(x), model(x))


def test_norms_inside_of_conditions_are_counted_where_they_stand():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.m = nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda v: self.n(v), lambda v: v * 2, (self.a(self.m(x)),))

    model, x = lively(Branches()), torch.randn(3, 4)
    report = normfuse.report(normfuse.optimize(model, (x,)))
    assert report.norms_before == {"batch_norm": 1, "layer_norm": 1}
    assert report.norms_after == {"batch_norm": 0, "layer_norm": 1}
    assert [(s.rule, s.note) for s in report.refused] == [
        ("enclosed", "stands in a branch of torch.cond, into which no rewrite looks")
    ]
    assert report.exact.max_rel <= 1e-9


@pytest.mark.parametrize(
    "table",
    [
        lambda t: (t * 10).floor(),
        lambda t: torch.where(t + 0.2 == 0.3, 2.0, 1.0),
        lambda t: (t * 10).to(torch.long) % 3,
        lambda t: (t / 0.1).round() / 7,
    ],
    ids=["floor", "equal", "cast", "round"],
)
@pytest.mark.parametrize("passes", [None, ["expose", "affine"]])
def test_constants_that_a_rounding_decides_are_the_models_own(table, passes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(32)
            self.a = nn.Linear(32, 4)
            self.register_buffer("t", torch.arange(0, 3.2, 0.1))

        def forward(self, x):
            return self.a(self.bn(x)) * 1.0 + (x * table(self.t)).sum(1, keepdim=True)

    torch.manual_seed(1)
    _, report = folded(lively(Net()), torch.randn(3, 32), passes=passes)
    assert report.norms_after == {"batch_norm": 0}
    assert report.exact.max_rel <= 1e-9


class Remembering(nn.Module):
    """Keeps a table that it has computed, as attention biases are kept; it would be float64 after a run in float64."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.table = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Parameter(torch.randn(8, 4))
        self.kept = {}

    def forward(self, x):
        if "bias" not in self.kept:
            self.kept["bias"] = self.table[:4] * 2
        return self.n(self.a(x)) @ self.kept["bias"]


def test_what_a_model_keeps_of_one_run_does_not_reach_another():
    model = lively(Remembering())
    _, report = folded(model, torch.randn(3, 4))
    assert report.norms_after == {"batch_norm": 0}
    assert report.exact.max_rel <= 1e-9


@pytest.mark.parametrize("exact", [False, True])
def test_no_kind_of_run_writes_to_the_users_weights(exact):
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=0.1), nn.BatchNorm1d(4)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    original, call = Original(model), Call((torch.arange(8),))
    original.native(call)
    original.exact(call)
    original.stirred(call, 0, exact=exact)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_moves_are_a_margin_times_the_largest_and_without_bound_for_what_changes_as_a_whole():
    outputs = [torch.zeros(2), torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([0.0, 1.0])]
    found = moves(
        outputs,
        lambda seed: [torch.full((2,), 0.5 * seed), torch.tensor([1, 2]), torch.tensor([2, 1]), torch.tensor([float("nan"), 1])],
    )
    assert found == [64.0, 0.0, float("inf"), float("inf")]
