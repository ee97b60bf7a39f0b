"""Mixtures of the whole norm family, drawn at random: nothing foldable is left, and never a wrong result."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import normfuse
from normfuse.nn import (
    BatchChannelNorm,
    DynamicErf,
    DynamicTanh,
    EvoNorm,
    L1BatchNorm,
    L1LayerNorm,
    PowerNorm,
    ScaledNorm,
    UnifiedNorm,
    WeightStandardizedConv2d,
)
from tests.tolerances import IDENTITY, TOLERANCES
from tests.zoo_entry import randomise_norms
from tests.zoo_family import trained

HEADS = 2

# what a norm over tokens leaves: the operators of PyTorch that must still be there, each once
TOKEN_NORMS = {
    "unified": (lambda d: UnifiedNorm(d), []),
    "power": (lambda d: PowerNorm(d, group_num=HEADS), ["rms_norm"]),
    "power without groups": (lambda d: PowerNorm(d, group_num=0), []),
    "scaled rms": (lambda d: ScaledNorm(nn.RMSNorm(d), 3), ["rms_norm"]),
    "rms": (lambda d: nn.RMSNorm(d), ["rms_norm"]),
    "l1": (lambda d: L1LayerNorm(d), ["abs"]),
    "tanh": (lambda d: DynamicTanh(d), ["tanh"]),
    "erf": (lambda d: DynamicErf(d), ["erf"]),
}
IMAGE_NORMS = {
    "batch": (lambda c: nn.BatchNorm2d(c), []),
    "l1 batch": (lambda c: L1BatchNorm(c), []),
    "bcn": (lambda c: BatchChannelNorm(c, groups=2), ["group_norm"]),
    "evo, affine": (lambda c: EvoNorm("S1", c, groups=2, apply_act=False), []),
    "evo": (lambda c: EvoNorm("B0", c), ["maximum", "batch_norm"]),  # its γ and β stand before a ReLU: one operator
}


class Attention(nn.Module):
    def __init__(self, d, bias):
        super().__init__()
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)  # (B, H, T, d)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self, norm, branch):
        super().__init__()
        self.norm, self.branch = norm, branch

    def forward(self, x):
        return x + self.branch(self.norm(x))


def build(seed, d, image_norms, token_norms, bias):
    """Convolutions under image norms, patches, attention and MLP blocks under token norms, a head on the mean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = []
        channels = 3
        for i, name in enumerate(image_norms):
            conv = WeightStandardizedConv2d if i % 2 else nn.Conv2d
            layers += [conv(channels, d, 3, bias=bool(seed % 2)), IMAGE_NORMS[name][0](d), nn.ReLU()]
            channels = d
        layers += [nn.Conv2d(channels, d, 2, 2), nn.Flatten(2)]
        blocks = [
            Residual(
                TOKEN_NORMS[name][0](d),
                Attention(d, bias) if i % 2 == 0 else nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d)),
            )
            for i, name in enumerate(token_norms)
        ]

        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.blocks = nn.Sequential(*layers), nn.Sequential(*blocks)
                self.norm, self.head = UnifiedNorm(d), nn.Linear(d, 3, bias=False)

            def forward(self, x):
                return self.head(self.norm(self.blocks(self.stem(x).transpose(1, 2))).mean(1))

        return trained(randomise_norms(Mixed())).eval()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    seed=st.integers(0, 1000),
    d=st.sampled_from([4, 8, 12]),
    image_norms=st.lists(st.sampled_from(sorted(IMAGE_NORMS)), min_size=1, max_size=2),
    token_norms=st.lists(st.sampled_from(sorted(TOKEN_NORMS)), min_size=1, max_size=4),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    with_inputs=st.booleans(),
)
def test_any_mixture(seed, d, image_norms, token_norms, bias, batch, with_inputs):
    model = build(seed, d, image_norms, token_norms, bias)
    x = torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    fast = normfuse.optimize(model, (x,) if with_inputs else None)
    report = normfuse.report(fast)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=TOLERANCES[torch.float32].rtol * float(expected.abs().max()))
    if not with_inputs:
        return
    assert report.exact.max_rel <= IDENTITY
    assert not report.undone
    left = [n.target.__name__.split(".")[0] for n in fast.graph.nodes if n.op == "call_function"]
    wanted = [op for name in image_norms for op in IMAGE_NORMS[name][1]] + [
        op for name in token_norms for op in TOKEN_NORMS[name][1]
    ]
    kinds = {"batch_norm", "layer_norm", "rms_norm", "group_norm", "abs", "tanh", "erf", "maximum"}
    assert sorted(op for op in left if op in kinds) == sorted(wanted)


@pytest.mark.parametrize("name", ["unified", "power without groups"])
def test_a_static_norm_leaves_no_arithmetic_at_all(name):
    """As many operators as the same model without norms."""
    model = build(0, 8, ["batch"], [name, name], bias=False)
    plain = build(0, 8, ["batch"], [name, name], bias=False)
    for block in plain.blocks:
        block.norm = nn.Identity()
    plain.norm = nn.Identity()
    x = torch.randn(2, 3, 9, 9)

    def operators(m):
        return sorted(str(n.target) for n in normfuse.optimize(m, (x,)).graph.nodes if n.op == "call_function")

    assert operators(model) == operators(plain)
