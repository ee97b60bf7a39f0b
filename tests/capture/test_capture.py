"""Ways into the canonical graph: kinds of modules, names, surroundings, regions, messages."""

import logging
import re
import threading
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import normfuse
from normfuse.capture.canonical import canonical_module
from normfuse.capture.capture import capture
from normfuse.errors import CaptureError, UsageError
from normfuse.ir.attribute_names import attribute_names
from normfuse.surroundings import undisturbed
from tests.zoo import randomise_norms


def conv_bn(**where):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **where), nn.BatchNorm2d(4, **where), nn.ReLU()).eval()
    return model if where else randomise_norms(model)


def image(batch=2):
    return torch.randn(batch, 3, 8, 8)


# -- epsilon -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("weight", [None, torch.float32, "same"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_without_an_epsilon_keeps_that_of_torch(dtype, weight):
    class Rms(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = None if weight is None else nn.Parameter(torch.rand(64, dtype=dtype if weight == "same" else weight) + 0.5)

        def forward(self, x):
            return F.rms_norm(x, (64,), self.gain)

    model, x = Rms(), torch.randn(4, 64).to(dtype) * (1e-8 if dtype is torch.float64 else 1e-3)
    gm = capture(model, (x,)).gm
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), check_dtype=False)
        torch.testing.assert_close(canonical_module(torch.export.export(model, (x,)))(x), model(x))


# -- inputs and buffers ------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, left, right):
        return self.a(left) - self.b(right)


@pytest.mark.parametrize(
    "pair", [lambda m, x: (x, x), lambda m, x: (x, x.view(8, 8)), lambda m, x: (x[:], x[:]), lambda m, x: (m.a.weight, x)]
)
def test_inputs_with_one_storage_stay_two_inputs(pair):
    model, x = Two().eval(), torch.randn(8, 8)
    fast = normfuse.optimize(model, pair(model, x))
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    torch.testing.assert_close(fast(left, right), model(left, right))


@pytest.mark.parametrize(
    "other", [torch.conj, torch._neg_view, lambda t: t.t(), lambda t: t.view(torch.complex64)], ids=["conj", "neg", "t", "dtype"]
)
def test_a_buffer_and_its_lazy_view_are_two(other):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            first = torch.randn(4, 4, dtype=torch.complex64)
            self.register_buffer("f", first)
            self.register_buffer("g", other(first))

        def forward(self, x):
            return x * self.f + 2 * x * self.g

    model, x = Views(), torch.randn(4, 4, dtype=torch.complex64)
    torch.testing.assert_close(normfuse.optimize(model, (x,), verify="off")(x), model(x))


def test_a_sparse_buffer_is_a_constant():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("m", torch.eye(4).to_sparse())
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return self.f(torch.sparse.mm(self.m, x))

    model, x = Sparse().eval(), torch.randn(4, 4)
    torch.testing.assert_close(normfuse.optimize(model, (x,), verify="off")(x), model(x))


def test_outputs_may_be_a_defaultdict():
    class Out(nn.Module):
        def forward(self, x):
            out = defaultdict(list)
            out["y"] = x + 1
            return out

    x = torch.randn(2)
    assert torch.equal(normfuse.optimize(Out(), (x,))(x)["y"], x + 1)


# -- kinds of modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel, lambda m: nn.Sequential(torch.compile(m))]
)
@pytest.mark.parametrize("given", [True, False])
def test_wrappers_are_looked_through(wrap, given):
    model, x = conv_bn(), image()
    fast = normfuse.optimize(wrap(model).eval(), (x,) if given else None)
    assert normfuse.report(fast).norms_after == {"batch_norm": 0}
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def scripted():
    with pytest.warns((DeprecationWarning, FutureWarning)):
        return torch.jit.script(conv_bn())


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))

    def forward(self, x):
        return x * self.q.dequantize()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(scripted, "TorchScript module.*pass the nn.Module", id="scripted"),
        pytest.param(lambda: nn.Sequential(scripted()), "at 0 is a TorchScript module", id="scripted part"),
        pytest.param(lambda: nn.Sequential(nn.LazyLinear(4)), "LazyLinear at 0 is lazy.*call the model", id="lazy"),
        pytest.param(lambda: conv_bn(device="meta"), "Conv2d at 0 has its weight on the meta device.*load the weights", id="meta"),
        pytest.param(Packed, "Packed has a quantized q.*float model", id="quantized"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_what_cannot_be_taken_is_named_by_its_kind(make, words, given):
    model = make()
    with pytest.raises(UsageError, match=words):
        normfuse.optimize(model, (image(),) if given else None)


def test_a_model_that_was_made_under_inference_mode_can_be_trained_afterwards():
    with torch.inference_mode():
        model, x = conv_bn(), image()
        fast, expected = normfuse.optimize(model, (x,)), model(x)
    assert not any(p.is_inference() for p in fast.parameters())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)


# -- names -------------------------------------------------------------------------------------------------------------


class Keyed(nn.Module):
    def __init__(self, key, deep):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        held = nn.ModuleDict() if deep else self
        held.add_module(key, nn.Conv2d(4, 4, 1))
        if deep:
            self.heads = held
        self.key = key

    def forward(self, x):
        held = self.heads if hasattr(self, "heads") else self
        return held._modules[self.key](self.stem(x))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "key", ["graph", "code", "meta", "recompile", "class", "None", 'a"b', "3 d", "ü", "\ufb01", "a\\b", "a\nb"]
)
def test_the_name_of_a_submodule_does_not_matter(key, deep):
    model, x = randomise_norms(Keyed(key, deep).eval()), image()
    expected = model(x)
    program = torch.export.export(model, (x,))
    before = dict(program.state_dict)
    for fast in (normfuse.optimize(model, (x,)), normfuse.optimize(program)):
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        assert normfuse.report(fast).norms_after == {"batch_norm": 0}
    assert program.state_dict.keys() == before.keys()


def test_names_that_can_be_read_are_kept_and_others_stay_apart():
    names = ["0.weight", "heads.graph.w", "graph.w", "graph_.w", "a.class", "a.class_", "res-2.w"]
    found = attribute_names(names)
    assert [found[n] for n in names if n not in ("graph.w", "a.class")] == [n for n in names if n not in ("graph.w", "a.class")]
    assert len(set(found.values())) == len(names)


# -- surroundings ------------------------------------------------------------------------------------------------------


def test_autocast_and_default_device_around_the_call_do_not_matter():
    model, x = conv_bn(), image()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = normfuse.optimize(model, (x,))
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    torch.set_default_device("meta")
    try:
        captured = capture(model, (x,)).gm
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(captured(x), expected)


def test_threads_take_turns():
    found = {}

    def work(i):
        model, x = conv_bn(), image()
        found[i] = float((capture(model, (x,)).gm(x) - model(x)).detach().abs().max())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found.keys() == set(range(4))
    assert max(found.values()) < 1e-6


def test_loggers_of_torch_are_quiet_within_and_as_they_were_behind():
    names = ["torch", "torch.normfuse_test", "torch.normfuse_test.below", "torches"]
    loggers = [logging.getLogger(name) for name in names]
    loggers[1].setLevel(logging.DEBUG)  # heeds its own level; the one below it asks it
    before = [log.level for log in loggers]
    try:
        with undisturbed():
            heard = [log.isEnabledFor(logging.ERROR) for log in loggers]
            assert not logging.getLogger("torch.normfuse_test_new").isEnabledFor(logging.ERROR)
        assert heard == [False, False, False, True]
        assert [log.level for log in loggers] == before
    finally:
        loggers[1].setLevel(logging.NOTSET)


# -- messages ----------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    def forward(self, x):
        assert x.shape[1] <= 128
        return x.reshape(x.shape[0], 2, -1)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "example", "dynamic", "words"),
    [
        pytest.param(nn.Linear(5, 5), torch.randn(2, 5), ({1: Dim("t")},), "t = 5", id="fixed"),
        pytest.param(nn.Linear(5, 5), torch.randn(2, 5), ({1: Dim.DYNAMIC},), r"shape\[1\] is always 5 .*Dim.AUTO", id="dynamic"),
        pytest.param(nn.Conv2d(3, 4, 3), image(), ({2: Dim("h")},), r"h = Dim\('h', min=3\)", id="minimum"),
        pytest.param(Pooled(), torch.randn(2, 4), ({1: Dim("n")},), r"_n = Dim\('_n', min=1, max=64\)\n  n = 2\*_n", id="derived"),
        pytest.param(Branch(), torch.randn(2, 4), None, r"values of a tensor.*torch.where.*test_capture.py, line \d+", id="branch"),
        pytest.param(nn.Linear(5, 5), torch.randn(2, 4), None, r"does not run .*float32\[2, 4\].*2x4 and 5x5", id="misfit"),
    ],
)
def test_a_failed_capture_says_what_to_state_instead(model, example, dynamic, words, capfd):
    with pytest.raises(CaptureError) as caught:
        normfuse.optimize(model.eval(), (example,), dynamic_shapes=dynamic)
    message = str(caught.value)
    assert re.search(words, message, re.DOTALL), message
    assert message.count("\n") < 6
    assert len(message) < 600
    assert not capfd.readouterr().err


def test_quantization_aware_layers_with_observers_off_are_captured_and_round_alike():
    import torch.ao.nn.intrinsic.qat as qat
    import torch.ao.quantization as ao

    model = nn.Sequential(qat.ConvBnReLU2d(3, 4, 3, qconfig=ao.get_default_qat_qconfig("fbgemm")))
    for _ in range(3):
        model.train()(torch.randn(4, 3, 8, 8))
    model.eval().apply(ao.disable_observer)
    x = torch.randn(2, 3, 8, 8)
    fast = normfuse.optimize(model, (x,))
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Held(nn.Module):
    """A function that is no method, and reaches the modules that it was made with."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.steps = [lambda x: self.norm(self.conv(x)), torch.relu]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize("how", [normfuse.optimize, normfuse.fold])
def test_functions_that_hold_modules_do_not_move_their_statistics(how):
    model, x = Held(), torch.randn(2, 3, 4, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        UsageError, match=r"the function steps holds a module of the model that is in training mode.*call model\.eval\(\)"
    ):
        how(model.train(), (x,))
    model.eval()
    torch.testing.assert_close(how(model, (x,))(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
