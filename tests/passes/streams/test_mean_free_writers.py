"""A writer of a stream that reads a value of the same stream reads it with its mean."""

import pytest
import torch
from torch import nn

from tests.passes.guarded import unproven


class Stream(nn.Module):
    """Pre-LN blocks on a value that the first branch reads without a norm."""

    def __init__(self, start, d=8):
        super().__init__()
        self.start, self.stem, self.direct = start, nn.Linear(6, d), nn.Linear(d, d)
        self.token, self.extra = nn.Parameter(torch.randn(1, 1, d)), nn.LayerNorm(d)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 16), nn.GELU(), nn.Linear(16, d)) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.stem(x)
        match self.start:
            case "a nonlinearity":
                x = torch.tanh(x)
                x = x + self.direct(x)
            case "a norm":
                x = self.extra(x)
                x = x + self.direct(x)
            case "a token":
                x = torch.cat([self.token.expand(len(x), 1, -1) + self.direct(self.token), x], 1)
            case "pieces":
                a, b = torch.tanh(x).chunk(2, 1)
                x = a + self.direct(b)
                x = x + b
            case "twice":
                x = torch.tanh(x)
                x = x + x
            case "twice, moved":
                x = torch.tanh(x).mT
                x = (x + x).mT
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("start", ["a nonlinearity", "a norm", "a token", "pieces", "twice", "twice, moved"])
def test_a_writer_sees_the_mean_of_what_it_reads(start):
    _, report = unproven(Stream(start), torch.randn(2, 4, 6))
    assert report.norms_after["layer_norm"] == (1 if start == "a norm" else 0)
