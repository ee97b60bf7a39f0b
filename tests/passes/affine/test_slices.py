"""A slice of a concatenation reads the operand that it lies in; a norm of one value is computed once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from tests.passes.guarded import Function, unproven
from tests.zoo import randomise_norms

aten = torch.ops.aten


def targets(fast):
    return [str(n.target).split(".")[1] for n in fast.graph.nodes if n.op == "call_function" and str(n.target).startswith("aten")]


def joined(x, y, z=None, dim=1):
    return torch.cat([F.gelu(x), F.silu(y)] if z is None else [F.gelu(x), F.silu(y), F.mish(z)], dim)


X, Y, Z = torch.randn(2, 3, 4), torch.randn(2, 2, 4), torch.randn(2, 1, 4)

INSIDE = {
    "all of the first": lambda x, y, z: joined(x, y, z)[:, :3],
    "some of the first": lambda x, y, z: joined(x, y, z)[:, 1:2],
    "every other of the first": lambda x, y, z: joined(x, y, z)[:, 0:3:2],
    "all of the second": lambda x, y, z: joined(x, y, z)[:, 3:5],
    "to the end": lambda x, y, z: joined(x, y)[:, 3:],
    "from behind": lambda x, y, z: joined(x, y, z)[:, -1:],
    "up to behind": lambda x, y, z: joined(x, y)[:, :-2],
    "one": lambda x, y, z: joined(x, y, z)[:, 4],
    "the last one": lambda x, y, z: joined(x, y, z)[:, -1],
    "narrow": lambda x, y, z: joined(x, y, z).narrow(1, 3, 2),
    "split": lambda x, y, z: joined(x, y).split([3, 2], 1)[1],
    "chunk": lambda x, y, z: joined(x, y).chunk(2, 1)[1],
    "equal split": lambda x, y, z: joined(x, y).split(3, 1)[0],
    "unbind": lambda x, y, z: joined(x, y, z).unbind(1)[3],
    "last axis": lambda x, y, z: joined(x.mT, y.mT, dim=-1)[..., 3:],
}


@pytest.mark.parametrize("how", INSIDE)
def test_taken_apart(how):
    model = Function(lambda m, *xyz: m.lin(INSIDE[how](*xyz).flatten(1)[:, :2].tanh()), lin=nn.Linear(2, 2))
    fast, report = unproven(model, X, Y, Z)
    assert "cat" not in targets(fast)
    assert "slice_of_concatenation" in [s.rule for s in report.applied]


ACROSS = {
    "parts of two": lambda x, y, z: joined(x, y, z)[:, 2:4],
    "steps over two": lambda x, y, z: joined(x, y, z)[:, 0:5:2],
    "another axis": lambda x, y, z: joined(x, y, z)[:, :, 1:3],
    "one of another axis": lambda x, y, z: joined(x, y, z)[0],
    "to the end of two": lambda x, y, z: joined(x, y, z)[:, 3:],
    "a split across": lambda x, y, z: joined(x, y, z).split(2, 1)[1],
    "rolled": lambda x, y, z: joined(x, y, z).roll(1, 1),
    "repeated": lambda x, y, z: joined(x, y).repeat(1, 2, 1),
}


@pytest.mark.parametrize("how", ACROSS)
def test_what_lies_in_several_operands_stays(how):
    model = Function(lambda m, *xyz: m.lin(ACROSS[how](*xyz).flatten(1)[:, :2].tanh()), lin=nn.Linear(2, 2))
    fast, report = unproven(model, X, Y, Z)
    assert "cat" in targets(fast)
    assert "slice_of_concatenation" not in [s.rule for s in report.applied]


def test_a_wider_dtype_stays():
    model = Function(lambda m, x, y: torch.cat([F.gelu(x).float(), y.tanh()], 1)[:, :3].exp())
    unproven(model, X, Y)


def test_what_is_returned_has_memory_of_its_own():
    fast = normfuse.optimize(Function(lambda m, x, y: torch.cat([x, y], 1)[:, :3]).eval(), (X, Y), verify="off")
    x = X.clone()
    fast(x, Y).zero_()
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    ("take", "apart"),
    [
        pytest.param(lambda whole: whole[:, :1], True, id="in front of the free axis"),
        pytest.param(lambda whole: whole[:, 1:], True, id="all of the free axis"),
        pytest.param(lambda whole: whole[:, 2:], True, id="the rest of the free axis"),
        pytest.param(lambda whole: whole[:, 0], True, id="the class token"),
        pytest.param(lambda whole: whole[:, 1:3], False, id="a part of the free axis, which may be shorter"),
        pytest.param(lambda whole: whole[:, :-1], False, id="counted from a free end"),
    ],
)
def test_a_free_number_of_tokens(take, apart):
    model = Function(
        lambda m, x: take(torch.cat([m.token.expand(x.shape[0], 1, 4), x.tanh()], 1)).exp(), token=torch.randn(1, 1, 4)
    )
    tokens = torch.export.Dim("tokens", min=3, max=64)
    fast = normfuse.optimize(model.eval(), (torch.randn(2, 5, 4),), dynamic_shapes={"inputs": ({1: tokens},)}, verify="off")
    for n in (3, 5, 9):
        x = torch.randn(2, n, 4)
        torch.testing.assert_close(fast(x), model(x))
    assert ("cat" not in targets(fast)) == apart


def test_class_attention_loses_the_means_of_its_stream():
    """The class token is normalized on its own, joined with the others, and taken out again."""

    class ClassAttention(nn.Module):
        def __init__(self, d=8):
            super().__init__()
            self.stem, self.head = nn.Linear(6, d), nn.Linear(d, 3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 16), nn.GELU(), nn.Linear(16, d)) for _ in range(6)
            )
            self.token, self.norm, self.mlp = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, d)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            x = torch.cat([self.token(x[:, :1]), x[:, 1:]], 1)
            x = x + torch.cat([self.mlp(x[:, :1]), x[:, 1:]], 1)
            return self.head(self.norm(x)[:, 0])

    _, report = unproven(ClassAttention(), torch.randn(2, 5, 6))
    assert report.norms_after["rms_norm"] >= 6


class Twice(nn.Module):
    def __init__(self, same=True, returned=False):
        super().__init__()
        self.a, self.b = nn.RMSNorm(8), nn.RMSNorm(8, eps=None if same else 1e-2)
        self.p, self.q, self.returned = nn.Linear(8, 4), nn.Linear(8, 4), returned

    def forward(self, x):
        x = x.tanh()
        if self.returned:
            return F.rms_norm(x, (8,)), F.rms_norm(x, (8,))
        return self.p(self.a(x)) * self.q(self.b(x))


@pytest.mark.parametrize("same", [True, False])
def test_two_norms_of_one_value_are_one_when_their_gains_are_gone(same):
    fast, report = unproven(Twice(same), torch.randn(2, 3, 8))
    assert targets(fast).count("rms_norm") == (1 if same else 2)
    assert ("norm_of_one_value" in [s.rule for s in report.applied]) == same


def test_two_norms_that_are_returned_stay_two():
    fast, _ = unproven(Twice(returned=True), torch.randn(2, 3, 8))
    a, b = fast(torch.randn(2, 3, 8).double())
    a.zero_()
    assert b.any()


def test_a_second_run_finds_nothing():
    fast = normfuse.optimize(randomise_norms(Twice()).eval(), (torch.randn(2, 3, 8),))
    assert not normfuse.report(normfuse.optimize(fast)).applied
