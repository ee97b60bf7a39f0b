"""Chains of networks that split, shuffle, upsample and concatenate: detectors, Inception, ShuffleNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfuse
from normfuse import native
from normfuse.app.random_norms import randomise_norms
from tests.passes.quantize.chained import files_agree, images, operators, quantized, spec, sqnr, value_of


def conv(channels: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, outputs, kernel, stride, kernel // 2), nn.SiLU())


class Split(nn.Module):
    """Half of the channels pass through a residual block; everything is concatenated (C2f)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.up, self.a, self.b = conv(channels, outputs), conv(outputs // 2, outputs // 2, 3), conv(outputs // 2, outputs // 2, 3)
        self.down = conv(outputs + outputs // 2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, 1)
        return self.down(torch.cat([a, b, b + self.b(self.a(b))], 1))


class Attend(nn.Module):
    """Attention over the pixels, in float, with a depthwise convolution of its values and sums around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv, self.project = nn.Conv2d(channels, 2 * channels, 1), nn.Conv2d(channels, channels, 1)
        self.place = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, 2 * c, h * w).split([c // 2, c // 2, c], 1)
        y = (v @ (q.transpose(1, 2) @ k * 0.5).softmax(-1).transpose(1, 2)).view(b, c, h, w)
        return x + self.project(y + self.place(v.reshape(b, c, h, w)))


class Detector(nn.Module):
    """A backbone, pooled windows behind each other (SPPF), attention, a way up and a head that decodes in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = conv(3, 8, 3, 2), Split(8, 16), nn.Sequential(conv(16, 16, 3, 2), Split(16, 16))
        self.before, self.behind, self.attend = conv(16, 8), conv(32, 16), Attend(16)
        self.up, self.boxes, self.classes = Split(32, 16), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.stem(x))
        pools = [self.before(self.coarse(fine))]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        coarse = self.attend(self.behind(torch.cat(pools, 1)))
        y = self.up(
            torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest")[:, :, : fine.shape[2], : fine.shape[3]], fine], 1)
        )
        boxes = self.boxes(y).flatten(2).unflatten(1, (4, 2)).softmax(2).sum(2)
        return torch.cat([boxes, self.classes(y).flatten(2).sigmoid()], 1)


class Inception(nn.Module):
    """Branches of different kernels, means of windows, pools whose last window hangs over the border."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, (1, 5), padding=(0, 2))
        self.c, self.d, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)
        pooled = F.relu(self.c(F.avg_pool2d(x, 3, 1, 1)))
        y = F.relu(self.d(torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), pooled], 1)))
        return self.last(F.avg_pool2d(y, (2, 1)))


class Shuffle(nn.Module):
    """Half of the channels pass by, then all are shuffled (ShuffleNet)."""

    def __init__(self, shuffle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.stem, self.a, self.c = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.b, self.last = nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = self.shuffle(torch.cat([x[:, :6], F.relu(self.c(self.b(F.relu(self.a(x[:, 6:])))))], 1))
        return self.last(x.narrow(1, 3, 6))


def by_views(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def by_operator(x: Tensor) -> Tensor:
    return F.channel_shuffle(x, 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "detector": Detector,
    "inception": Inception,
    "views": lambda: Shuffle(by_views),
    "operator": lambda: Shuffle(by_operator),
}


def test_a_detector_is_one_chain_with_islands() -> None:
    model = Detector()
    fast = quantized(model)
    found = operators(fast)
    assert found["codes_conv2d"] == 21
    assert found["codes_take"] == 6
    assert (found["codes_max_pool2d"], found["codes_upsample"]) == (3, 1)
    assert not {"silu", "conv2d", "max_pool2d", "upsample_nearest2d"} & set(found)
    (site,) = [s for p in normfuse.report(fast).passes for s in p.applied if s.rule == "codes"]
    assert "21 convolutions" in site.note
    assert sqnr(model, fast) > 25


def test_pools_and_branches() -> None:
    model = Inception()
    fast = quantized(model)
    found = operators(fast)
    assert found["codes_conv2d"] == 8  # means of windows are convolutions of ones
    assert found["quantize_codes"] == found["dequantize_codes"] == found["cat"] == 1
    assert not {"avg_pool2d", "max_pool2d"} & set(found)
    assert sqnr(model, fast) > 28


@pytest.mark.parametrize("shuffle", [by_views, by_operator])
def test_channels_are_shuffled_as_codes(shuffle: Callable[[Tensor], Tensor]) -> None:
    model = Shuffle(shuffle)
    fast = quantized(model)
    found = operators(fast)
    assert found["codes_conv2d"] == 8
    assert found["codes_take"] == 7
    assert found["quantize_codes"] == found["dequantize_codes"] == 1
    assert not {"view", "transpose", "slice"} & set(found)
    assert sqnr(model, fast) > 28


@pytest.mark.parametrize("scale", [3, 2.5, (2.0, 1.0)])
def test_upsampling(scale: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=scale, mode="nearest"), nn.Conv2d(4, 4, 3))
    fast = quantized(model)
    assert operators(fast)["codes_upsample"] == (scale != 2.5)
    assert sqnr(model, fast) > 28


class Moved(nn.Module):
    """Something that moves values, but no whole channels."""

    def __init__(self, move: Callable[[Tensor], Tensor], outputs: int = 4) -> None:
        super().__init__()
        self.a, self.move, self.b = nn.Conv2d(3, 4, 1), move, nn.Conv2d(outputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.move(F.relu(self.a(x))))


@pytest.mark.parametrize(
    ("move", "outputs"),
    [
        pytest.param(lambda x: x[:, :, 1:], 4, id="rows"),
        pytest.param(lambda x: x[:, ::2], 2, id="every other channel"),
        pytest.param(lambda x: x.view(2, 4, 2, 10, 18).transpose(1, 2).reshape(2, 8, 10, 18), 8, id="rows among channels"),
        pytest.param(lambda x: x.view(2, 2, 2, 20, 18).transpose(2, 3).reshape(2, 4, 20, 18), 4, id="channels among rows"),
        pytest.param(lambda x: x.chunk(2, 2)[1], 4, id="half of the rows"),
        pytest.param(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 4, id="divisors of their own"),
        pytest.param(lambda x: F.avg_pool2d(x, 3, 2, 0, ceil_mode=True), 4, id="means over the border"),
        pytest.param(lambda x: F.interpolate(x, (40, 36), mode="bilinear"), 4, id="bilinear"),
    ],
)
def test_other_movements_are_islands(move: Callable[[Tensor], Tensor], outputs: int) -> None:
    model = Moved(move, outputs)
    fast = quantized(model, prefer="size")
    assert not {"codes_take", "codes_upsample", "codes_conv2d"} & set(operators(fast))
    assert sqnr(model, fast) > 28


@pytest.mark.parametrize(("first", "last"), [(-2, None), (1, 3), (0, 99), (-99, 2)])
def test_bounds_of_slices(first: int, last: int | None) -> None:
    outputs = len(range(4)[first:last])
    model = Moved(lambda x: x[:, first:last], outputs)
    fast = quantized(model)
    assert operators(fast)["codes_take"] == (outputs < 4)
    assert sqnr(model, fast) > 28


def test_free_batches_keep_their_chains() -> None:
    model, data = Shuffle(by_views), images()
    shapes = {"x": {0: torch.export.Dim("batch")}}
    fast = normfuse.optimize(model.eval(), (data[0],), quantize=spec(), calibration=data, dynamic_shapes=shapes, verify="off")
    assert operators(fast)["codes_take"] == 7
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.cat(data))[2:4], fast(data[1]))


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
@pytest.mark.parametrize("name", MODELS)
def test_kernels_and_definitions_give_the_same_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = quantized(MODELS[name]()), images(5)[4]
    last = [n for n in fast.graph.nodes if getattr(n.target, "_opname", "") == "codes_conv2d"][-1]
    found = []
    for isa in native.isas():
        native.force_isa(isa)
        found.append(value_of(fast, last, x))
    native.force_isa(None)
    if name == "detector":  # its attention is computed in float, by other kernels
        return
    monkeypatch.setattr(native, "available", lambda: False)
    assert all(torch.equal(y, value_of(fast, last, x)) for y in found)


@pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
@pytest.mark.parametrize("name", MODELS)
def test_files_compute_the_module(name: str, tmp_path: Path) -> None:
    # behind attention in float, whose kernels are others on each machine, a value may round to the next code, or the one behind it
    files_agree(quantized(MODELS[name]()), tmp_path, 2e-2 if name == "detector" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convolutions"), [("shufflenet_v2_x0_5", 56), ("googlenet", 57)])
def test_whole_networks_are_one_chain(name: str, convolutions: int) -> None:
    torchvision: Any = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    given = {"init_weights": False} if name == "googlenet" else {}
    model = randomise_norms(torchvision.models.get_model(name, weights=None, **given).eval(), seed=0)
    x = torch.randn(1, 3, 96, 96)
    fast = normfuse.optimize(model, (x,), quantize=spec(exponents="range"), calibration=[(x,)], verify="off")
    found = operators(fast)
    assert (found["codes_conv2d"], found["quantize_codes"], found["codes_mean"]) == (convolutions, 1, 1)
    assert not {"conv2d", "shiftquant_conv2d", "max_pool2d", "view", "transpose", "chunk"} & set(found)
    with torch.no_grad():
        y = model(x)
        assert float((fast(x) - y).norm() / y.norm()) < 0.05
