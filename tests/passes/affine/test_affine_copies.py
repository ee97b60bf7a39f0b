"""An affine passes what copies values or takes means of them, in both directions; what adds numbers of its own stops it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.guarded import Function, left, unproven

INDEX = torch.tensor([0, 2, 1, 1])
ROW = torch.ones(2, 4, 1, 8, dtype=torch.long)

# what is done to (2, 4, 8, 8), and the BatchNorms that stay in front of it and behind it
COPIES = {
    "reflect": (lambda x: F.pad(x, (1, 2, 1, 1), mode="reflect"), 0, 0),
    "replicate": (lambda x: F.pad(x, (1, 2, 1, 1), mode="replicate"), 0, 0),
    "circular": (lambda x: F.pad(x, (1, 2, 1, 1), mode="circular"), 0, 0),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), 0, 0),
    "nearest exact": (lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest-exact"), 0, 0),
    "bilinear": (lambda x: F.interpolate(x, size=(7, 11), mode="bilinear"), 0, 0),
    "bilinear, aligned": (lambda x: F.interpolate(x, size=(7, 11), mode="bilinear", align_corners=True), 0, 0),
    "bilinear, antialiased": (lambda x: F.interpolate(x, size=(3, 5), mode="bilinear", antialias=True), 0, 0),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), 0, 0),
    "bicubic, aligned": (lambda x: F.interpolate(x, scale_factor=0.7, mode="bicubic", align_corners=True), 0, 0),
    "bicubic, antialiased": (lambda x: F.interpolate(x, size=(3, 5), mode="bicubic", antialias=True), 0, 0),
    "area": (lambda x: F.interpolate(x, size=(3, 5), mode="area"), 0, 0),
    "mean of windows": (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), 0, 0),
    "mean with zeros of the border": (lambda x: F.avg_pool2d(x, 3, 1, 1), 1, 1),
    "mean without zeros of the border": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), 0, 0),
    "mean with a divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), 1, 1),
    "index_select": (lambda x: x.index_select(2, INDEX), 0, 0),
    "index_select of channels": (lambda x: x.index_select(1, INDEX), 1, 1),
    "index": (lambda x: x[:, :, INDEX], 0, 0),
    "index of channels": (lambda x: x[:, INDEX], 1, 1),
    "index of two axes": (lambda x: x.movedim(1, -1)[:, INDEX, INDEX].movedim(-1, 1)[..., None], 0, 0),
    "index of two axes behind": (lambda x: x[:, :, INDEX, INDEX][..., None], 1, 1),
    "gather": (lambda x: x.gather(2, ROW), 0, 0),
    "gather of fewer channels": (lambda x: x.gather(2, ROW[:, :2]).repeat(1, 2, 1, 1), 1, 1),
    "take_along_dim": (lambda x: torch.take_along_dim(x, ROW[:, :1], 2), 0, 0),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 2), 0, 0),
    "tile": (lambda x: x.tile(1, 1, 2, 2), 0, 0),
    "rot90": (lambda x: x.rot90(1, (2, 3)), 0, 0),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 0, 0),
    "roll of channels": (lambda x: x.roll(1, 1), 0, 0),
    "flip of channels": (lambda x: x.flip(1), 0, 0),
    "swapdims": (lambda x: x.swapdims(2, 3), 0, 0),
    "windows": (lambda x: F.unfold(x, 2, stride=2).unflatten(1, (4, 4)), 0, 0),
    "windows with a border of zeros": (lambda x: F.unfold(x, 2, stride=2, padding=1).unflatten(1, (4, 4)), 1, 1),
    "zeros around": (lambda x: F.pad(x, (1, 1)), 1, 1),
}


def calls(fast):
    return [str(n.target).split(".")[1] for n in fast.graph.nodes if n.op == "call_function"]


def minus_name(f):
    return "add" if f(1, 1) else "sub"


def function(how):
    return COPIES[how][0]


@pytest.mark.parametrize("how", COPIES)
def test_in_front(how):
    model = Function(
        lambda m, x: m.conv(function(how)(m.norm(F.gelu(x)))), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 1)
    )  # fmt: skip
    assert left(unproven(model, torch.randn(2, 4, 8, 8))[1]) == COPIES[how][1]


@pytest.mark.parametrize("how", COPIES)
def test_behind(how):
    model = Function(
        lambda m, x: F.silu(m.norm(function(how)(m.conv(x)))), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1)
    )  # fmt: skip
    assert left(unproven(model, torch.randn(2, 4, 8, 8))[1]) == COPIES[how][2]


@pytest.mark.parametrize("activation", [F.silu, F.hardswish, torch.sigmoid, lambda x: torch.cat([x, x.tanh()], 1)])
def test_the_producer_takes_what_the_reader_cannot(activation):
    model = Function(lambda m, x: activation(m.norm(m.conv(x))), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert left(unproven(model, torch.randn(2, 4, 8, 8))[1]) == 0


def test_each_producer_takes_its_part_of_a_concatenation():
    model = Function(
        lambda m, x: F.silu(m.norm(torch.cat([m.a(x), F.avg_pool2d(m.b(x), 1), m.c(x)], 1))),
        norm=nn.BatchNorm2d(9),
        a=nn.Conv2d(4, 4, 1),
        b=nn.Conv2d(4, 3, 1),
        c=nn.ConvTranspose2d(4, 2, 1),
    )
    assert left(unproven(model, torch.randn(2, 4, 8, 8))[1]) == 0


@pytest.mark.parametrize("value", [0.0, 2.0, -torch.inf])
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
@pytest.mark.parametrize("behind", [False, True])
def test_padding_takes_one_scale_and_shift(value, shift, scale, behind):
    """pad_v(s x + t) = s pad_w(x) + t with w = (v − t)/s, which s = 0 has not"""
    if behind and scale == 0 and value == -torch.inf:
        pytest.skip("0 · ∞ is NaN in the model itself")
    affine = {"s": torch.tensor([scale]), "t": torch.tensor([shift])}
    if behind:
        model = Function(lambda m, x: F.gelu(F.pad(m.conv(x), (1, 1), value=value) * m.s + m.t), conv=nn.Conv1d(4, 4, 1), **affine)
    else:
        model = Function(lambda m, x: m.conv(F.pad(F.gelu(x) * m.s + m.t, (1, 1), value=value)), conv=nn.Conv1d(4, 4, 1), **affine)
    unproven(model, torch.randn(2, 4, 6))


def test_zeros_around_take_scales_of_channels():
    model = Function(
        lambda m, x: m.conv(F.pad(F.gelu(x) * m.s, (1, 1))), conv=nn.Conv1d(4, 4, 1), s=torch.randn(4, 1)
    )  # fmt: skip
    fast, _ = unproven(model, torch.randn(2, 4, 6))
    assert torch.ops.aten.mul.Tensor not in [n.target for n in fast.graph.nodes]


@pytest.mark.parametrize("minus", [lambda a, b: a - b, lambda a, b: b - a, lambda a, b: a + b], ids=["a-b", "b-a", "a+b"])
def test_a_shift_passes_a_sum_and_a_difference(minus):
    """(x + t) − y = (x − y) + t;   y − (x + t) = (y − x) − t"""
    model = Function(
        lambda m, x, y: m.lin(minus(x.tanh() + m.t, y.tanh())), lin=nn.Linear(4, 3), t=torch.randn(4)
    )  # fmt: skip
    fast, _ = unproven(model, torch.randn(2, 4), torch.randn(2, 4))
    assert calls(fast) == ["tanh", "tanh", minus_name(minus), "linear"]


@pytest.mark.parametrize("minus", [lambda a, b: a - b, lambda a, b: b - a, lambda a, b: a + b], ids=["a-b", "b-a", "a+b"])
def test_an_affine_passes_a_sum_of_its_own_branches(minus):
    """(s x + t) ± M (s x + t) = s (x ± M x) + (t ± t)"""

    def forward(m, x):
        y = m.norm(x.tanh())
        return m.lin(minus(y, y.roll(1, 0)))

    assert left(unproven(Function(forward, norm=nn.BatchNorm1d(4), lin=nn.Linear(4, 3)), torch.randn(3, 4))[1]) == 0


@pytest.mark.parametrize("minus", [lambda a, b: a - b, lambda a, b: b - a], ids=["a-b", "b-a"])
def test_another_scale_does_not_pass_a_difference(minus):
    model = Function(
        lambda m, x, y: m.lin(minus(m.norm(x.tanh()), y.tanh())), norm=nn.BatchNorm1d(4), lin=nn.Linear(4, 3)
    )  # fmt: skip
    _, report = unproven(model, torch.randn(2, 4), torch.randn(2, 4))
    assert left(report) == 1
    assert "does not carry the same scale" in " ".join(s.note for s in report.refused)
