"""Normalizations written by hand become the operator; what only looks like one stays, with the reason."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import normfuse
from normfuse.passes.bake import Bake
from normfuse.passes.recognise import Recognise
from tests.tolerances import TOLERANCES

aten = torch.ops.aten
BAKE = Bake()


def pipeline(recognise):
    return [BAKE, "cleanup", recognise, "expose", "affine", "mean_free", "affine", "realise", "select", "cleanup"]


def recognised(model, *example, given=True, dynamic_shapes=None, recognise=None):
    """The optimized model and the report of the pass, after checks that hold for every model here."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    model = model.eval()
    passes = pipeline(recognise or Recognise())
    fast = normfuse.optimize(model, example if given else None, passes=passes, dynamic_shapes=dynamic_shapes)
    report = normfuse.report(fast)
    if given:
        assert report.exact.max_rel <= 1e-9
    assert not report.undone
    with torch.no_grad():
        expected, found = model(*example), fast(*example)
    assert found.dtype == expected.dtype
    bound = TOLERANCES[expected.dtype].rtol * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= bound
    assert not normfuse.report(normfuse.optimize(fast, passes=passes)).applied
    return fast, report.passes[2]


def targets(fast):
    return [n.target for n in fast.graph.nodes if n.op == "call_function"]


class Norm(nn.Module):
    """One norm in one spelling, over features."""

    def __init__(self, how, d=8):
        super().__init__()
        self.how, self.eps, self.d = how, 1e-3, d
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("epsilon", torch.tensor(1e-3))

    def forward(self, x):
        return getattr(self, self.how)(x)

    # RMSNorm

    def rms(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    def rms_square(self, x):
        return self.weight * (x / torch.sqrt(torch.square(x).mean(dim=-1, keepdim=True) + self.eps))

    def rms_product(self, x):
        return self.weight * x * (1 / (self.epsilon + (x * x).mean(-1).unsqueeze(-1)) ** 0.5)

    def rms_power(self, x):
        return x * ((x**2).mean(-1, keepdim=True) + self.eps) ** -0.5 * self.weight

    def rms_sum(self, x):
        return self.weight * (x / ((x * x).sum(-1, keepdim=True) / self.d + self.eps).sqrt().expand_as(x))

    def rms_norm_squared(self, x):
        return x * torch.rsqrt(x.norm(dim=-1, keepdim=True) ** 2 * (1 / self.d) + self.eps) * self.weight

    def rms_gain_with_root(self, x):
        return x * (self.weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def rms_cast(self, x):
        y = x.to(torch.float32)
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def rms_gemma(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)

    # LayerNorm

    def ln(self, x):
        mu = x.mean(-1, keepdim=True)
        return self.weight * (x - mu) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps) + self.bias

    def ln_squares(self, x):
        mu = x.mean(-1, keepdim=True)
        s = (x - mu).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mu) * torch.rsqrt(s + self.eps)) + self.bias

    def ln_moments(self, x):
        mu = x.mean(-1, keepdim=True)
        s = (x * x).mean(-1, keepdim=True) - mu * mu
        return (x - mu) / (s + self.eps).sqrt() * self.weight + self.bias

    def ln_var_mean(self, x):
        v, mu = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mu) * torch.rsqrt(v + self.eps) * self.weight + self.bias

    def ln_std(self, x):
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False) * self.weight + self.bias

    def ln_unbiased(self, x):
        v = x.var(-1, keepdim=True)
        return (x - x.sum(-1, keepdim=True) / self.d) * torch.rsqrt(v + self.eps) * self.weight + self.bias

    def ln_weightless(self, x):
        y = x - x.mean(-1, keepdim=True)
        return y / torch.sqrt((y**2).mean(-1, keepdim=True) + self.eps)

    # not quite

    def unbiased_outside(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias

    def outside(self, x):
        y = x - x.mean(-1, keepdim=True)
        return y / (y.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)

    def norm_outside(self, x):
        return x / (x.norm(dim=-1, keepdim=True) / self.d**0.5 + self.eps)

    def clamped(self, x):
        return F.normalize(x, dim=-1) * self.d**0.5 * self.weight

    def uncentred(self, x):
        return x * torch.rsqrt(x.var(-1, keepdim=True) + self.eps) * self.weight

    # something else

    def unit_length(self, x):
        return F.normalize(x, dim=-1)

    def unit_length_eps(self, x):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)

    def other_value(self, x):
        return x.relu() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def other_mean(self, x):
        return (x - x.relu().mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)

    def other_axis(self, x):
        return (x - x.mean(-2, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)

    def other_power(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps)

    def cubes(self, x):
        return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + self.eps)


RMS = [n for n in vars(Norm) if n.startswith("rms")]
LN = [n for n in vars(Norm) if n.startswith("ln")]


@pytest.mark.parametrize("given", [True, False], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("how", RMS)
def test_every_spelling_of_rms_norm_is_the_operator_with_its_gain(how, given):
    fast, report = recognised(Norm(how), torch.randn(2, 3, 8), given=given)
    if how == "rms_sum" and not given:
        assert len(report.applied) == 1  # d is known from γ
    assert targets(fast) == [aten.rms_norm.default]
    assert [s.rule for s in report.applied] == ["rms_norm_by_hand"]


@pytest.mark.parametrize("how", LN)
def test_every_spelling_of_layer_norm_is_the_operator_with_its_gain(how):
    fast, report = recognised(Norm(how), torch.randn(2, 3, 8))
    assert targets(fast) == [aten.layer_norm.default]
    assert [s.rule for s in report.applied] == ["layer_norm_by_hand"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("unbiased_outside", "unbiased standard deviation with ε outside the root; not a LayerNorm"),
        ("outside", "ε outside the root; not a LayerNorm"),
        ("norm_outside", "ε outside the root; not an RMSNorm"),
        ("clamped", "a least value in place of ε; not an RMSNorm"),
        ("uncentred", "whose mean is not removed; neither a LayerNorm nor an RMSNorm"),
    ],
)
def test_what_only_looks_like_a_norm_stays_and_says_why(how, reason):
    fast, report = recognised(Norm(how), torch.randn(2, 3, 8))
    assert not report.applied
    assert [reason in s.note for s in report.refused] == [True]
    assert not {aten.layer_norm.default, aten.rms_norm.default} & set(targets(fast))


@pytest.mark.parametrize(
    "how", ["unit_length", "unit_length_eps", "other_value", "other_mean", "other_axis", "other_power", "cubes"]
)
def test_other_arithmetic_is_not_mentioned(how):
    _, report = recognised(Norm(how), torch.randn(2, 8, 8))
    assert not report.applied
    assert not report.refused


@pytest.mark.parametrize("how", ["rms_cast", "rms_gemma"])
@pytest.mark.parametrize("given", [True, False], ids=["shapes", "no shapes"])
def test_casts_around_the_core_are_what_the_operator_does_inside(how, given):
    model = Norm(how).to(torch.bfloat16)
    fast, report = recognised(model, torch.randn(2, 3, 8).to(torch.bfloat16), given=given)
    assert targets(fast) == [aten.rms_norm.default]
    assert report.applied


def test_without_shapes_and_without_a_gain_the_size_is_unknown():
    _, report = recognised(Norm("ln_weightless"), torch.randn(2, 3, 8), given=False)
    assert [(s.note, s.remedy) for s in report.refused] == [("shape unknown", "pass example_inputs")]


def test_without_shapes_the_size_follows_from_the_weights_before():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(8, 6), Norm("ln_weightless", 6)

        def forward(self, x):
            return self.norm(x[..., :1] + self.a(x).relu())

    fast, report = recognised(Net(), torch.randn(2, 3, 8), given=False)
    assert report.applied
    assert next(n.args[1] for n in fast.graph.nodes if n.target in (aten.layer_norm.default, aten.rms_norm.default)) == [6]


# -- images ------------------------------------------------------------------------------------------------------------


class Image(nn.Module):
    def __init__(self, how, channels=8, groups=2):
        super().__init__()
        self.how, self.groups, self.eps = how, groups, 1e-3
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.per_group = nn.ParameterList([torch.ones(1, groups, 1), torch.zeros(1, groups, 1)])

    def forward(self, x):
        return getattr(self, self.how)(x)

    def normalized(self, x, dims):
        mu, v = x.mean(dims, keepdim=True), x.var(dims, keepdim=True, unbiased=False)
        return (x - mu) / torch.sqrt(v + self.eps)

    def gained(self, x):
        return self.weight[:, None, None] * x + self.bias[:, None, None]

    def channels_first(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        return self.gained((x - u) / torch.sqrt(s + self.eps))

    def rms_channels(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight.view(1, -1, 1, 1)

    def instance(self, x):
        return self.gained(self.normalized(x, (2, 3)))

    def whole(self, x):
        return self.gained(self.normalized(x, (1, 2, 3)))

    def group(self, x):
        y = self.normalized(x.reshape(x.size(0), self.groups, -1), -1)
        return (y * self.per_group[0] + self.per_group[1]).reshape(x.shape)

    def group_then_gain(self, x):
        return self.gained(self.normalized(x.view(x.size(0), self.groups, -1), -1).view_as(x))

    def bcn(self, x):
        y = torch.batch_norm(x.view(1, -1, x[0].numel() // self.groups), None, None, None, None, True, 0.0, self.eps, True)
        y = y.view(x.size(0), self.groups, -1)
        return (self.per_group[0] * y + self.per_group[1]).view(x.size())

    def rows(self, x):
        return self.normalized(x.reshape(x.size(0), x.size(1) * x.size(2), -1), -1).reshape(x.shape)

    def mixed(self, x):
        return self.normalized(x, (1, 3))


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "any batch"])
@pytest.mark.parametrize("how", ["instance", "whole", "group", "group_then_gain", "bcn"])
def test_norms_of_images_are_group_norms(how, free):
    shapes = ({0: torch.export.Dim.AUTO},) if free else None
    fast, report = recognised(Image(how), torch.randn(2, 8, 3, 4), dynamic_shapes=shapes)
    assert targets(fast) == [aten.group_norm.default]
    assert [s.rule for s in report.applied] == ["layer_norm_by_hand"]
    groups = next(n.args[1] for n in fast.graph.nodes if n.target is aten.group_norm.default)
    assert groups == {"instance": 8, "whole": 1}.get(how, 2)


@pytest.mark.parametrize(("how", "kind"), [("channels_first", aten.layer_norm.default), ("rms_channels", aten.rms_norm.default)])
def test_norms_over_channels_are_the_operator_between_permutations(how, kind):
    fast, _ = recognised(Image(how), torch.randn(2, 8, 3, 4))
    assert targets(fast) == [aten.permute.default, kind, aten.permute.default]
    fast, report = recognised(Image(how), torch.randn(2, 8, 3, 4), recognise=Recognise(channels=False))
    assert kind not in targets(fast)
    assert "channels=False" in report.refused[0].note


def test_rows_that_are_no_groups_of_channels_are_a_layer_norm():
    fast, _ = recognised(Image("rows"), torch.randn(2, 8, 3, 4))
    assert aten.layer_norm.default in targets(fast)
    assert aten.group_norm.default not in targets(fast)


def test_axes_that_no_operator_has_are_refused():
    _, report = recognised(Image("mixed"), torch.randn(2, 8, 3, 4))
    assert "normalizes over the axes [-3, -1]" in report.refused[0].note


@pytest.mark.parametrize("how", ["channels_first", "instance", "group"])
def test_without_shapes_norms_of_images_are_refused(how):
    _, report = recognised(Image(how), torch.randn(2, 8, 3, 4), given=False)
    assert [(s.note, s.remedy) for s in report.refused] == [("shape unknown", "pass example_inputs")]


# -- in a network ------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """What lies inside the norm is read by others as well."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        y = x - x.mean(-1, keepdim=True)
        z = y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.head(z * self.weight) + z.sum(-1, keepdim=True) + y.abs().sum(-1, keepdim=True)


def test_values_inside_that_others_read_stay():
    fast, report = recognised(Two(), torch.randn(2, 3, 8))
    assert report.applied
    assert aten.layer_norm.default in targets(fast) or aten.rms_norm.default in targets(fast)
    assert aten.sub.Tensor in targets(fast)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **SIZES)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(head_dim=8, **SIZES)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
}
# gains that stay: q and k norms before rotation, a tied head
GAINS = {"llama": 0, "qwen2": 0, "qwen3": 4, "gemma": 1, "t5": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models_of_transformers(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model = model.to(dtype)
    ids = {"input_ids": torch.randint(0, 64, (2, 7))}
    if name == "t5":
        ids["decoder_input_ids"] = torch.randint(0, 64, (2, 5))
    fast = normfuse.optimize(model, ids, passes=pipeline(Recognise()))
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert report.drift.max_rel <= TOLERANCES[dtype].rtol
    assert not report.undone
    norms = sum("Norm" in type(m).__name__ for m in model.modules())
    assert len(report.passes[2].applied) == norms == report.norms_after["rms_norm"]
    kept = [n for n in fast.graph.nodes if n.target is aten.rms_norm.default and len(n.args) > 2 and n.args[2] is not None]
    assert len(kept) == GAINS[name]
    assert aten.rsqrt.default not in targets(fast)
