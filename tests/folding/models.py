"""What the tests of `fold` share: models with norms in awkward places, and the copy of a model with its first checks."""

import copy

import torch
from torch import nn

import normfuse
from normfuse.app.random_norms import randomise_norms
from tests.tolerances import IDENTITY

__all__ = ["IMAGE", "PreNorm", "TwoViews", "classes", "folded", "reasons"]

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def folded(model, inputs=(IMAGE,), **options):
    """The copy, once it is the model, the model is as it was, and the report says so."""
    randomise_norms(model, seed=0).eval()
    before = copy.deepcopy(model.state_dict())
    copied = normfuse.fold(model, inputs, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs), model(*inputs), rtol=0, atol=float(model(*inputs).abs().max()) * 2**-15)
    if options.get("verify") != "off":
        assert normfuse.report(copied).exact.max_rel <= IDENTITY
    copy.deepcopy(copied).load_state_dict(copied.state_dict())
    return copied


def classes(model):
    return [type(m).__name__ for m in model.modules() if not list(m.children())]


def reasons(model):
    return " | ".join(s.note for s in (*normfuse.report(model).refused, *normfuse.report(model).undone))


class PreNorm(nn.Module):
    """Two LayerNorms on a stream, gains and shifts of which have a place to go."""

    def __init__(self, d=16):
        super().__init__()
        self.start, self.norm1, self.mlp = nn.Linear(8, d), nn.LayerNorm(d), nn.Linear(d, d)
        self.norm2, self.head = nn.LayerNorm(d), nn.Linear(d, 3, bias=False)

    def forward(self, x):
        x = self.start(x)
        return self.head(self.norm2(x + self.mlp(self.norm1(x))))


class TwoViews(nn.Module):
    """One encoder for two inputs of different sizes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x):
        return torch.cat([self.head(self.encoder(x)), self.head(self.encoder(x[..., 2:]))], -1)
