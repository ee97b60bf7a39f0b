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


@pytest.mark.parametrize(("make", "x"), [(ClassAttention, torch.randn(2, 5, 8)), (Scaled, torch.randint(0, 16, (3, 4)))])
def test_once_is_enough(make, x):
    """What a selection uncovers is found in the same run: a selection of a concatenation, a factor beside the norm."""
    torch.manual_seed(0)
    fast = normfuse.optimize(randomise_norms(make()).eval(), (x,))
    again = normfuse.optimize(fast)
    assert normfuse.report(fast).applied
    assert not normfuse.report(again).applied
    assert len(again.graph.nodes) == len(fast.graph.nodes)
