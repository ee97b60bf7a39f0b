"""Arithmetic that only looks like a mean, a variance or their root: it may become a norm of the same function, or none."""

import pytest
import torch

from tests.passes.guarded import Function, unproven

X = torch.randn(3, 4, 6) + 0.5


def mean(x, dim=-1):
    return x.mean(dim, keepdim=True)


def rms(x, square, eps=0.1):
    return x * torch.rsqrt(square + eps)


def layer(x, variance, eps=0.1):
    return (x - mean(x)) / torch.sqrt(variance + eps)


SPELLINGS = {
    # mean of squares
    "plain": lambda x: rms(x, mean(x * x)),
    "a negative factor": lambda x: x * torch.rsqrt(3.0 - mean(x * x) * -0.5),
    "a factor": lambda x: rms(x, mean(x * x) * 2.0),
    "a divisor": lambda x: rms(x, mean(x * x) / 2.0),
    "a sum": lambda x: rms(x, (x * x).sum(-1, keepdim=True)),
    "a sum with a divisor": lambda x: rms(x, (x * x).sum(-1, keepdim=True) / 6),
    "a sum with another divisor": lambda x: rms(x, (x * x).sum(-1, keepdim=True) / 5),
    "two values": lambda x: rms(x, mean(x * x.roll(1, -1))),
    "a cube": lambda x: rms(x, mean(x**3).abs()),
    "a fourth power": lambda x: rms(x, mean(x**4)),
    "another axis": lambda x: rms(x, mean(x * x, 1)),
    "two axes": lambda x: rms(x, (x * x).mean((-1, -2), keepdim=True)),
    "two axes, one kept": lambda x: rms(x, (x * x).mean((-1, -2))[:, None, None]),
    "an axis put back elsewhere": lambda x: rms(x[:, :, :4], (x[:, :, :4] ** 2).mean(-1).unsqueeze(1)),
    "an axis put back": lambda x: rms(x, (x**2).mean(-1).unsqueeze(-1)),
    "everything": lambda x: rms(x, (x * x).mean()),
    "of another value": lambda x: rms(x, mean(x.tanh() ** 2)),
    "moved in between": lambda x: rms(x, mean(x.flip(1) ** 2)),
    # roots
    "a root": lambda x: x / (mean(x * x) + 0.1).sqrt(),
    "a root multiplied": lambda x: x * (mean(x * x) + 0.1).sqrt(),
    "a reciprocal": lambda x: x * (mean(x * x) + 0.1).sqrt().reciprocal(),
    "one over": lambda x: x * (1.0 / (mean(x * x) + 0.1).sqrt()),
    "two over": lambda x: x * (2.0 / (mean(x * x) + 0.1).sqrt()),
    "another power": lambda x: x * (mean(x * x) + 0.1) ** -0.25,
    "a whole power": lambda x: x * (mean(x * x) + 0.1) ** -1,
    "added outside": lambda x: x / ((mean(x * x) + 0.1).sqrt() + 0.2),
    "added twice": lambda x: x / ((mean(x * x) + 0.1).sqrt() + 0.2 + 0.3),
    "added to the reciprocal": lambda x: x * (torch.rsqrt(mean(x * x) + 0.1) + 0.2),
    "scaled": lambda x: x / ((mean(x * x) + 0.1).sqrt() * 3.0),
    "scaled by less than nothing": lambda x: x / ((mean(x * x) + 0.1).sqrt() * -3.0),
    "divided by less than nothing": lambda x: x / ((mean(x * x) + 0.1).sqrt() / -3.0),
    "scaled behind an addition": lambda x: x / (((mean(x * x) + 0.1).sqrt() + 0.2) * 3.0),
    "scaled behind a clamp": lambda x: x / ((mean(x * x) + 0.1).sqrt().clamp_min(0.8) * 3.0),
    "clamped": lambda x: x / (mean(x * x) + 0.1).sqrt().clamp(0.9),
    "clamped from both sides": lambda x: x / (mean(x * x) + 0.1).sqrt().clamp(0.5, 0.9),
    "a root of a root": lambda x: x / (mean(x * x) + 0.1).sqrt().sqrt(),
    "squared again": lambda x: x / (mean(x * x) + 0.1).sqrt() ** 2,
    "an epsilon of values": lambda x: rms(x, mean(x * x), eps=mean(x.abs())),
    # Euclidean norms
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "norm of order one": lambda x: x / x.norm(p=1, dim=-1, keepdim=True),
    "norm of order three": lambda x: x / torch.linalg.vector_norm(x, 3, -1, keepdim=True),
    "norm not kept": lambda x: x / x.norm(dim=-1)[..., None],
    "norm of everything": lambda x: x / x.norm(),
    "norm squared": lambda x: rms(x, x.norm(dim=-1, keepdim=True) ** 2 / 6),
    "norm plus something, squared": lambda x: rms(x, (x.norm(dim=-1, keepdim=True) + 0.2) ** 2 / 6),
    "a clamped norm, squared": lambda x: rms(x, x.norm(dim=-1, keepdim=True).clamp_min(2.0) ** 2 / 6),
    "a root with its epsilon, squared": lambda x: rms(x, ((mean(x * x) + 0.3).sqrt()) ** 2),
    "a reciprocal root, squared": lambda x: rms(x, torch.rsqrt(mean(x * x) + 0.3) ** 2),
    # variances
    "var": lambda x: layer(x, x.var(-1, keepdim=True, unbiased=False)),
    "unbiased": lambda x: layer(x, x.var(-1, keepdim=True)),
    "another correction": lambda x: layer(x, x.var(-1, keepdim=True, correction=2)),
    "a correction of all": lambda x: layer(x[..., :2], x[..., :2].var(-1, keepdim=True, correction=1)),
    "std": lambda x: (x - mean(x)) / (x.std(-1, keepdim=True) + 0.1),
    "var_mean": lambda x: (lambda v, m: (x - m) * torch.rsqrt(v + 0.1))(*torch.var_mean(x, -1, keepdim=True)),
    "std_mean": lambda x: (lambda s, m: (x - m) / (s + 0.1))(*torch.std_mean(x, -1, keepdim=True)),
    "the mean for the variance": lambda x: (lambda v, m: (x - v) / (m * m + 0.1))(*torch.var_mean(x, -1, keepdim=True)),
    "var of another axis": lambda x: layer(x, x.var(1, keepdim=True, unbiased=False)),
    "var not kept": lambda x: layer(x[:, :, :4], x[:, :, :4].var(-1, unbiased=False)[:, None]),
    "var of another value": lambda x: layer(x, x.exp().var(-1, keepdim=True, unbiased=False)),
    "centred squares": lambda x: layer(x, mean((x - mean(x)) ** 2)),
    "squares centred elsewhere": lambda x: layer(x, mean((x - mean(x, 1)) ** 2)),
    "squares centred by another mean": lambda x: layer(x, mean((x - mean(x.exp())) ** 2)),
    "two moments": lambda x: layer(x, mean(x * x) - mean(x) ** 2),
    "two moments, the first scaled": lambda x: layer(x, 2.0 * mean(x * x) - mean(x) ** 2),
    "two moments, the second scaled": lambda x: layer(x, mean(x * x) - 0.5 * mean(x) ** 2),
    "two moments, the first a sum": lambda x: layer(x, (x * x).sum(-1, keepdim=True) - mean(x) ** 2),
    "two moments, of another value": lambda x: layer(x, mean(x * x) + 9 - mean(x.sin()) ** 2),
    "two moments, of another axis": lambda x: layer(x, mean(x * x) + 9 - mean(x, 1) ** 2),
    "two moments, the first centred": lambda x: layer(x, x.var(-1, keepdim=True) + 9 - mean(x) ** 2),
    "two moments, the other way round": lambda x: layer(x, 9 - (mean(x) ** 2 - mean(x * x))),
    "a mean by a sum": lambda x: (x - x.sum(-1, keepdim=True) / 6) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "not quite a mean": lambda x: (x - x.sum(-1, keepdim=True) / 5) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "a sum for a mean": lambda x: (x - x.sum(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "a mean divided": lambda x: (x - mean(x) / 6) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "the mean of another value": lambda x: (x - mean(x.exp())) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "the mean of another axis": lambda x: (x - mean(x, 1)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "the mean added": lambda x: (x + mean(x)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "the other difference": lambda x: (mean(x) - x) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 0.1),
    "in integers": lambda x: rms(x, mean((x * x).long().double())),
}  # fmt: skip


@pytest.mark.parametrize("how", SPELLINGS)
def test_the_function_stays(how):
    unproven(Function(lambda m, x: SPELLINGS[how](x.sin() * 2 + x).cos()), X)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("plain", "rms_norm"), ("a sum with a divisor", "rms_norm"),
        ("an axis put back", "rms_norm"), ("a root", "rms_norm"),
        ("a reciprocal", "rms_norm"), ("one over", "rms_norm"), ("norm squared", "rms_norm"), ("var", "layer_norm"),
        ("unbiased", "layer_norm"), ("var_mean", "layer_norm"), ("centred squares", "layer_norm"), ("two moments", "layer_norm"),
        ("a mean by a sum", "layer_norm"),
    ],
)  # fmt: skip
def test_it_is_recognised(how, kind):
    fast, _ = unproven(Function(lambda m, x: SPELLINGS[how](x.sin() * 2 + x).cos()), X)
    assert kind in [str(n.target).split(".")[1] for n in fast.graph.nodes if n.op == "call_function"]
