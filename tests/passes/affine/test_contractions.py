"""A vector is no matrix, a table is no bias: what passes a product of matrices does not pass these."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from tests.zoo import randomise_norms


class Contraction(nn.Module):
    """Products in which an axis is a row of a matrix in one case, and the whole of a vector in the other."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.gain, self.table = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4, 4))
        self.norm, self.fc, self.row = nn.LayerNorm(4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, A, v):
        match self.how:
            case "matrix times a scaled vector":
                return A @ (torch.sigmoid(v) * self.gain)
            case "scaled product with a vector":
                return torch.softmax(A, -1) @ torch.sigmoid(v) * self.gain
            case "norm of a product with a vector":
                return self.norm(A @ self.fc(v))
            case "mv":
                return torch.mv(A, torch.sigmoid(v) * self.gain) * self.gain
            case "dot":
                return torch.dot(torch.sigmoid(v) * self.gain, v)
            case "einsum":
                return torch.einsum("ij,j->i", A, torch.sigmoid(v) * self.gain) * self.gain
            case "vector times a stack":
                return v @ (torch.sigmoid(A)[None].expand(4, 4, 4) * self.gain[:, None, None]) * self.gain
            case "linear of a vector":
                return self.fc(self.norm(torch.sigmoid(v) * self.gain))
            case "linear with a vector as weight":
                return F.linear(self.norm(A) * self.gain, self.row) * 2.0
            case "bias of two axes":
                return self.norm(F.linear(A, self.fc.weight, self.table))
            case "bias of one element":
                return self.norm(F.linear(A, self.fc.weight, self.row[:1])) + self.fc(self.norm(A))
            case "table in addmm":
                return self.norm(torch.addmm(self.table, A, self.fc.weight))
            case "table in baddbmm":
                return self.norm(torch.baddbmm(self.table[None], A[None], self.fc.weight[None]))
        raise AssertionError


CONTRACTIONS = [
    "matrix times a scaled vector", "scaled product with a vector", "norm of a product with a vector", "mv", "dot", "einsum",
    "vector times a stack", "linear of a vector", "linear with a vector as weight", "bias of two axes", "bias of one element",
    "table in addmm", "table in baddbmm",
]  # fmt: skip


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("how", CONTRACTIONS)
def test_products_with_vectors_and_tables_stay_the_same_function(how, given):
    torch.manual_seed(0)
    model = randomise_norms(Contraction(how)).eval()
    inputs = torch.randn(4, 4), torch.randn(4)
    fast = normfuse.optimize(model, inputs if given else None, verify="off")
    torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    assert not normfuse.report(fast).undone


class Reasons(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.bn, self.conv, self.fc = how, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        y = self.bn(torch.sigmoid(x))
        match self.how:
            case "weight":
                return F.conv2d(y, self.conv.weight * x.mean())
            case "piece":
                return y.topk(2, 1)[0]
            case "vector":
                return y @ x[0, 0, 0]
            case "gain":
                return torch.sigmoid(y * self.fc.bias[:, None, None] + self.conv.bias[:, None, None]), torch.tanh(y)
        raise AssertionError


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("weight", "conv2d does not take an affine: its weight is computed"),
        ("piece", "topk does not take an affine"),
        ("vector", "matmul does not take an affine: it multiplies by a vector"),
        ("gain", "does not take an affine"),
    ],
)
def test_reasons_name_operators_as_a_user_knows_them(how, words):
    report = normfuse.report(normfuse.optimize(randomise_norms(Reasons(how)).eval(), (torch.randn(2, 4, 4, 4),)))
    notes = " / ".join(f"{s.path} {s.note}" for s in report.refused)
    assert words in notes
    assert "<" not in notes
