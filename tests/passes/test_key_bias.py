"""The bias of keys goes where softmax hides it, and stays where something sees it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.api import DEFAULT
from normfuse.passes.key_bias import KeyBias
from tests.zoo import ZOO

D, HEADS = 16, 4


class Model(nn.Module):
    """Attention with separate projections, with something special at one place."""

    def __init__(self, special=""):
        super().__init__()
        self.special = special
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.position = nn.Parameter(torch.randn(5, D // HEADS))
        self.sink = nn.Parameter(torch.randn(1, HEADS, 1, D // HEADS))
        self.norm = nn.LayerNorm(D // HEADS)
        self.register_buffer("mask", torch.ones(5, 5).tril() == 0)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        match self.special:
            case "position on keys":
                k = k * self.position
            case "normalized keys":
                k = self.norm(k)
            case "a sink":
                k, v = (torch.cat([self.sink.expand(x.shape[0], -1, -1, -1), y], dim=2) for y in (k, v))
            case "keys are values":
                v = k
            case "keys are read twice":
                v = v + k.mean(2, keepdim=True)
            case "scaled keys":
                k = k * 0.3
        match self.special:
            case "explicit" | "masked" | "finite mask" | "added mask" | "softcap":
                scores = q @ k.transpose(-2, -1) / 2
                if self.special == "masked":
                    scores = scores.masked_fill(self.mask, float("-inf"))
                elif self.special == "finite mask":
                    scores = scores.masked_fill(self.mask, -3.0)
                elif self.special == "added mask":
                    scores = scores + self.mask * -1e4
                elif self.special == "softcap":
                    scores = torch.tanh(scores)
                y = scores.softmax(dim=-1) @ v
            case "softmax over queries":
                y = (q @ k.transpose(-2, -1)).softmax(dim=-2) @ v
            case "mask":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=~self.mask)
            case _:
                y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def done(model, example):
    report = normfuse.report(
        fast := normfuse.optimize(model.eval(), example, passes=[p if p != "key_bias" else KeyBias(own=True) for p in DEFAULT])
    )
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    return fast, next(p for p in report.passes if p.name == "key_bias")


@pytest.mark.parametrize("special", ["", "mask", "explicit", "masked", "added mask", "scaled keys"])
def test_dropped(special):
    fast, report = done(Model(special), (X,))
    assert [s.path for s in report.applied] == ["k"]
    assert "k.bias" not in fast.state_dict()
    assert {"q.bias", "v.bias"} & set(fast.state_dict())


@pytest.mark.parametrize(
    ("special", "reason"),
    [
        pytest.param("position on keys", "changes the keys", id="position on keys"),
        pytest.param("normalized keys", "norm (layer_norm) changes the keys", id="normalized keys"),
        pytest.param("a sink", "changes the keys", id="a sink among the keys"),
        pytest.param("keys are read twice", "changes the keys", id="keys are read twice"),
        pytest.param("keys are values", "", id="keys are values"),
        pytest.param("finite mask", "", id="a fill value that is a score"),
        pytest.param("softcap", "", id="softcap"),
        pytest.param("softmax over queries", "", id="softmax over queries"),
    ],
)
def test_kept(special, reason):
    fast, report = done(Model(special), (X,))
    assert not report.applied
    assert "k.bias" in fast.state_dict()
    assert [reason in s.note for s in report.refused] == ([True] if reason else [])


def test_a_bias_that_a_norm_left_goes_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(D), Model()
            self.attn.k = nn.Linear(D, D, bias=False)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            return self.attn(self.norm(x))

    fast, report = done(Block(), (X,))
    assert [s.path for s in report.applied] == ["attn.k"]
    assert "attn.k.bias" not in fast.state_dict()


@pytest.mark.parametrize("biases", [pytest.param((0, 1, 0), id="keys only"), pytest.param((1, 1, 0), id="queries too")])
def test_fused_projection(biases):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            with torch.no_grad():
                self.qkv.bias.mul_(torch.tensor(biases).repeat_interleave(D))

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    fast, report = done(Fused(), (X,))
    assert len(report.applied) == (biases == (0, 1, 0))
    assert ("qkv.bias" in fast.state_dict()) == (biases != (0, 1, 0))
    assert not report.refused


def test_rotary_models_and_models_without_attention_report_nothing():
    for name in ("llama_rms", "swin_like", "conv_writer"):
        entry = ZOO[name]
        _, report = done(entry.build(), entry.args)
        assert not report.refused


def test_without_shapes():
    report = normfuse.report(normfuse.optimize(Model().eval(), passes=["cleanup", KeyBias(own=True)]))
    assert [s.note for s in report.refused if s.rule == "key_bias_is_invisible"] in ([], ["shape unknown"])


def test_dynamic_batch_and_idempotent():
    model = Model("mask").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    fast = normfuse.optimize(model, (X,), dynamic_shapes=({0: batch},), passes=[*DEFAULT, KeyBias(own=True)])
    assert "k.bias" not in fast.state_dict()
    again = normfuse.optimize(fast, passes=[KeyBias(own=True)])
    assert not normfuse.report(again).applied
    big = torch.randn(7, 5, D)
    assert torch.allclose(fast(big), model(big), atol=1e-5)


def test_by_default_a_bias_of_the_model_stays():
    """A model in which nothing is folded stays the same bit for bit; a bias that a fold made or changed may go."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn, self.other = nn.LayerNorm(D), Model(), Model()
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            return self.attn(self.norm(x)) + self.other(x)

    fast = normfuse.optimize(Block().eval(), (X,))
    assert "attn.k.bias" not in fast.state_dict()
    assert "other.k.bias" in fast.state_dict()
