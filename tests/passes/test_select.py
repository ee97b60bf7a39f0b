"""A selection moves up through what treats rows alike, and through nothing else."""

import pytest
import torch
from torch import nn

import normfuse
from tests.zoo import randomise_norms


class Head(nn.Module):
    def __init__(self, special=""):
        super().__init__()
        self.special = special
        self.mix, self.a, self.b = nn.Linear(5, 5), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.position, self.gate = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(5, 1))

    def forward(self, x):
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)  # mixes tokens: the selection stops here
        y = x + self.b(nn.functional.gelu(self.a(x))) + self.position
        y = y * self.gate if self.special == "gate" else y
        z = self.norm(y)
        if self.special == "two":
            return self.head(z[:, 0]) + self.head(z[:, 1])
        if self.special == "feature":
            return z[..., 2]
        if self.special == "softmax":
            return torch.softmax(z, 1)[:, 0]
        return self.head(z[:, -1])


def optimized(special, **options):
    torch.manual_seed(0)
    model, x = randomise_norms(Head(special)).eval(), torch.randn(2, 5, 8)
    fast = normfuse.optimize(model, (x,), passes=["cleanup", "select"], **options)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    return fast, report


@pytest.mark.parametrize("special", ["", "gate"])
def test_everything_behind_the_mixing_of_tokens_is_computed_for_one(special):
    fast, report = optimized(special)
    assert sum(s.rule == "selection_before_function" for s in report.applied) >= 5
    linears = [n for n in fast.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [len(n.meta["val"].shape) for n in linears] == [3, 2, 2, 2]


def test_with_a_free_batch():
    fast, _ = optimized("", dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert fast(torch.randn(7, 5, 8)).shape == (7, 3)


@pytest.mark.parametrize("special", ["two", "feature", "softmax"])
def test_what_needs_more_than_the_row_stays(special):
    _, report = optimized(special)
    assert not any(s.rule == "selection_before_function" for s in report.applied)


class ClassAttention(nn.Module):
    """A block for one token, which is joined to the others only to be taken out again."""

    def __init__(self):
        super().__init__()
        self.mix, self.fc = nn.Linear(5, 5), nn.Linear(8, 8)
        self.inner, self.last = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x):
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        token, rest = x[:, :1], x[:, 1:]
        token = token + torch.relu(self.fc(self.inner(token)))
        return self.last(torch.cat([token, rest], 1))[:, 0]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(16, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.embedding(x))[:, 0] * 0.5


class Folded(nn.Module):
    """The BatchNorm between the product and the selection goes into the product's weights; then the selection meets the product."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.gain, self.mix = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.mix @ (self.norm(self.fc(x))[0] * self.gain)


class Gated(nn.Module):
    """Both branches of a gated layer, and what goes around them, read the same token of the same value."""

    def __init__(self):
        super().__init__()
        self.mix, self.project, self.norm = nn.Linear(5, 5), nn.Linear(8, 8), nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.project(self.mix(x.transpose(1, 2)).transpose(1, 2))
        y = self.norm(x)
        return (x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)))[:, -1]


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (ClassAttention, torch.randn(2, 5, 8)),
        (Scaled, torch.randint(0, 16, (3, 4))),
        (Folded, torch.randn(2, 8)),
        (Gated, torch.randn(2, 5, 8)),
    ],
)
def test_once_is_enough(make, x):
    """What a selection uncovers is found in the same run: a selection of a concatenation, a factor beside the norm."""
    torch.manual_seed(0)
    fast = normfuse.optimize(randomise_norms(make()).eval(), (x,))
    again = normfuse.optimize(fast)
    assert normfuse.report(fast).applied
    assert not normfuse.report(again).applied
    assert len(again.graph.nodes) == len(fast.graph.nodes)


def test_what_reads_one_row_twice_does_not_keep_the_others():
    model, x = randomise_norms(Gated()).eval(), torch.randn(2, 5, 8)
    fast = normfuse.optimize(model, (x,))
    linears = [n for n in fast.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert [len(n.meta["val"].shape) for n in linears] == [3, 2, 2, 2, 2]
    torch.testing.assert_close(fast(x), model(x))


class Uneven(nn.Module):
    """Reads one row of an image behind a norm that nothing can take."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.softmax(1))[:, :, 1].softmax(1)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)])
@pytest.mark.parametrize("passes", [["select"], ["expose", "select"]])
def test_a_row_of_a_static_norm(norm, passes):
    model, x = randomise_norms(Uneven(norm)).eval(), torch.randn(2, 4, 5, 6)
    fast = normfuse.optimize(model, (x,), passes=passes)
    torch.testing.assert_close(fast(x), model(x))
    moved = [s.rule for s in normfuse.report(fast).applied]
    assert ("selection_before_function" in moved) == (isinstance(norm, nn.BatchNorm2d) or "expose" in passes)
