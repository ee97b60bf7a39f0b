"""Branches of one value merge only where they read the same places: each difference that forbids it."""

import pytest
import torch
from torch import nn

from tests.passes.guarded import Function, unproven

C = nn.Conv2d
X = torch.randn(2, 4, 9, 9)
SMALL = torch.randn(4, 1, 1)

# a sum of branches, and how many convolutions are left of it
SUMS = {
    "equal": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3), "b": C(4, 4, 3)}, 1),
    "another stride": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 1, stride=8), "b": C(4, 4, 9)}, 2),
    "another stride of equal size": (
        lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3, stride=2, padding=1), "b": C(4, 4, 5, stride=1)}, 2),
    "a stride with the value itself": (lambda m, x: m.a(x).repeat(1, 1, 3, 3) + x, {"a": C(4, 4, 3, stride=3)}, 1),
    "a stride beside the value": (lambda m, x: m.a(x)[:, :, :1, :1] + x[:, :, :1, :1] + x.mean(), {"a": C(4, 4, 3, stride=2)}, 1),
    "another dilation": (
        lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3, padding=1), "b": C(4, 4, 3, padding=2, dilation=2)}, 2),
    "a dilation of one tap": (
        lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 1, dilation=3), "b": C(4, 4, 3, padding=2, dilation=2)}, 1),
    "other groups": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3, groups=2), "b": C(4, 4, 3, groups=4)}, 2),
    "the same groups, and x": (lambda m, x: m.a(x) + m.b(x) + x, {"a": C(4, 4, 3, 1, 1, groups=2), "b": C(4, 4, 1, groups=2)}, 1),
    "another centre": (lambda m, x: m.a(x)[:, :, 1:, 1:] + m.b(x), {"a": C(4, 4, 2, padding=1), "b": C(4, 4, 1)}, 2),
    "a centre between": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 2), "b": C(4, 4, 2)}, 1),
    "shifted": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, (3, 1), padding=(1, 0)), "b": C(4, 4, (1, 3), padding=(0, 1))}, 2),
    "same padding": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3, padding="same"), "b": C(4, 4, 3, padding=1)}, 1),
    "same padding of an even kernel": (
        lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 2, padding="same"), "b": C(4, 4, 3, padding=1)}, 2),
    "valid padding": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3, padding="valid"), "b": C(4, 4, 3)}, 1),
    "one output for all": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3), "b": C(4, 1, 3)}, 2),
    "one output beside x": (lambda m, x: m.a(x) + x, {"a": C(4, 1, 1)}, 1),
    "other inputs": (lambda m, x: m.a(x) + m.b(x.tanh()), {"a": C(4, 4, 3), "b": C(4, 4, 3)}, 2),
    "a branch that others read": (
        lambda m, x: (lambda y: m.a(x) + y + y.mean())(m.b(x)), {"a": C(4, 4, 3), "b": C(4, 4, 3)}, 2),
    "the lead that others read": (
        lambda m, x: (lambda y: y + m.b(x) + y.mean())(m.a(x)), {"a": C(4, 4, 3), "b": C(4, 4, 3)}, 2),
    "a sum that others read": (
        lambda m, x: (lambda y: y + m.c(x) + y.mean())(m.a(x) + m.b(x)), {"a": C(4, 4, 3), "b": C(4, 4, 3), "c": C(4, 4, 3)}, 2),
    "more taps than before": (
        lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, (5, 1), padding=(2, 0)), "b": C(4, 4, (1, 5), padding=(0, 2))}, 2),
    "a gain of channels": (lambda m, x: m.a(x) + x * m.s, {"a": C(4, 4, 3, padding=1), "s": SMALL}, 1),
    "a gain of places": (lambda m, x: m.a(x) + x * m.s, {"a": C(4, 4, 3, padding=1), "s": torch.randn(9)}, 1),
    "a gain on a branch": (lambda m, x: m.a(x) * m.s + m.b(x), {"a": C(4, 4, 3), "b": C(4, 4, 3), "s": SMALL}, 1),
    "a linear layer and x": (lambda m, x: m.a(x) + x, {"a": nn.Linear(9, 9)}, 1),
    "a linear layer and a convolution": (lambda m, x: m.a(x) + m.b(x), {"a": nn.Linear(9, 9), "b": C(4, 4, 1)}, 2),
    "linear layers": (lambda m, x: m.a(x) + m.b(x), {"a": nn.Linear(9, 9), "b": nn.Linear(9, 9, bias=False)}, 1),
    "linear layers of other widths": (lambda m, x: m.a(x) + m.b(x), {"a": nn.Linear(9, 9), "b": nn.Linear(9, 1)}, 2),
    "twice the same": (lambda m, x: m.a(x) + m.a(x), {"a": C(4, 4, 3)}, 1),
    "a product in between": (lambda m, x: m.a(x) + m.b(x) * x[:, :, 1:-1, 1:-1], {"a": C(4, 4, 3), "b": C(4, 4, 3)}, 2),
    "no bias": (lambda m, x: m.a(x) + m.b(x), {"a": C(4, 4, 3, bias=False), "b": C(4, 4, 3, bias=False)}, 1),
    "a shift only": (lambda m, x: m.a(x) + (x + m.s), {"a": C(4, 4, 3, padding=1, bias=False), "s": SMALL}, 1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("how", SUMS)
def test_convolutions_left(how):
    forward, parts, expected = SUMS[how]
    fast, report = unproven(Function(lambda m, x: forward(m, x.tanh()).sin(), **parts), X)
    found = [n for n in fast.graph.nodes if n.op == "call_function" and str(n.target).split(".")[1] in ("conv2d", "linear")]
    assert len(found) == expected, [s.note for s in report.refused]
