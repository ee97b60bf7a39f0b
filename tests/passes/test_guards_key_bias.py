"""The bias of keys goes only where every reader of the scores is a softmax over the keys: each thing that would see it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.api import DEFAULT
from normfuse.passes.key_bias import KeyBias
from tests.passes.guarded import Function, unproven

X = torch.randn(2, 5, 4)
PIPELINE = [p if p != "key_bias" else KeyBias(own=True) for p in DEFAULT]
PARTS = {
    **{name: nn.Linear(4, 4) for name in "qkvo"}, "g": torch.randn(4), "n": torch.rand(5, 1) + 0.5, "s": torch.rand(5) + 0.5,
    "rows": torch.rand(5, 1) + 0.5, "norm": nn.LayerNorm(4), "mask": torch.ones(5, 5).tril() == 0, "low": torch.tensor(-1e9),
    "high": torch.tensor(-3.0), "bias": torch.randn(5, 5), "cat": torch.randn(2, 1, 4), "flat": nn.Linear(20, 4),
}  # fmt: skip


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


# attention, and whether the bias of its keys goes
ATTENTION = {
    "plain": (lambda m, x: sdpa(m.q(x), m.k(x), m.v(x)), True),
    "keys are values": (lambda m, x: (lambda k: sdpa(m.q(x), k, k))(m.k(x)), False),
    "keys are queries": (lambda m, x: (lambda k: sdpa(k, k, m.v(x)))(m.k(x)), False),
    "keys are read twice": (lambda m, x: (lambda k: sdpa(m.q(x), k, m.v(x)) + k)(m.k(x)), False),
    "a gain of features": (lambda m, x: sdpa(m.q(x), m.k(x) * m.g, m.v(x)), True),
    "a gain that varies over keys": (lambda m, x: sdpa(m.q(x), m.k(x) * m.n, m.v(x)), False),
    "a number": (lambda m, x: sdpa(m.q(x), m.k(x) * 0.5 / 3.0, m.v(x)), True),
    "a number in front": (lambda m, x: sdpa(m.q(x), 0.5 * m.k(x), m.v(x)), True),
    "normalized": (lambda m, x: sdpa(m.q(x), m.norm(m.k(x)), m.v(x)), False),
    "joined with others": (lambda m, x: sdpa(m.q(x), torch.cat([m.cat, m.k(x)], 1), torch.cat([m.cat, m.v(x)], 1)), False),
    "half of them": (lambda m, x: sdpa(m.q(x)[..., :2], m.k(x)[..., :2], m.v(x)), True),
    "rolled": (lambda m, x: sdpa(m.q(x), m.k(x).roll(1, 1), m.v(x)), True),
    "tokens as features": (lambda m, x: sdpa(x[:, :1], m.flat(m.k(x).flatten(1))[:, None], x[:, :1]), None),
    "written out": (lambda m, x: (m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x), True),
    "a positive axis": (lambda m, x: (m.q(x) @ m.k(x).mT).softmax(2) @ m.v(x), True),
    "over queries": (lambda m, x: (m.q(x) @ m.k(x).mT).softmax(-2) @ m.v(x), False),
    "over images": (lambda m, x: (m.q(x) @ m.k(x).mT).softmax(0) @ m.v(x), False),
    "keys on the left": (lambda m, x: (m.k(x) @ m.q(x).mT).softmax(-1) @ m.v(x), False),
    "with themselves": (lambda m, x: (lambda k: (k @ k.mT).softmax(-1))(m.k(x)) @ m.v(x), False),
    "not transposed": (lambda m, x: (m.q(x).mT @ m.k(x)).softmax(-1) @ x[:, :4], False),
    "scaled": (lambda m, x: (0.5 * (m.q(x) @ m.k(x).mT) / 2.0 * 3.0).softmax(-1) @ m.v(x), True),
    "scaled by query": (lambda m, x: ((m.q(x) @ m.k(x).mT) * m.rows).softmax(-1) @ m.v(x), True),
    "scaled by key": (lambda m, x: ((m.q(x) @ m.k(x).mT) * m.s).softmax(-1) @ m.v(x), False),
    "scaled by a value": (lambda m, x: ((m.q(x) @ m.k(x).mT) * x.mean()).softmax(-1) @ m.v(x), False),
    "divided by a value": (lambda m, x: ((m.q(x) @ m.k(x).mT) / (x.mean() + 2)).softmax(-1) @ m.v(x), False),
    "divides": (lambda m, x: (1.0 / (m.q(x) @ m.k(x).mT + 50)).softmax(-1) @ m.v(x), False),
    "a bias of scores": (lambda m, x: (m.q(x) @ m.k(x).mT + m.bias).softmax(-1) @ m.v(x), True),
    "softcap": (lambda m, x: (m.q(x) @ m.k(x).mT).tanh().softmax(-1) @ m.v(x), False),
    "the scores are returned": (lambda m, x: (lambda s: s.softmax(-1) @ m.v(x) + s.mean())(m.q(x) @ m.k(x).mT), False),
    "masked": (lambda m, x: (m.q(x) @ m.k(x).mT).masked_fill(m.mask, -torch.inf).softmax(-1) @ m.v(x), True),
    "masked with a low tensor": (lambda m, x: (m.q(x) @ m.k(x).mT).masked_fill(m.mask, m.low).softmax(-1) @ m.v(x), True),
    "masked with a score": (lambda m, x: (m.q(x) @ m.k(x).mT).masked_fill(m.mask, -3.0).softmax(-1) @ m.v(x), False),
    "masked with a tensor, a score": (lambda m, x: (m.q(x) @ m.k(x).mT).masked_fill(m.mask, m.high).softmax(-1) @ m.v(x), False),
    "where": (lambda m, x: torch.where(m.mask, m.low, m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x), True),
    "where not": (lambda m, x: torch.where(~m.mask, m.q(x) @ m.k(x).mT, m.low).softmax(-1) @ m.v(x), True),
    "where it is a score": (lambda m, x: torch.where(m.mask, m.high, m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x), False),
    "where others are scores": (lambda m, x: torch.where(m.mask, m.bias, m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x), False),
    "scores moved": (lambda m, x: (m.q(x) @ m.k(x).mT).unsqueeze(1).roll(1, 2).squeeze(1).softmax(-1) @ m.v(x), True),
    "scores transposed": (lambda m, x: (m.q(x) @ m.k(x).mT).mT.softmax(-1) @ m.v(x), False),
    "some scores": (lambda m, x: (m.q(x) @ m.k(x).mT)[..., :3].softmax(-1) @ m.v(x)[:, :3], None),
    "one key cut away, one filled in": (lambda m, x: F.pad((m.q(x) @ m.k(x).mT)[..., 1:], (1, 0)).softmax(-1) @ m.v(x), False),
    "not keys": (lambda m, x: m.k(x).exp(), False),
}  # fmt: skip


@pytest.mark.parametrize("how", ATTENTION)
def test_bias_of_keys(how):
    forward, goes = ATTENTION[how]
    _, report = unproven(Function(lambda m, x: m.o(forward(m, x.tanh())).sin(), **PARTS), X, passes=PIPELINE)
    applied = [s.path for s in report.applied if s.rule == "key_bias_is_invisible"]
    if goes is not None:
        assert ("k" in applied) == goes, report.refused
