"""Constants that torch's exporter makes for one value several times are all in the file."""

import torch
from torch import Tensor, nn

import normfuse
from tests.export.models import exported, outputs, relative


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.q, self.k = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.lo, self.hi = nn.Buffer(torch.tensor(-1.0)), nn.Buffer(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(x)
        a, b = torch.clamp(x, self.lo, self.hi), torch.clamp(x, self.lo, self.hi)
        return self.q(a) + self.k(b) + torch.clamp(x, self.lo * 0.5, self.hi)


def test_one_value_clamped_by_tensors_several_times(tmp_path):
    model, x = Clamped().eval(), torch.randn(2, 3, 8)
    found = exported(normfuse.optimize(model, (x,)), (x,), tmp_path)
    (out,) = outputs(found, x=x).values()
    assert relative(out, model(x)) < 1e-5
