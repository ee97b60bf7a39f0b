"""Pre-LN becomes Pre-RMSNorm for training: the same outputs and the same gradients, before and after some steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.rms_with_bias import RMSNormWithBias
from normfuse.nn.zero_mean import ZeroMean
from normfuse.passes.streams.pre_rms import pre_rms
from tests.zoo import ZOO, randomise_norms

D, HEADS, CHARS, LENGTH = 32, 4, 13, 12


class Block(nn.Module):
    def __init__(self, *, causal=False, dropout=0.0, bias=True):
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=bias), nn.LayerNorm(D, bias=bias)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D), nn.Dropout(dropout))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Convolution patches, class token, learned positions; the head reads the class token."""

    def __init__(self, stem="linear", scale=False, **options):
        super().__init__()
        self.stem, self.patch = stem, nn.Conv2d(3, D, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 5, D))
        self.blocks, self.norm, self.head = nn.ModuleList(Block(**options) for _ in range(4)), nn.LayerNorm(D), nn.Linear(D, 7)
        self.gain = nn.Parameter(torch.randn(D)) if scale else None

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        if self.stem == "nonlinear":
            x = F.gelu(x)
        for block in self.blocks:
            x = block(x)
            if self.gain is not None:
                x = x * self.gain
        return self.head(self.norm(x)[:, 0])


class CharGpt(nn.Module):
    """Token table, fixed sinusoidal positions in a buffer, causal blocks without β, a head of its own or tied."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(CHARS, D), nn.LayerNorm(D), nn.Linear(D, CHARS, bias=False)
        self.blocks = nn.Sequential(*(Block(causal=True, bias=False) for _ in range(4)))
        angle = torch.arange(LENGTH)[:, None] / 100 ** (torch.arange(0, D, 2) / D)
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos() + 1], dim=1))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids) + self.positions[: ids.shape[1]])))


def trained(model, x, y, steps=5):
    """A few steps in float64, so that nothing is at its initial value."""
    model = randomise_norms(model).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
    return model


def loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def vit(**options):
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(0, 7, (6,))
    return trained(Vit(**options), x, y), x, y


def gpt(**options):
    ids = torch.randint(0, CHARS, (4, 9))
    return trained(CharGpt(**options), ids, ids.roll(-1, 1)), ids, ids.roll(-1, 1)


def raw(model):
    """Parameters by the name that they had before the parametrization."""
    return {n.replace("parametrizations.", "").removesuffix(".original"): p for n, p in model.named_parameters()}


def close(a, b, bound=1e-9):
    return float((a - b).detach().abs().max()) <= bound * float(b.detach().abs().max())


@pytest.mark.parametrize("make", [vit, gpt])
@pytest.mark.parametrize("training", [pytest.param(True, id="train"), pytest.param(False, id="eval")])
def test_outputs_and_gradients_are_those_of_the_original(make, training):
    model, x, y = make()
    model.train(training)
    new = pre_rms(model, (x,))
    assert new.training is training
    assert all(m.training is training for m in new.modules())
    assert close(new(x), model(x))
    for m in (model, new):
        m.zero_grad()
        loss(m, x, y).backward()
    names = {n for n, _ in model.named_parameters()}
    assert set(raw(new)) == names
    for name, p in model.named_parameters():
        assert torch.equal(raw(new)[name], p), name
        assert close(raw(new)[name].grad, p.grad) or float(p.grad.abs().max()) < 1e-12, name


@pytest.mark.parametrize("make", [vit, gpt])
def test_it_trains_as_the_original_does(make):
    model, x, y = make()
    new = pre_rms(model, (x,))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, new)]
    for _ in range(5):
        for m, optimizer in zip((model, new), optimizers, strict=True):
            optimizer.zero_grad()
            loss(m, x, y).backward()
            optimizer.step()
    assert close(new(x), model(x))


def test_what_changes():
    model, x, _ = vit()
    new = pre_rms(model, (x,))
    assert not any(isinstance(m, nn.LayerNorm) for m in new.modules())
    assert sum(isinstance(m, RMSNormWithBias) for m in new.modules()) == 9
    dims = {n: m[0].dim for n, m in new.named_modules() if isinstance(m, parametrize.ParametrizationList)}
    writers = {f"blocks.{i}.{m}.parametrizations.{p}": 0 for i in range(4) for m in ("proj", "mlp.2") for p in ("weight", "bias")}
    patch = {f"patch.parametrizations.{p}": 0 for p in ("weight", "bias")}
    assert dims == {**writers, **patch, "parametrizations.cls": 2, "parametrizations.pos": 2}
    assert all(isinstance(m[0], ZeroMean) for m in new.modules() if isinstance(m, parametrize.ParametrizationList))
    assert isinstance(model.norm, nn.LayerNorm)
    assert not parametrize.is_parametrized(model)


def test_norms_without_shift_are_plain_and_buffers_are_centered():
    model, ids, _ = gpt()
    before = model.positions.clone()
    new = pre_rms(model, (ids,))
    assert type(new.blocks[0].norm1) is nn.RMSNorm
    assert float(new.positions.mean(1).abs().max()) < 1e-15
    assert torch.equal(model.positions, before)
    assert new.embed.parametrizations.weight[0].dim == 1


def test_optimize_makes_it_permanent():
    model, x, _ = vit()
    fast = normfuse.optimize(pre_rms(model, (x,)).eval(), (x,))
    report = normfuse.report(fast)
    assert {k: n for k, n in report.norms_after.items() if n} == {"rms_norm": 9}
    assert close(fast(x), model.eval()(x))


def test_state_of_the_original_fits():
    model, x, _ = vit()
    new, other = pre_rms(model, (x,)), copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        for name, p in other.named_parameters():
            raw(new)[name].copy_(p)
    assert close(new(x), other(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"stem": "nonlinear"}, "gelu", id="a nonlinear stem needs centering"),
        pytest.param({"scale": True}, "LayerScale", id="a gain on the stream"),
    ],
)
def test_refused(options, words):
    model, x, _ = vit(**options)
    with pytest.raises(UsageError, match=words):
        pre_rms(model, (x,))


def test_tied_table_is_refused():
    model, ids, _ = gpt(tied=True)
    with pytest.raises(UsageError, match=r"tied|shared"):
        pre_rms(model, (ids,))


def test_of_a_post_ln_model_only_the_embedding_norm_is_converted():
    entry = ZOO["postln_bert"]
    new = pre_rms(entry.build(), entry.args)
    assert [n for n, m in new.named_modules() if isinstance(m, RMSNormWithBias)] == ["norm"]
    assert sum(isinstance(m, nn.LayerNorm) for m in new.modules()) == 4


@pytest.mark.parametrize("name", ["stream_as_output", "llama_rms"])
def test_refused_models(name):
    entry = ZOO[name]
    with pytest.raises(UsageError):
        pre_rms(entry.build(), entry.args)


def test_dropout_in_the_stream_is_warned_about(caplog):
    model, x, _ = vit(dropout=0.1)
    pre_rms(model, (x,))
    assert "blocks.0.mlp.3 drops single elements of the stream" in caplog.text
    caplog.clear()
    model, x, _ = vit()
    pre_rms(model, (x,))
    assert "drops" not in caplog.text


class TwoStreams(nn.Module):
    """One stream that can be converted and one that starts at a nonlinearity; or one norm module for both."""

    def __init__(self, *, shared=False, functional=False):
        super().__init__()
        self.functional = functional
        self.a, self.b, self.left, self.right = (nn.Linear(8, D) for _ in range(4))
        self.norm_a, self.norm_b, self.head = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 2)
        if shared:
            self.norm_b = self.norm_a

    def forward(self, x):
        a, b = self.a(x) + self.left(x.sin()), torch.tanh(self.b(x))
        a = F.layer_norm(a, (D,)) if self.functional else self.norm_a(a)
        return self.head(a + self.norm_b(b))


def test_other_norms_stay_and_are_named(caplog):
    x = torch.randn(3, 8)
    new = pre_rms(randomise_norms(TwoStreams()).eval(), (x,))
    assert isinstance(new.norm_a, RMSNormWithBias)
    assert isinstance(new.norm_b, nn.LayerNorm)
    assert "norm_b stays a LayerNorm" in caplog.text


def test_a_norm_that_also_reads_another_value_stays():
    with pytest.raises(UsageError, match="keeps its mean"):
        pre_rms(TwoStreams(shared=True).eval(), (torch.randn(3, 8),))


def test_a_function_call_cannot_be_swapped():
    with pytest.raises(UsageError, match="function call"):
        pre_rms(TwoStreams(functional=True).eval(), (torch.randn(3, 8),))


def test_without_inputs_the_shapes_are_unknown():
    model = nn.Sequential(nn.Linear(6, D), nn.LayerNorm(D), nn.Linear(D, 2))
    with pytest.raises(UsageError, match="pass example_inputs"):
        pre_rms(model)


def test_a_model_without_layer_norm():
    with pytest.raises(UsageError, match="has no LayerNorm"):
        pre_rms(nn.Linear(3, 3), (torch.randn(2, 3),))


def test_a_transformer_of_torch():
    layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, dropout=0.0, norm_first=True, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(D), enable_nested_tensor=False)
    model = randomise_norms(nn.Sequential(nn.Linear(8, D), stack, nn.Linear(D, 3))).double().train()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    new = pre_rms(model, (x,))
    assert close(new(x), model(x))
    assert not any(isinstance(m, nn.LayerNorm) for m in new.modules())
