"""Each condition under which an affine passes an operator: a model that would come out wrong without it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from tests.passes.guarded import Function, unproven

X = torch.randn(2, 5, 4)
G, T = torch.tensor([1.5, -0.5, 2.0, -1.25]), torch.tensor([0.5, -1.0, 2.0, 0.25])  # of features
TOKENS = torch.tensor([1.5, -0.5, 2.0, -1.25, 0.75])[:, None]
PARTS = {
    **{name: nn.Linear(4, 4) for name in "ab"},
    "one": nn.Linear(4, 1),
    "eight": nn.Linear(8, 2),
    "heads": nn.Linear(16, 2),
    "conv": nn.Conv1d(5, 5, 1),
    "g": G,
    "t": T,
    "n": TOKENS,
    "pair": torch.randn(2, 4, 3),
    "cube": torch.randn(4, 4, 4),
    "other": torch.tensor([3.0, 1.0, -2.0, 0.5]),
    "empty": torch.tensor([[True] * 5] * 4 + [[False] * 5]),
}


def heads(x):
    return x.reshape(1, 10, 1, 4)[:, :4]


def flipped(y):
    """What is beside itself with another scale and shift."""
    return torch.cat([y, y.flip(-1)], 1)


def grouped(q, values):
    return attention(q, q[:, :2], values(q[:, :2]), enable_gqa=True)


def attention(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


def twice(m, x, f):
    y = x.tanh() * m.g
    return m.a(f(y))


DOWN = {
    "relu, negative scale": lambda m, x: m.a(F.relu(x.tanh() * m.g)),
    "relu, shift": lambda m, x: m.a(F.relu(x.tanh() + m.t)),
    "leaky relu, negative scale": lambda m, x: m.a(F.leaky_relu(x.tanh() * m.g)),
    "leaky relu, shift": lambda m, x: m.a(F.leaky_relu(x.tanh() + m.t)),
    "maximum, negative scale": lambda m, x: m.conv(F.max_pool1d(x.tanh() * m.n, 2)),
    "maximum along what varies": lambda m, x: m.a(F.max_pool1d(x.tanh() * m.g.abs(), 3, stride=1, padding=1)),
    "mean of neighbours that vary": lambda m, x: m.a(
        F.avg_pool1d(x.tanh() * m.g, 3, stride=1, padding=1, count_include_pad=False)
    ),
    "moved by padding": lambda m, x: m.a(F.pad(x.tanh() * m.g, (1, -1))),
    "a stack of other matrices": lambda m, x: (x.tanh() * m.g) @ m.pair,
    "values of tokens, into a mixer of tokens": lambda m, x: m.conv(attention(x, x, x.tanh() * m.n)),
    "weighted values of tokens, into a mixer of tokens": lambda m, x: m.conv((x @ x.mT).softmax(-1) @ (x.tanh() * m.n)),
    "heads that share values, joined": lambda m, x: m.heads(
        grouped(heads(x), lambda v: v.tanh() * m.n[:2, None]).transpose(1, 2).flatten(2)
    ),
    "mean along what varies": lambda m, x: F.linear(F.avg_pool1d(x.tanh() * m.g, 2), m.one.weight[:, :2]),
    "mean of everything along what varies": lambda m, x: F.linear(F.adaptive_avg_pool1d(x.tanh() * m.g, 2), m.one.weight[:, :2]),
    "zeros of the border": lambda m, x: m.conv(F.avg_pool1d(x.tanh() * m.n + m.n, 3, stride=1, padding=1)),
    "mean over tokens that differ": lambda m, x: m.a((x.tanh() * m.n).mean(1)),
    "mean of axes behind": lambda m, x: m.a((x.tanh()[..., None, None] * m.g[:, None, None] + 1).mean((-1, -2))),
    "kept mean of axes behind": lambda m, x: m.a((x.tanh()[..., None] * m.g[:, None] + 1).mean(-1, keepdim=True).mT),
    "mean in another dtype": lambda m, x: F.linear((x.tanh() * m.g).mean(1, dtype=torch.float32), m.cube[0].float()),
    "a stack of matrices": lambda m, x: x.tanh()[:, :4].repeat(2, 1, 1) * m.g @ m.cube,
    "tokens joined with others": lambda m, x: m.a(torch.cat([x.exp(), x.tanh() * m.g], 1)),
    "tokens joined, with another scale": lambda m, x: twice(m, x, flipped),
    "tokens joined, with another shift": lambda m, x: m.a(flipped(x.tanh() + m.t)),
    "features joined with another affine": lambda m, x: m.eight(torch.cat([x.tanh() * m.g, x.exp() * m.other], -1)),
    "added to another affine": lambda m, x: m.a((x.tanh() + m.t) + (x.exp() + m.other)),
    "added to another affine, on its way": lambda m, x: twice(m, x, lambda y: y + y.flip(-1)),
    "added to something smaller": lambda m, x: m.a((x[:, :1].tanh() + m.t) + x.exp()),
    "added to something larger": lambda m, x: m.a((x.tanh() + m.n) + x[:, :1].exp()),
    "a square": lambda m, x: twice(m, x, lambda y: y * y),
    "a product of two affines": lambda m, x: m.a((x.tanh() * m.g) * (x.exp() * m.other)),
    "a shift in a product": lambda m, x: m.a((x.tanh() + m.t) * x.exp()),
    "a product that is larger": lambda m, x: m.a((x[:, :1].tanh() * m.g) * x.exp()),
    "values that differ by token": lambda m, x: m.a(attention(x, x, x.tanh() * m.n)),
    "queries are values": lambda m, x: twice(m, x, lambda y: attention(y, x, y)),
    "keys are values": lambda m, x: twice(m, x, lambda y: attention(x, y, y)),
    "only the queries": lambda m, x: twice(m, x, lambda y: attention(y, x, x)),
    "a row without keys": lambda m, x: m.a(attention(x, x, x.tanh() + m.t, attn_mask=m.empty)),
    "heads that share values": lambda m, x: m.a(
        attention(heads(x), heads(x)[:, :2], heads(x)[:, :2].tanh() * m.n[:2, None], enable_gqa=True)
    ),
    "weighted values that differ by token": lambda m, x: m.a((x @ x.mT).softmax(-1) @ (x.tanh() * m.n)),
    "a product with itself": lambda m, x: twice(m, x[:, :4], lambda y: y @ y),
    "weights that are not normalized": lambda m, x: m.a((x @ x.mT).relu() @ (x.tanh() + m.t)),
    "weights normalized over queries": lambda m, x: m.a((x @ x.mT).softmax(-2) @ (x.tanh() + m.t)),
    "weights that are constants": lambda m, x: m.a(m.cube[0] @ (x[:, :4].tanh() + m.t)),
}  # fmt: skip

UP = {
    "relu, negative scale": lambda m, x: F.relu(m.a(x)) * m.g,
    "relu, shift": lambda m, x: F.relu(m.a(x)) + m.t,
    "leaky relu, negative scale": lambda m, x: F.leaky_relu(m.a(x)) * m.g,
    "leaky relu, shift": lambda m, x: F.leaky_relu(m.a(x)) + m.t,
    "maximum, negative scale": lambda m, x: F.max_pool1d(m.conv(x), 2) * m.n,
    "mean along what varies": lambda m, x: F.avg_pool1d(m.a(x), 2) * m.g[:2],
    "mean of neighbours that vary": lambda m, x: (
        F.avg_pool1d(m.a(x), 3, stride=1, padding=1, count_include_pad=False) * m.g
    ),
    "maximum of neighbours that vary": lambda m, x: F.max_pool1d(m.a(x), 3, stride=1, padding=1) * m.g.abs(),
    "moved by padding": lambda m, x: F.pad(m.a(x), (1, -1)) * m.g,
    "values of tokens, from a mixer of tokens": lambda m, x: attention(x, x, m.conv(x)) * m.n,
    "weighted values of tokens, from a mixer of tokens": lambda m, x: (x @ x.mT).softmax(-1) @ m.conv(x) * m.n,
    "a stack of other matrices": lambda m, x: (x @ m.pair) * m.g[:3],
    "mean of everything along what varies": lambda m, x: F.adaptive_avg_pool1d(m.a(x), 2) * m.g[:2],
    "zeros of the border": lambda m, x: F.avg_pool1d(m.conv(x), 3, stride=1, padding=1) + m.n,
    "a mean that is not kept": lambda m, x: m.a(x).mean(1) * m.g + m.t,
    "a kept mean": lambda m, x: m.a(x).mean(1, keepdim=True) * m.g + m.t,
    "mean in another dtype": lambda m, x: m.a(x).mean(1, keepdim=True, dtype=torch.float32) * m.g.float(),
    "a stack of matrices": lambda m, x: (x[:, :4].repeat(2, 1, 1) @ m.cube) * m.g,
    "a sum with something smaller": lambda m, x: (m.a(x) + m.one(x)) * m.g,
    "a difference from something smaller": lambda m, x: (m.a(x) - m.one(x)) * m.g,
    "a difference": lambda m, x: (m.a(x) - m.b(x).tanh()) * m.g + m.t,
    "a difference of two producers": lambda m, x: (m.a(x).mT.mT - m.b(x[:, :, [1, 0, 2, 3]])) * m.g + m.t,
    "a sum with integers": lambda m, x: (m.a(x) + torch.arange(4)) * m.g,
    "a sum with a table": lambda m, x: (m.a(x) + m.cube[:, :1].reshape(4, 4)[:, None, None]) * m.g,
    "joined tokens, of which one half is no producer": lambda m, x: torch.cat([m.a(x), x], 1) * m.g,
    "joined features": lambda m, x: torch.cat([m.a(x)[..., :3], m.one(x)], -1) * m.g + m.t,
    "joined with a constant": lambda m, x: torch.cat([m.a(x), m.cube[:2, :1]], 1) * m.g,
    "values that differ by token": lambda m, x: attention(x, x, m.a(x)) * m.n,
    "a row without keys": lambda m, x: attention(x, x, m.a(x), attn_mask=m.empty) + m.t,
    "heads that share values": lambda m, x: grouped(heads(x), m.a) * m.n[:4, None],
    "weighted values that differ by token": lambda m, x: (x @ x.mT).softmax(-1) @ m.a(x) * m.n,
    "weights that are not normalized": lambda m, x: (x @ x.mT).relu() @ m.a(x) + m.t,
    "weights normalized over queries": lambda m, x: (x @ x.mT).softmax(-2) @ m.a(x) + m.t,
    "two readers": lambda m, x: (lambda y: y * m.g + y.exp())(m.a(x)),
    "the same value twice": lambda m, x: (lambda y: (y + y) * m.g)(m.a(x)),
    "the same value joined with itself": lambda m, x: (lambda y: torch.cat([y, y], 1) * m.g)(m.a(x)),
    "a piece of a split": lambda m, x: (lambda a, b: a * m.g[:2] + b)(*m.a(x).chunk(2, -1)),
    "a piece of what somebody else reads": lambda m, x: (lambda y: y.chunk(2, -1)[0] * m.g[:2] + y.exp()[..., :2])(m.a(x)),
    "a piece of a repetition": lambda m, x: m.a(x).repeat(1, 1, 2) * m.cube[:2, :1].reshape(-1),
    "an affine that others read": lambda m, x: (lambda y: m.b(y * m.other + m.g) + y.exp())(x.tanh() * m.g + m.t),
    "an output": lambda m, x: (lambda y: (y, m.b(y)))(x.tanh() * m.g),
    "a table that is larger": lambda m, x: m.b(m.one(x).tanh() * m.g),
    "a table that adds an axis": lambda m, x: m.b(m.a(x) + m.cube[:2, :1, None] * 1.0),
    "varies along two axes": lambda m, x: m.a(x[:, :4]) * m.cube[0],
    "negated": lambda m, x: 2.0 - m.a(x),
    "divided by constants": lambda m, x: m.a(x) / m.g,
    "divided by zero": lambda m, x: m.a(x) / (m.g * torch.tensor([0.0, 1, 1, 1])),
    "divided by the value": lambda m, x: m.g / (m.a(x) + 9),
}  # fmt: skip


@pytest.mark.parametrize("how", DOWN)
def test_down(how):
    unproven(Function(DOWN[how], **PARTS), X)


@pytest.mark.parametrize("how", UP)
def test_up(how):
    unproven(Function(UP[how], **PARTS), X)


class One(Function):
    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("forward", [pytest.param(f, id=how) for cases in (DOWN, UP) for how, f in cases.items()])
def test_without_shapes(forward):
    """What is not known is refused: nothing may be guessed."""
    try:
        unproven(One(forward, **PARTS), X, given=False)
    except normfuse.CaptureError:
        pytest.skip("only torch.export captures it")


# where the affine does go, so that a condition which refuses too much is seen
LANDS = {
    "mean over axes behind": (DOWN["mean of axes behind"], "mul"),
    "tokens joined with others of the same affine": (lambda m, x: twice(m, x, lambda y: torch.cat([y, y.roll(1, 1)], 1)), "mul"),
    "softmax over a positive axis": (lambda m, x: m.a((x @ x.mT).softmax(2) @ (x.tanh() + m.t)), "add"),
    "attention": (lambda m, x: m.a(attention(x, x, x.tanh() + m.t)), "add"),
    "masked attention, scale": (lambda m, x: m.a(attention(x, x, x.tanh() * m.g, attn_mask=m.empty)), "mul"),
    "a scale with zeros of the border": (lambda m, x: m.conv(F.avg_pool1d(x.tanh() * m.n, 3, stride=1, padding=1)), "mul"),
    "a scale with weights that are not normalized": (lambda m, x: m.a((x @ x.mT).relu() @ (x.tanh() * m.g)), "mul"),
    "a shift of something smaller": (lambda m, x: m.a((x[:, :1].tanh() + m.t) - x.exp()), "add"),
    "a product": (lambda m, x: m.a((x.tanh() * m.g) * x.exp()), "other.mul"),
    "positive relu": (lambda m, x: F.relu(m.a(x)) * m.g.abs(), "mul"),
    "positive maximum": (lambda m, x: F.max_pool1d(m.conv(x), 2) * m.n.abs(), "mul"),
    "a kept mean": (UP["a kept mean"], "mul"),
    "joined features": (UP["joined features"], "mul"),
    "attention values": (lambda m, x: attention(x, x, m.a(x)) * m.g + m.t, "mul"),
    "weighted values": (lambda m, x: (x @ x.mT).softmax(-1) @ m.a(x) * m.g + m.t, "mul"),
    "a difference of two producers": (UP["a difference of two producers"], "mul"),
    "a sum with a constant": (lambda m, x: (m.a(x) + m.t) * m.g, "mul"),
    "divided by constants": (UP["divided by constants"], "div"),
}


@pytest.mark.parametrize("how", LANDS)
def test_it_lands(how):
    forward, gone = LANDS[how]
    fast, report = unproven(Function(forward, **PARTS), X)
    kinds = [str(n.target).split(".")[1] for n in fast.graph.nodes if n.op == "call_function" and "aten" in str(n.target)]
    assert kinds.count(gone.split(".")[-1]) == (1 if gone.startswith("other") else 0), (kinds, report.refused)


def test_a_free_number_of_tokens_is_not_joined_with_another_affine():
    model = Function(lambda m, x: m.a(torch.cat([x.tanh() * m.g, x.exp()], 1)), a=nn.Linear(4, 4), g=G).eval()
    fast = normfuse.optimize(model, (X,), dynamic_shapes={"inputs": ({1: torch.export.Dim("tokens", max=64)},)}, verify="off")
    assert not normfuse.report(fast).undone
    torch.testing.assert_close(fast(X[:, :3]), model(X[:, :3]))
