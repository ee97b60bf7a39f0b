"""What a graph without shapes tells about dtypes, and torch's own epsilon."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.capture.capture import capture
from normfuse.ir.dtypes import default_eps
from normfuse.ir.graph import Graph
from normfuse.ir.views import Value
from normfuse.passes.patterns.known import dtype_of, infer, is_floating, may_be_floating


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_default_epsilon_is_the_one_that_torch_adds(dtype):
    x = torch.full((1, 64), 2.0**-12, dtype=dtype)
    added = float(x[0, 0].double() ** 2 / F.rms_norm(x, (64,)).double()[0, 0] ** 2 - x[0, 0].double() ** 2)
    assert added == pytest.approx(default_eps(dtype), rel=0.2, abs=1e-15)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.table = nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(9, 4)

    def forward(self, image, x, tokens):
        a = image * 0.5
        b = self.fc(torch.relu(x))
        return a, torch.sigmoid(b) + self.table(tokens), self.norm(image.float())


def test_what_meets_weights_has_their_dtype_and_an_input_that_meets_numbers_has_none():
    graph = Graph.of(capture(Mixed().eval(), None, None).gm)
    infer(graph)
    found = {n.name: Value(node=n) for n in graph}
    assert dtype_of(found["x"]) == dtype_of(found["relu"]) == dtype_of(found["linear"]) == torch.float32
    assert dtype_of(found["image"]) is None
    assert may_be_floating(found["image"])
    assert not is_floating(found["image"])
    assert dtype_of(found["embedding"]) == torch.float32
    assert dtype_of(found["tokens"]) is None


def test_an_rms_norm_takes_no_integers_and_gives_the_dtype_of_its_input():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.RMSNorm(4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.fc(self.norm(x) * 0.5), F.rms_norm(y, (4,))

    graph = Graph.of(capture(Norms().eval(), None, None).gm)
    infer(graph)
    found = {n.name: Value(node=n) for n in graph}
    assert dtype_of(found["x"]) == dtype_of(found["rms_norm"]) == dtype_of(found["mul"]) == torch.float32
    assert dtype_of(found["y"]) is None
    assert may_be_floating(found["y"])
    assert torch.int64 not in found["y"].node.meta["dtypes"]
    assert torch.complex64 in found["y"].node.meta["dtypes"]
