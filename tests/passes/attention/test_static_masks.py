"""Values that depend on indices alone, against what torch computes; and the masks that follow from them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.passes.attention.index_algebra import Affine, AtLeastZero, index_values
from tests.export.models import AUTO, exported, outputs, relative


def _diff(x, first):
    return torch.diff(torch.arange(x.shape[1])[None].expand(x.shape), prepend=first.expand(x.shape[0], 1))


EXPRESSIONS = {
    "causal": lambda x: torch.arange(x.shape[1])[None] <= torch.arange(x.shape[0])[:, None],
    "strict": lambda x: torch.arange(x.shape[1])[None] < torch.arange(x.shape[0])[:, None],
    "window": lambda x: torch.arange(x.shape[1])[None] + 2 > torch.arange(x.shape[0])[:, None],
    "all": lambda x: (torch.arange(x.shape[0]) >= 0)[:, None].expand(x.shape),
    "none": lambda x: (torch.arange(x.shape[0]) < 0)[:, None].expand(x.shape),
    "not": lambda x: ~(torch.arange(x.shape[1])[None] > torch.arange(x.shape[0])[:, None]),
    "and": lambda x: (torch.arange(x.shape[1])[None] >= 0) & (torch.arange(x.shape[1])[None] <= torch.arange(x.shape[0])[:, None]),
    "sum": lambda x: torch.arange(x.shape[0])[:, None] + torch.arange(x.shape[1])[None] - 3,
    "diff": lambda x: _diff(x, torch.arange(x.shape[1])[None, :1] - 1),
    "diff with a seam": lambda x: _diff(x, torch.full((1, 1), 7)),
    "slice": lambda x: torch.arange(x.shape[1])[None, 1:].expand(x.shape[0], -1) - 1,
    "from the end": lambda x: torch.arange(x.shape[1])[None, -1:].expand(x.shape[0], -1),
    "cumsum": lambda x: torch.ones(x.shape, dtype=torch.int64).cumsum(1),
    "index": lambda x: torch.arange(x.shape[1])[torch.arange(x.shape[1])[None].expand(x.shape)],
    "index from the end": lambda x: torch.arange(x.shape[1])[torch.arange(x.shape[1])[None].expand(x.shape) - 1],
    "one place": lambda x: torch.full((1,), 3)[None].expand(x.shape),
}
OPAQUE = {"from the end", "diff with a seam", "index from the end"}  # not affine: nothing may be claimed


def _filled(value, shape):
    form = value.form if isinstance(value, AtLeastZero) else value
    grid = torch.full(shape, form.constant)
    for axis, c in enumerate(form.coefficients):
        grid = grid + c * torch.arange(shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))])
    return grid >= 0 if isinstance(value, AtLeastZero) else grid


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_index_values_hold_for_every_size(name):
    class Module(nn.Module):
        def forward(self, x):
            return EXPRESSIONS[name](x)

    exported_program = torch.export.export(Module(), (torch.randn(4, 6),), dynamic_shapes=({0: AUTO, 1: AUTO},))
    graph = exported_program.graph
    found = index_values(graph, lambda _: None).get(graph.output_node().args[0][0])
    assert (found is None) == (name in OPAQUE)
    for shape in ((4, 6), (6, 4), (3, 3)) if found is not None else ():
        want = EXPRESSIONS[name](torch.randn(shape))
        assert torch.equal(_filled(found, tuple(want.shape)).to(want.dtype), want)


def test_a_truth_value_is_a_constant():
    class Module(nn.Module):
        def forward(self, x):
            return torch.arange(x.shape[0]) >= 0

    graph = torch.export.export(Module(), (torch.randn(4),), dynamic_shapes=({0: AUTO},)).graph
    assert index_values(graph, lambda _: None)[graph.output_node().args[0][0]] == Affine((0,), 1)


class Masked(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x, keep):
        n = x.shape[2]
        return F.scaled_dot_product_attention(x, x + 1, x, attn_mask=self.make(torch.arange(n), keep))


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        pytest.param(lambda i, keep: (i[:, None] >= 0).expand(-1, i.shape[0]), False, id="hides nothing"),
        pytest.param(lambda i, keep: i[None, :] <= i[:, None], False, id="hides the future"),
        pytest.param(lambda i, keep: i[None, :] < i[:, None] + 2, True, id="hides all but the next"),
        pytest.param(lambda i, keep: (i[:, None] >= 0) & keep[:, None, None, :], True, id="padding"),
        pytest.param(lambda i, keep: (i[None, :] <= i[:, None]) & keep[:, None, None, :], True, id="padding and future"),
    ],
)
def test_masks_in_a_file(tmp_path, make, kept):
    model, x, keep = Masked(make).eval(), torch.randn(2, 3, 5, 8), torch.rand(2, 5) > 0.3
    shapes = ({0: AUTO, 2: AUTO}, {0: AUTO, 1: AUTO})
    result = exported(model, (x, keep), tmp_path, target="portable", opset=23, attention="attention23", dynamic_shapes=shapes)
    assert ("Where" in result.ops) == kept
    x, keep = torch.randn(3, 3, 7, 8), torch.rand(3, 7) > 0.3
    keep[0] = False
    assert relative(outputs(result, x=x, keep=keep)["output"], model(x, keep)) < 1e-5
