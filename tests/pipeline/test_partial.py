"""`optimize(partial=True)`: a model that cannot be captured whole is optimized submodule by submodule."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.app.random_norms import randomise_norms
from normfuse.errors import CaptureError, UsageError
from normfuse.pipeline.partial import OptimizedPart
from normfuse.reports.report import Report


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def branches(x):
    """Something that no capture follows: Python decides on a value."""
    return x if float(x.sum()) > 0 else x + 1


def block(n=8):
    return nn.Sequential(nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU())


class Branching(nn.Module):
    """A backbone, a branch on a value, a head."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(block(), block()), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.head(branches(self.backbone(x)))


class EarlyReturn(Branching):
    def forward(self, x):
        y = self.backbone(x)
        return y if float(y.sum()) > 0 else self.head(y)


class Loop(nn.Module):
    """Layers in a ModuleList, called by index."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = branches(layer(x))
        return x


class Pyramid(nn.Module):
    """One head for several sizes; a part must be right for all of them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = block(), nn.Sequential(block(), block())

    def forward(self, x):
        x = branches(self.stem(x))
        return [self.head(F.avg_pool2d(x, k)) for k in (1, 2, 4)]


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.one = block()
        self.two = self.one

    def forward(self, x):
        return self.two(branches(self.one(x)))


class Flags(nn.Module):
    """Keyword arguments, None, flags and a dictionary."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, features, *, residual=False, mask=None):
            y = self.block(features["x"])
            return {"y": y + features["x"] if residual else y}

    def __init__(self):
        super().__init__()
        self.inner = Flags.Inner()

    def forward(self, x):
        return self.inner({"x": branches(x)}, residual=True)["y"]


class Lists(nn.Module):
    """Images of different sizes, as detectors take them."""

    def __init__(self):
        super().__init__()
        self.body = block(3)

    def forward(self, images):
        side = max(max(i.shape[-2:]) for i in images)
        x = torch.stack([F.pad(i, (0, side - i.shape[-1], 0, side - i.shape[-2])) for i in images])
        return list(branches(self.body(x)))


def trained(model, seed=0):
    torch.manual_seed(seed)
    return randomise_norms(model.eval(), seed=seed)


def left(report):
    return {p.path: p.left for p in report.parts if p.report is None}


def optimized(report):
    return [p.path for p in report.parts if p.report is not None]


@pytest.mark.parametrize(
    ("kind", "parts", "norms"),
    [
        pytest.param(Branching, ["backbone", "head"], 3, id="branching"),
        pytest.param(EarlyReturn, ["backbone"], 2, id="early-return"),
        pytest.param(Loop, ["layers.0", "layers.1"], 2, id="loop"),
        pytest.param(Pyramid, ["head", "stem"], 3, id="several-sizes"),
        pytest.param(Shared, ["one"], 1, id="shared-module"),
        pytest.param(Flags, ["inner"], 1, id="keywords-and-flags"),
    ],
)
def test_submodules_are_optimized_and_the_model_is_the_same_at_every_size(kind, parts, norms):
    model = trained(kind())
    x = torch.randn(2, 8, 16, 16)
    before = copy.deepcopy(model.state_dict())
    fast = normfuse.optimize(model, (x,), partial=True)
    assert type(fast) is kind
    report = normfuse.report(fast)
    assert sorted(optimized(report)) == parts
    assert len(report.applied) == norms
    assert report.norms_before["batch_norm"] - report.norms_after["batch_norm"] == norms
    assert report.exact.max_rel < 1e-9
    assert report.drift.max_rel < 1e-4
    for shape in ((2, 8, 16, 16), (1, 8, 16, 16), (3, 8, 24, 20), (2, 8, 17, 31)):
        y = torch.randn(shape)
        torch.testing.assert_close(fast(y), model(y), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, OptimizedPart) for m in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_model_that_can_be_captured_is_one_graph():
    model = trained(nn.Sequential(block(), block()))
    fast = normfuse.optimize(model, (torch.randn(2, 8, 8, 8),), partial=True)
    assert isinstance(fast, torch.fx.GraphModule)
    assert normfuse.report(fast).parts == ()


def test_lists_of_images_of_other_sizes_and_numbers():
    model = trained(Lists())
    fast = normfuse.optimize(model, ([torch.rand(3, 20, 30), torch.rand(3, 32, 16)],), partial=True)
    assert optimized(normfuse.report(fast)) == ["body"]
    for images in ([torch.rand(3, 9, 12)], [torch.rand(3, 40, 8), torch.rand(3, 20, 20), torch.rand(3, 5, 5)]):
        torch.testing.assert_close(fast(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_shared_module_is_replaced_once():
    fast = normfuse.optimize(trained(Shared()), (torch.randn(2, 8, 8, 8),), partial=True)
    assert fast.one is fast.two
    assert isinstance(fast.one, OptimizedPart)


class Sized(nn.Module):
    """A submodule that is told the sizes of its input as numbers."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x, height, width):
            return self.block(x.unflatten(-1, (height, width)))

    def __init__(self):
        super().__init__()
        self.inner = Sized.Inner()

    def forward(self, x):
        return self.inner(branches(x).flatten(-2), x.shape[-2], x.shape[-1])


class Fixed(nn.Module):
    """A submodule that branches on a size: a part of it would be right for one side only."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            return self.block(x) * (2 if x.shape[-1] > 15 else 3)

    def __init__(self):
        super().__init__()
        self.inner = Fixed.Inner()

    def forward(self, x):
        return self.inner(branches(x))


class Hooked(Branching):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.backbone[1].register_forward_hook(lambda module, args, out: self.seen.append(1))


class Writes(nn.Module):
    """A submodule that writes to its input, and one inside of it that does not."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block()

        def forward(self, x):
            x.mul_(2)
            return self.block(x)

    def __init__(self):
        super().__init__()
        self.inner = Writes.Inner()

    def forward(self, x):
        x = branches(x) * 1
        return self.inner(x) + x


class Inside(Branching):
    """The model calls the backbone, and a layer of it on its own."""

    def forward(self, x):
        return self.head(branches(self.backbone(x)) + self.backbone[0](x))


class Autocast(Branching):
    def forward(self, x):
        y = branches(self.backbone(x))
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(y)


class Yielding(nn.Module):
    """A submodule that returns a generator."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([block(), block()])

        def forward(self, x):
            for layer in self.layers:
                yield layer(x)

    def __init__(self):
        super().__init__()
        self.inner = Yielding.Inner()

    def forward(self, x):
        return [branches(y) for y in self.inner(x)]


class Attribute(nn.Module):
    """The model reads the weight of a submodule that it calls."""

    def __init__(self):
        super().__init__()
        self.stem, self.net = block(), block()

    def forward(self, x):
        return branches(self.net(self.stem(x))) * self.net[0].weight.mean()


@pytest.mark.parametrize(
    ("kind", "parts", "path", "reason"),
    [
        pytest.param(Sized, ["inner.block"], None, "", id="numbers-that-vary"),
        pytest.param(Fixed, ["inner.block"], None, "", id="branch-on-a-size"),
        pytest.param(Hooked, ["backbone.0", "head"], "backbone.1.2", "", id="hooks"),
        pytest.param(Writes, ["inner.block"], None, "", id="writes-to-its-input"),
        pytest.param(Inside, ["backbone.0", "backbone.1", "head"], None, "", id="called-from-outside"),
        pytest.param(Autocast, ["backbone"], "head", "it is called under autocast", id="autocast"),
        pytest.param(Yielding, ["inner.layers.0", "inner.layers.1"], None, "", id="generator"),
        pytest.param(Attribute, ["stem"], "net", "the whole model does not run with its part", id="attribute"),
    ],
)
def test_what_a_part_would_change_stays_as_it_is(kind, parts, path, reason):
    """A part stands in for a call of its module and for nothing else."""
    model = trained(kind())
    x = torch.randn(2, 8, 12, 12)
    fast = normfuse.optimize(model, (x,), partial=True)
    assert sorted(optimized(normfuse.report(fast))) == parts
    if reason:
        assert left(normfuse.report(fast))[path].startswith(reason)
    for shape in ((2, 8, 12, 12), (1, 8, 20, 16)):
        y = torch.randn(shape)
        torch.testing.assert_close(fast(y.clone()), model(y.clone()), rtol=1e-2, atol=1e-3)


def test_hooks_still_run():
    model = trained(Hooked())
    fast = normfuse.optimize(model, (torch.randn(2, 8, 8, 8),), partial=True)
    model.seen.clear()
    fast(torch.randn(2, 8, 8, 8))
    assert model.seen  # a function is not copied: the hook of the copy writes where it always wrote


def test_old_weight_norm_is_a_weight_and_no_hook():
    model = Branching()
    model.backbone[0][0] = nn.utils.parametrizations.weight_norm(model.backbone[0][0])
    model = trained(model)
    fast = normfuse.optimize(model, (torch.randn(2, 8, 8, 8),), partial=True)
    assert optimized(normfuse.report(fast)) == ["backbone", "head"]


def test_a_model_in_training_mode_is_optimized_as_in_eval_and_stays_in_training():
    model = trained(Branching()).train()
    fast = normfuse.optimize(model, (torch.randn(2, 8, 8, 8),), partial=True)
    assert model.training
    assert not fast.training
    assert any("training mode" in note for note in normfuse.report(fast).notes)


def test_report_has_a_part_for_each_and_comes_back_from_json():
    report = normfuse.report(normfuse.optimize(trained(Branching()), (torch.randn(2, 8, 8, 8),), partial=True))
    assert {s.path for s in report.applied} == {"backbone.0.1", "backbone.1.1", "head.1"}
    text = str(report)
    assert "part backbone (Sequential): 2 applied, 0 refused, batch_norm 2 → 0" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert Report.from_json(report.to_json()) == report


def test_report_as_html_has_the_parts(tmp_path):
    report = normfuse.report(normfuse.optimize(trained(Autocast()), (torch.randn(2, 8, 8, 8),), partial=True))
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Optimized parts" in page
    assert "it is called under autocast: <code>head</code>" in page


def test_a_call_of_another_kind_is_refused_by_the_part():
    fast = normfuse.optimize(trained(Flags()), (torch.randn(2, 8, 8, 8),), partial=True)
    with pytest.raises(UsageError, match=r"inner was optimized for calls with \(float32\[2, 8, 8, 8\], True\)"):
        fast.inner({"x": torch.randn(2, 8, 8, 8)}, residual=False)


def test_without_inputs_they_must_be_declared():
    with pytest.raises(UsageError, match="pass example_inputs"):
        normfuse.optimize(trained(Branching()), partial=True)


def test_a_model_that_does_not_run_on_its_inputs():
    with pytest.raises(CaptureError, match="does not run on example_inputs: RuntimeError"):
        normfuse.optimize(trained(Branching()), (torch.randn(2, 5, 8, 8),), partial=True)


def test_quantized_parts():
    model = trained(Branching())
    x = torch.randn(4, 8, 16, 16)
    fast = normfuse.optimize(
        model, (x,), partial=True, quantize=normfuse.ShiftQuant(weight_bits=8), calibration=[(torch.randn(2, 8, 16, 16),)]
    )
    report = normfuse.report(fast)
    assert {layer.path for layer in report.quantization if layer.kind != "model"} >= {"backbone.0.0", "head.0"}
    found, expected = fast(x), model(x)
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.slow
def test_detector():
    """torchvision's SSDlite: every BatchNorm of backbone and head folded, what is called with lists of images stays."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    model = trained(detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    fast = normfuse.optimize(model, ([torch.rand(3, 64, 80), torch.rand(3, 80, 64)],), partial=True)
    report = normfuse.report(fast)
    assert optimized(report) == ["backbone", "head"], left(report)
    assert report.norms_after["batch_norm"] == 0
    assert report.exact.max_rel < 1e-9
    x = torch.rand(1, 3, 320, 320)
    torch.testing.assert_close(fast.backbone(x), model.backbone(x), rtol=1e-4, atol=1e-4)
    assert len(fast([torch.rand(3, 50, 60)])) == 1


def test_a_model_that_writes_to_its_own_state_leaves_the_users_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body = nn.Embedding(8, 4, max_norm=0.1), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, ids):
            self.calls.add_(1)
            y = self.body(self.table(ids))
            return y[y[:, 0] > 0] if float(y.sum()) > 0 else y

    model = Counting().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = normfuse.optimize(model, (torch.arange(8),), partial=True)
    assert normfuse.report(fast).norms_after == {"batch_norm": 0}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.arange(8)), model(torch.arange(8)), rtol=1e-4, atol=1e-5)
