"""In-place writes through another name of a value: the captured graph computes what the model computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse

ALIASES = {
    "einsum": lambda h: torch.einsum("ab->ab", h),
    "meshgrid": lambda h: torch.meshgrid(h.flatten(), indexing="ij")[0],
    "movedim": lambda h: h.movedim(0, 1),
    "unflatten": lambda h: h.unflatten(1, (2, 4)),
    "to": lambda h: h.to(torch.float32),
    "dropout": lambda h: F.dropout(h, 0.5, False),
    "atleast_1d": torch.atleast_1d,
    "broadcast_tensors": lambda h: torch.broadcast_tensors(h, torch.zeros(8))[0],
    "chunk": lambda h: h.chunk(2, 1)[1],
    "type_as": lambda h: h.type_as(torch.ones(1)),
    "contiguous": lambda h: h.contiguous(),
    "reshape": lambda h: h.reshape(2, 2, 8),
    "positive": torch.positive,
    "as_strided": lambda h: h.as_strided((4,), (1,)),
    "slice": lambda h: h[1:3],
    "itself": lambda h: h,
    "clone": lambda h: h.clone(),  # no alias: what the others are told apart from
}


class Writes(nn.Module):
    def __init__(self, alias, then):
        super().__init__()
        self.linear, self.head = nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        self.alias, self.then = alias, then

    def forward(self, x):
        h = self.linear(x)
        view = h.t()
        z = self.alias(h)
        if self.then == "the source is read":
            z.relu_()
            return self.head(h)
        if self.then == "a view is read":
            z.mul_(2.0)
            return view.sum(0)
        y = self.head(h)
        z.add_(1).relu_()
        return y, h, z


@pytest.mark.parametrize("then", ["the source is read", "a view is read", "all is returned"])
@pytest.mark.parametrize("alias", [pytest.param(v, id=k) for k, v in ALIASES.items()])
def test_a_write_through_an_alias_reaches_its_source(alias, then):
    model, x = Writes(alias, then).eval(), torch.randn(4, 8)
    fast = normfuse.optimize(model, (x,), verify="off")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_in_place_arithmetic_keeps_the_dtype_of_what_it_writes_to():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, y):
            h = self.linear(x)
            h += y
            return h

    model, inputs = Half().half().eval(), (torch.randn(4, 8).half(), torch.randn(4, 8))
    fast = normfuse.optimize(model, inputs, verify="off")
    assert fast(*inputs).dtype is torch.float16
    torch.testing.assert_close(fast(*inputs), model(*inputs))


def test_writes_to_fresh_values_leave_norms_whole():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.SiLU(inplace=True))
    fast = normfuse.optimize(model.eval(), (torch.randn(2, 3, 8, 8),))
    assert normfuse.report(fast).norms_after == {"batch_norm": 0}


class WrittenAndPadded(nn.Module):
    """A write that only functionalization gets right, and operators whose kernels in C++ ask for numbers."""

    def forward(self, x):
        y = torch.ceil(x) - x
        y[:, 0] = 0
        return torch.flatten(nn.functional.pad(y, (1, 0, 0, 1), value=0.5)[:, :, :2, :2], 1)


def test_sizes_stay_free_in_a_model_that_writes():
    batch, size = torch.export.Dim("batch", max=64), torch.export.Dim("size", max=64)
    model = WrittenAndPadded()
    fast = normfuse.optimize(model, (torch.randn(2, 6, 4, 4),), dynamic_shapes=({0: batch, 2: size, 3: size},))
    for sizes in ((5, 6, 9, 9), (3, 6, 2, 2)):
        x = torch.randn(sizes)
        torch.testing.assert_close(fast(x), model(x))
