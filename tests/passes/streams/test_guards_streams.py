"""Each condition on a stream without a mean: something in the middle of a residual stream that would see the mean go."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.guarded import unproven

D = 8


class Stream(nn.Module):
    """Pre-LN blocks around `middle`, which takes the stream and gives it back."""

    def __init__(self, middle):
        super().__init__()
        self.middle, self.stem, self.head, self.norm = middle, nn.Linear(6, D), nn.Linear(D, 3), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D)) for _ in range(6))
        self.lin, self.gate, self.wide, self.bare = nn.Linear(D, D), nn.Linear(D, 1), nn.Linear(D, 2 * D), nn.LayerNorm(D)
        self.conv, self.whole = nn.Conv1d(D, D, 3, padding=1, groups=2), nn.Conv1d(D, D, 3, padding=1)
        self.depth, self.up, self.up2 = (
            nn.Conv1d(D, D, 1, groups=D),
            nn.ConvTranspose1d(D, D, 1),
            nn.ConvTranspose1d(D, D, 1, groups=2),
        )
        self.table, self.tokens = nn.Embedding(5, D), nn.Parameter(torch.randn(1, 8, D))
        self.gain, self.one, self.token = (
            nn.Parameter(torch.randn(D)),
            nn.Parameter(torch.randn(8, 1)),
            nn.Parameter(torch.randn(1, 1, D)),
        )
        self.matrix, self.stack = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(2, D, D))
        self.two = nn.LayerNorm((8, D))
        self.columns = nn.LayerNorm(8)

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i == 2:
                x = self.middle(self, x)
        return self.head(self.norm(x))


MIDDLE = {
    "plain": lambda m, x: x,
    "a gate per token": lambda m, x: x * m.gate(m.norm(x)).sigmoid(),
    "a gate per token, in front": lambda m, x: m.gate(m.norm(x)).sigmoid() * x,
    "a gate per feature": lambda m, x: x * m.lin(m.norm(x)).sigmoid(),
    "a gate per feature, of the last norm": lambda m, x: m.lin(m.norm(x)).sigmoid() * x,
    "divided per token": lambda m, x: x / (m.gate(m.norm(x)).exp() + 1),
    "divided per feature": lambda m, x: x / (m.lin(m.norm(x)).exp() + 1),
    "a divisor": lambda m, x: 1 / (x.exp() + 1),
    "a number": lambda m, x: x * 0.5 + x / 3,
    "a gain per feature": lambda m, x: x * m.gain,
    "a gain per token": lambda m, x: x * m.one,
    "a shift per feature": lambda m, x: x + m.gain,
    "a shift of all": lambda m, x: x + 3.0,
    "negated": lambda m, x: -x + m.lin(m.norm(x)),
    "subtracted": lambda m, x: m.lin(m.norm(x)) - x,
    "a product with itself": lambda m, x: x @ x,
    "a product of tokens": lambda m, x: (m.norm(x) @ m.norm(x).mT).softmax(-1) @ x,
    "a product over tokens, transposed": lambda m, x: ((m.norm(x) @ m.norm(x).mT) @ x).mT.mT,
    "features in another order": lambda m, x: x + x.flip(-1),
    "features rolled": lambda m, x: x + x.roll(1, -1),
    "tokens rolled": lambda m, x: x + x.roll(1, 1),
    "transposed": lambda m, x: x + x.mT,
    "reshaped": lambda m, x: x + x.reshape(2, D, 8),
    "heads and back": lambda m, x: x + x.reshape(2, 8, 2, 4).reshape(2, 8, D),
    "half of the features": lambda m, x: torch.cat([x[..., :4], x[..., 4:]], -1),
    "joined features": lambda m, x: F.pad(torch.cat([x[..., :4], m.norm(x)[..., :2]], -1), (1, 1)),
    "joined tokens": lambda m, x: torch.cat([x[:, :4], x[:, 2:6]], 1),
    "joined with a token": lambda m, x: torch.cat([m.token.expand(2, 1, D), x[:, 1:]], 1),
    "joined with tokens that are read": lambda m, x: torch.cat([m.token.expand(2, 1, D), x[:, 1:]], 1) + m.token.tanh(),
    "zeros for tokens": lambda m, x: F.pad(x, (0, 0, 1, 1))[:, 2:],
    "ones for tokens": lambda m, x: F.pad(x, (0, 0, 1, 1), value=1.5)[:, 2:],
    "ones for half of a token": lambda m, x: F.pad(x, (0, 0, 1, 1), value=1.5)[:, :8],
    "zeros for features": lambda m, x: F.pad(x[..., 1:-1], (1, 1)),
    "zeros for a feature, cut away": lambda m, x: F.pad(x, (1, 0))[..., :-1],
    "mean over tokens": lambda m, x: x + x.mean(1, keepdim=True),
    "mean over tokens, not kept": lambda m, x: x + x.mean(1)[:, None],
    "mean over features": lambda m, x: x + x.mean(-1, keepdim=True),
    "mean over features, not kept": lambda m, x: x + x.mean(-1)[..., None],
    "mean in another dtype": lambda m, x: x + x.mean(1, keepdim=True, dtype=torch.float32),
    "pooled tokens": lambda m, x: F.avg_pool1d(x.mT, 3, 1, 1).mT,
    "pooled features": lambda m, x: F.avg_pool1d(x, 3, 1, 1),
    "resized tokens": lambda m, x: F.interpolate(x.mT, size=8, mode="linear").mT,
    "resized features": lambda m, x: F.interpolate(x, scale_factor=0.5).repeat(1, 1, 2),
    "tokens by index": lambda m, x: x[:, torch.tensor([0, 2, 1, 1, 4, 5, 6, 7])],
    "features by index": lambda m, x: x[..., torch.tensor([0, 2, 1, 1, 4, 5, 6, 7])],
    "rms norm": lambda m, x: x + F.rms_norm(x, (D,)),
    "a bare layer norm": lambda m, x: F.layer_norm(x, (D,)),
    "a layer norm with a gain": lambda m, x: m.bare(x),
    "a bare layer norm of two axes": lambda m, x: F.layer_norm(x, (8, D)),
    "a layer norm of two axes": lambda m, x: x + m.lin(m.two(x)),
    "a layer norm over tokens": lambda m, x: x + m.columns(x.mT).mT,
    "a layer norm over both axes in turn": lambda m, x: x + m.lin(m.norm(x)) + m.lin(m.columns(x.mT).mT),
    "a grouped convolution": lambda m, x: x + m.conv(m.norm(x).mT).mT,
    "a convolution of channels": lambda m, x: x + m.whole(m.norm(x).mT).mT,
    "a convolution of tokens": lambda m, x: x + m.whole(m.norm(x)),
    "a position encoding by convolution": lambda m, x: x + m.depth(x.mT).mT,
    "a transposed convolution": lambda m, x: x + m.up(m.norm(x).mT).mT,
    "a grouped transposed convolution": lambda m, x: x + m.up2(m.norm(x).mT).mT,
    "an embedding": lambda m, x: x + m.table(m.norm(x).argmax(-1) % 5),
    "a matrix": lambda m, x: x + m.norm(x) @ m.matrix,
    "a matrix over tokens": lambda m, x: x + (m.norm(x).mT @ m.matrix).mT,
    "a matrix that is also read": lambda m, x: x + m.norm(x) @ m.matrix + (m.norm(x) * m.matrix).sin(),
    "a stack of matrices": lambda m, x: x + m.norm(x) @ m.stack,
    "a weight of two writers": lambda m, x: x + m.lin(m.norm(x)) + m.lin(m.norm(x).tanh()),
    "a weight that is read elsewhere": lambda m, x: x + m.lin(m.norm(x)) + m.lin(m.norm(x)).relu(),
    "a writer of another width": lambda m, x: x + m.wide(m.norm(x)).chunk(2, -1)[0],
    "a nonlinearity": lambda m, x: x + m.lin(m.norm(x)).relu(),
    "read by a linear layer": lambda m, x: x + m.lin(x),
    "an unknown operator": lambda m, x: x.cumsum(1),
    "tokens sorted": lambda m, x: x.sort(1)[0],
    "positions": lambda m, x: x + m.tokens,
    "positions per token": lambda m, x: x + m.one,
    "one feature": lambda m, x: x + x[..., :1],
    "repeated": lambda m, x: x[:, :, None].expand(2, 8, 3, D).mean(2),
}  # fmt: skip


@cache
def optimized(how):
    """The result and the report: each of the tests below asks it something."""
    torch.manual_seed(0)
    return unproven(Stream(MIDDLE[how]), torch.randn(2, 8, 6))


@pytest.mark.parametrize("how", MIDDLE)
def test_the_function_stays(how):
    optimized(how)


@pytest.mark.parametrize(
    "how",
    [
        "plain", "a gate per token", "a gate per token, in front", "divided per token", "a number", "a gain per token",
        "a shift per feature", "negated", "subtracted", "a product of tokens", "tokens rolled", "joined tokens",
        "joined with a token",
        "zeros for tokens", "mean over tokens", "mean over tokens, not kept", "pooled tokens", "resized tokens", "tokens by index",
        "a bare layer norm", "a convolution of channels", "a transposed convolution", "an embedding", "a matrix",
        "a weight of two writers", "positions", "repeated", "a nonlinearity",
    ],
)  # fmt: skip
def test_no_layer_norm_is_left(how):
    _, report = optimized(how)
    assert report.norms_after["layer_norm"] == 0, [s.note for s in report.refused]
    assert report.norms_after["rms_norm"] >= 7


@pytest.mark.parametrize(
    "how", ["plain", "a number", "a gate per token", "joined tokens", "a bare layer norm", "positions", "a matrix"]
)
def test_no_centering_is_left_where_weights_take_it(how):
    fast, _ = optimized(how)
    assert torch.ops.aten.mean.dim not in [n.target for n in fast.graph.nodes]


class One(Stream):
    """A stream of one norm: what it must save, and what an addition costs."""

    def __init__(self, reader, d=D):
        super().__init__(None)
        self.reader = reader

    def forward(self, x):
        return self.reader(self, self.stem(x))


@pytest.mark.parametrize(
    ("reader", "kept", "reason"),
    [
        pytest.param(lambda m, x: m.head(m.norm(x)), 0, "", id="into the weights of its reader"),
        pytest.param(lambda m, x: m.norm(x).sin(), 1, "its β has no place to go", id="β has no place"),
        pytest.param(lambda m, x: m.head(m.norm(x.tanh())), 1, "has no weights", id="one centering for one norm"),
        pytest.param(lambda m, x: m.head(m.norm(m.conv(x.mT).mT)), 1, "has 2 groups", id="a grouped writer"),
        pytest.param(lambda m, x: (m.head(m.norm(x)), x), 1, "output of the model", id="an output"),
        pytest.param(lambda m, x: m.head(m.norm(x)) + m.gate(x), 1, "reads the residual stream without", id="a reader"),
        pytest.param(lambda m, x: m.head(m.norm(m.bare(x))), 1, "Post-LN", id="behind another norm"),
        pytest.param(lambda m, x: m.head(m.norm(torch.cat([x[..., :4], x[..., :4]], 2))), 1, "joins", id="joined features"),
    ],
)  # fmt: skip
def test_what_one_norm_saves(reader, kept, reason):
    _, report = unproven(One(reader), torch.randn(2, 8, 6))
    assert report.norms_after["layer_norm"] >= kept
    assert reason in " / ".join(s.note for s in report.refused)
    assert bool(report.refused) == bool(reason)
