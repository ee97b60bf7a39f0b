"""Small models that tests quantize, and what they look at afterwards."""

import torch
from torch import nn

from normfuse import ShiftQuant
from tests.zoo import randomise_norms

__all__ = ["SIZE", "ConvNet", "Mlp", "Tied", "bytes_of", "draw", "entries", "ids", "made", "operators", "sqnr"]

SIZE = ShiftQuant(weight_bits=8, prefer="size")


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1, groups=2), nn.BatchNorm2d(24), nn.SiLU(),
            nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(400, 10)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Mlp(nn.Module):
    def __init__(self, act=nn.GELU, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up, self.act, self.down = nn.Linear(24, 64, bias), act(), nn.Linear(64, 12, bias)

    def forward(self, x):
        return self.down(self.act(self.up(self.norm(x))))


class Tied(nn.Module):
    """An embedding, one layer, and a head that is the embedding's table."""

    def __init__(self):
        super().__init__()
        self.wte, self.fc, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        return self.head(self.wte(ids) + torch.tanh(self.fc(self.wte(ids))))


def made(make, *args, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return randomise_norms(make(*args, **kwargs)).eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape, seed=0, high=40):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def sqnr(expected, found):
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


def entries(report, **wanted):
    return [e for e in report.quantization if e.kind != "model" and all(getattr(e, k) == v for k, v in wanted.items())]


def operators(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def bytes_of(gm):
    return sum(t.numel() * t.element_size() for t in gm.state_dict().values())
