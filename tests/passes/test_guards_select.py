"""A selection moves up only through what treats the rows of its axis alike."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.guarded import Function, unproven
from tests.zoo_entry import randomise_norms

X = torch.randn(2, 4, 4)
PARTS = {
    "lin": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "both": nn.LayerNorm((4, 4)), "row": torch.randn(1, 4),
    "rows": torch.randn(4, 4), "static": randomise_norms(nn.BatchNorm1d(4)),
    "vector": torch.randn(4), "stack": torch.randn(2, 1, 4), "number": torch.tensor(2.0),
}  # fmt: skip

FUNCTIONS = {
    "a feature of a linear layer": lambda m, x: m.lin(x)[..., 2],
    "a token of a linear layer": lambda m, x: m.lin(x)[:, 2],
    "an image of a linear layer": lambda m, x: m.lin(x)[1],
    "a feature of a norm": lambda m, x: m.norm(x)[..., 2],
    "a token of a norm": lambda m, x: m.norm(x)[:, -1],
    "a token of a norm over both": lambda m, x: m.both(x)[:, 1],
    "an image of a norm over both": lambda m, x: m.both(x)[1],
    "one row for all": lambda m, x: (x + m.row)[:, 2],
    "rows": lambda m, x: (x * m.rows)[:, 2],
    "a vector": lambda m, x: (x / m.vector)[:, 2],
    "a feature of a vector": lambda m, x: (x - m.vector)[..., 2],
    "a number": lambda m, x: (x * m.number * 3.0)[:, 1],
    "images": lambda m, x: (x + m.stack)[1],
    "one row that is computed": lambda m, x: (x + x[:, :1].tanh())[:, 2],
    "a row of fewer axes that is computed": lambda m, x: (x * x[0].tanh())[1],
    "one column that is computed": lambda m, x: (x * x[..., :1].sigmoid())[..., 2],
    "an elementwise function": lambda m, x: F.gelu(x)[:, 1],
    "a softmax": lambda m, x: x.softmax(1)[:, 1],
    "a channel of a static norm": lambda m, x: m.static(x)[:, 2],
    "an image of a static norm": lambda m, x: m.static(x)[1],
    "a place of a static norm": lambda m, x: m.static(x)[..., 2],
    "the same row twice": lambda m, x: (lambda y: y[:, 1].exp() + y[:, -3])(m.lin(x).tanh()),
    "rows of the same number on other axes": lambda m, x: (lambda y: y[0].sum() + y[:, 0])(m.lin(x).tanh()),
    "another reader": lambda m, x: (lambda y: y[:, 0] + y.mean(1))(m.lin(x).tanh()),
    "two selections": lambda m, x: (lambda y: y[:, 0] + y[:, 1])(m.lin(x).tanh()),
    "of an input": lambda m, x: x[:, 1],
}


@pytest.mark.parametrize("how", FUNCTIONS)
def test_the_function_stays(how):
    unproven(Function(FUNCTIONS[how], **PARTS), X)


@pytest.mark.parametrize(
    ("how", "moves"),
    [
        ("a token of a linear layer", True),
        ("an image of a norm over both", True),
        ("a place of a static norm", True),
        ("the same row twice", True),
        ("another reader", False),
    ],
)
def test_it_moves(how, moves):
    _, report = unproven(Function(FUNCTIONS[how], **PARTS), X)
    assert ("selection_before_function" in [s.rule for s in report.applied]) == moves
