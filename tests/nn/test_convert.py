"""Swapping the norms of a model: what is swapped, what is kept, what is left and why; and the result trains and optimizes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import normfuse
from normfuse.errors import UsageError
from normfuse.nn.convert import convert, swaps
from normfuse.nn.layouts import BatchNormAnyRank, ChannelsLast, Rows
from tests.zoo import randomise_norms
from tests.zoo_streams import Block

D = 8
FEATURES = ("unified", "power", "l1", "rms", "dyt", "derf", "scaled", "batch")


class Vit(nn.Module):
    """Pre-LN blocks on tokens, a final norm, a head."""

    def __init__(self, depth=3):
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, D), nn.ModuleList(Block(D) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


TOKENS, IMAGES = torch.randn(4, 5, 6), torch.randn(4, 3, 9, 9)


def kinds(model):
    return [type(m).__name__ for _, m in model.named_modules()]


def trained(model, x, steps=6):
    """The losses of a few steps: finite, and lower at the end."""
    model.train()
    y = torch.arange(len(x)) % 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# -- every target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", FEATURES)
def test_token_model_trains_exports_and_optimizes(to):
    model = randomise_norms(Vit())
    before = copy.deepcopy(model.state_dict())
    new = convert(model, to)
    losses = trained(new, TOKENS)
    assert losses[-1] < losses[0]
    new.eval()
    torch.export.export(new, (TOKENS,))
    fast = normfuse.optimize(new, (TOKENS,))
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())  # the original is as it was
    assert "LayerNorm" in kinds(model)


@pytest.mark.parametrize("to", ["unified", "power", "l1", "rms", "dyt", "derf", "layer", "bcn", "evo"])
def test_image_model_trains_exports_and_optimizes(to):
    new = convert(randomise_norms(cnn()), to)
    losses = trained(new, IMAGES)
    assert losses[-1] < losses[0]
    new.eval()
    torch.export.export(new, (IMAGES,))
    report = normfuse.report(normfuse.optimize(new, (IMAGES,)))
    assert report.exact.max_rel <= 1e-9
    assert not report.undone


@pytest.mark.parametrize(
    ("to", "name", "kept"),
    [
        ("unified", "UnifiedNorm", ("γ", "β")),
        ("power", "PowerNorm", ("γ", "β")),
        ("l1", "L1LayerNorm", ("γ", "β")),
        ("rms", "RMSNorm", ("γ",)),
        ("dyt", "DynamicTanh", ("γ", "β")),
        ("derf", "DynamicErf", ("γ", "β")),
        ("batch", "BatchNorm1d", ("γ", "β")),
    ],
)
def test_gamma_and_beta_are_kept(to, name, kept):
    model = randomise_norms(Vit())
    new = convert(model, to)
    assert {s.after for s in swaps(new)} == {name}
    assert {s.kept for s in swaps(new)} == {kept}
    layer = new.norm.norm if to == "batch" else new.norm
    torch.testing.assert_close(layer.weight, model.norm.weight)
    assert layer.weight is not model.norm.weight
    if "β" in kept:
        torch.testing.assert_close(layer.bias, model.norm.bias)
    if to not in ("dyt", "derf", "l1"):
        assert layer.eps == model.norm.eps


@torch.no_grad()
def test_rms_normalizes_by_the_root_mean_square():
    new = convert(nn.LayerNorm(D), "rms")
    x = torch.randn(3, D)
    torch.testing.assert_close(new(x), F.rms_norm(x, (D,), new.weight, 1e-5))
    (swap,) = swaps(new)
    assert "β is dropped" not in swap.note
    (swap,) = swaps(convert(randomise_norms(nn.LayerNorm(D)), "rms"))
    assert "β is dropped" in swap.note


@torch.no_grad()
def test_rms_with_example_inputs_is_lossless():
    model = randomise_norms(Vit()).double().eval()
    x = TOKENS.double()
    new = convert(model, "rms", example_inputs=(x,))
    torch.testing.assert_close(new(x), model(x), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(m, nn.LayerNorm) for m in new.modules())
    assert len(swaps(new)) == 7
    assert all(not s.left and s.kept == ("γ", "β") for s in swaps(new))
    for wrong in ({"to": "l1"}, {"to": "rms", "where": "norm"}, {"to": "rms", "eps": 1.0}):
        with pytest.raises(UsageError, match="lossless"):
            convert(model, example_inputs=(x,), **wrong)


@torch.no_grad()
def test_batch_normalizes_over_tokens():
    new = convert(nn.LayerNorm(D), "batch").train()
    assert isinstance(new, Rows)
    y = new(torch.randn(4, 5, D) * 3 + 1)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(D), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 1), correction=0), torch.ones(D), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(D), lambda: nn.BatchNorm2d(D), lambda: nn.BatchNorm3d(D)])
@torch.no_grad()
def test_l1_batch_norm_is_the_same_function_in_eval(make):
    norm = randomise_norms(make()).double().eval()
    x = torch.randn(3, D, *[2] * {"1d": 0, "2d": 2, "3d": 3}[type(norm).__name__[-2:]]).double()
    new = convert(norm, "l1")
    assert type(new).__name__ == "L1BatchNorm"
    torch.testing.assert_close(new(x), norm(x), rtol=1e-10, atol=1e-10)
    back = convert(new, "batch")
    assert isinstance(back, BatchNormAnyRank)
    torch.testing.assert_close(back(x), norm(x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_channels_in_front_are_normalized_per_position():
    norm, x = randomise_norms(nn.BatchNorm2d(D)).eval(), torch.randn(2, D, 3, 4)
    new = convert(norm, "layer")
    assert isinstance(new, ChannelsLast)
    rows = x.permute(0, 2, 3, 1)
    torch.testing.assert_close(new(x), F.layer_norm(rows, (D,), norm.weight, norm.bias, 1e-5).permute(0, 3, 1, 2))
    assert convert(nn.BatchNorm1d(D), "layer")(torch.randn(5, D)).shape == (5, D)


@torch.no_grad()
def test_our_layers_go_back():
    model = randomise_norms(Vit()).eval()
    for to in ("unified", "power", "l1", "dyt", "derf", "scaled"):
        back = convert(convert(model, to), "layer")
        torch.testing.assert_close(back(TOKENS), model(TOKENS))
    images = randomise_norms(cnn()).eval()
    back = convert(convert(images, "l1"), "batch")
    torch.testing.assert_close(back(IMAGES), images(IMAGES))


# -- scaled ------------------------------------------------------------------------------------------------------------


def depths(model):
    return {p: m.depth for p, m in model.named_modules() if type(m).__name__ == "ScaledNorm"}


@torch.no_grad()
def test_scaled_wraps_pre_norms_by_block():
    model = randomise_norms(Vit()).double().eval()
    new = convert(model, "scaled")
    assert depths(new) == {f"blocks.{i}.norm{k}": i + 1 for i in range(3) for k in (1, 2)}
    x = torch.randn(2, 5, D).double()
    torch.testing.assert_close(new.blocks[2].norm1(x), model.blocks[2].norm1(x) / math.sqrt(3))
    (left,) = [s for s in swaps(new) if s.left]
    assert left.path == "norm"
    assert "final norm" in left.note
    assert depths(convert(model, "scaled", base=4))["blocks.2.norm2"] == 6
    assert new.state_dict().keys() == model.state_dict().keys()


def test_scaled_equals_the_pass_on_the_graph():
    from normfuse.passes.depth_scale import DepthScale

    model = randomise_norms(Vit()).double().eval()
    x = TOKENS.double()
    scaled = normfuse.optimize(convert(model, "scaled"), (x,))
    passed = normfuse.optimize(model, (x,), passes=[DepthScale(), "default"])
    torch.testing.assert_close(scaled(x), passed(x), rtol=1e-9, atol=1e-9)
    assert len(scaled.graph.nodes) == len(passed.graph.nodes) == len(normfuse.optimize(model, (x,)).graph.nodes)


def test_scaled_with_depths():
    new = convert(Vit(), "scaled", depths={"blocks.1": 5, "blocks.1.norm2": 7, "norm": 2})
    assert depths(new) == {"blocks.1.norm1": 5, "blocks.1.norm2": 7, "norm": 2}
    with pytest.raises(UsageError, match=r"did you mean 'blocks\.0\.norm1'"):
        convert(Vit(), "scaled", depths={"blocks.0.nrm1": 1})
    with pytest.raises(UsageError, match="base = 0"):
        convert(Vit(), "scaled", base=0)


def test_scaled_counts_stages_through_and_leaves_inner_norms():
    timm = pytest.importorskip("timm")
    swin = timm.models.SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2))
    found = depths(convert(swin, "scaled"))
    assert found["layers.0.blocks.0.norm1"] == 1
    assert found["layers.1.blocks.1.norm2"] == 3
    assert len(found) == 6
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, qk_norm=True)
    new = convert(vit, "scaled")
    assert len(depths(new)) == 4
    assert {s.path for s in swaps(new) if s.left} == {f"blocks.{i}.attn.{n}_norm" for i in (0, 1) for n in "qk"} | {"norm"}


def test_scaled_refuses_post_norm_and_bare_lists():
    with pytest.raises(UsageError, match="list of norms"):
        convert(nn.ModuleList(nn.LayerNorm(D) for _ in range(3)), "scaled")
    with pytest.raises(UsageError, match="Post-LN"):
        convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), "scaled")


def test_t5_lists_inside_blocks_are_no_blocks():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2)
    found = depths(convert(transformers.T5Model(config), "scaled"))
    assert found["encoder.block.1.layer.1.layer_norm"] == 2
    assert found["decoder.block.2.layer.0.layer_norm"] == 3
    assert len(found) == 2 * 2 + 3 * 3


# -- libraries ---------------------------------------------------------------------------------------------------------


def test_hugging_face_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = randomise_norms(transformers.LlamaForCausalLM(config)).eval()
    new = convert(model, "unified")
    assert len(swaps(new)) == 5
    assert {s.before for s in swaps(new)} == {"LlamaRMSNorm"}
    torch.testing.assert_close(new.model.norm.weight, model.model.norm.weight)
    assert new.model.norm.eps == model.model.norm.variance_epsilon
    assert depths(convert(model, "scaled")) == {
        f"model.layers.{i}.{n}": i + 1 for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")
    }
    loss = new.train()(torch.arange(12).reshape(2, 6), labels=torch.arange(12).reshape(2, 6)).loss
    loss.backward()
    assert bool(loss.isfinite())
    with pytest.raises(UsageError, match="of that kind already"):
        convert(model, "rms")


def test_gemma_stores_the_gain_less_one():
    transformers = pytest.importorskip("transformers")
    norm = randomise_norms(transformers.models.gemma.modeling_gemma.GemmaRMSNorm(D)).eval()
    new = convert(norm, "l1")
    torch.testing.assert_close(new.weight, norm.weight + 1)
    assert "γ holds 1 + the old weight" in swaps(new)[0].note


@torch.no_grad()
def test_timm_classes():
    layers = pytest.importorskip("timm.layers")
    act = randomise_norms(layers.BatchNormAct2d(D)).eval()
    x = torch.randn(2, D, 3, 3)
    new = convert(act, "l1")
    torch.testing.assert_close(new(x), act(x))
    assert float(new(x).min()) == 0.0  # the activation stayed
    torch.testing.assert_close(convert(new, "batch")(x), act(x))
    first = randomise_norms(layers.LayerNorm2d(D)).eval()
    new = convert(first, "l1")
    centered = x - x.mean(1, keepdim=True)
    expected = centered / (math.sqrt(math.pi / 2) * centered.abs().mean(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(new(x), expected * first.weight[:, None, None] + first.bias[:, None, None])
    assert type(convert(first, "dyt")).__name__ == "DynamicTanh"
    assert convert(first, "batch").__class__ is nn.BatchNorm2d
    torch.testing.assert_close(convert(convert(first, "unified"), "layer")(x), first(x))
    evo = convert(act, "evo")
    assert type(evo).__name__ == "EvoNorm2dS0"
    torch.testing.assert_close(convert(layers.LayerNorm(D), "rms")(torch.ones(2, D)), torch.ones(2, D))


def test_timm_resnet_with_batch_channel_norm():
    timm = pytest.importorskip("timm")
    model = randomise_norms(timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, base_width=64))
    new = convert(model, "bcn")
    names = kinds(new)
    assert names.count("BatchChannelNorm") == names.count("WeightStandardizedConv2d") == kinds(model).count("BatchNorm2d")
    torch.testing.assert_close(new.layer1[0].conv1.weight, model.layer1[0].conv1.weight)
    torch.testing.assert_close(new.bn1.pbn.running_var, model.bn1.running_var)
    assert new.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_evo_takes_the_activation_with_it_only_where_it_is_known():
    new = convert(cnn(), "evo", kind="S0")
    assert kinds(new).count("EvoNorm2dS0") == 2
    assert "ReLU" not in kinds(new)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.relu(self.bn(x))

    with pytest.raises(UsageError, match="no activation is known to follow"):
        convert(Functional(), "evo")


# -- what is swapped and how -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("norm", 1),
        ("blocks.*.norm1", 3),
        (["blocks.0.*", "norm"], 3),
        (lambda path, module: path.endswith("2"), 3),
        (lambda path, module: module.eps == 1e-6, 1),
    ],
)
def test_where(where, count):
    new = convert(Vit(), "rms", where)
    assert kinds(new).count("RMSNorm") == count
    assert len(swaps(new)) == count


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: convert(Vit(), "unifed"), "did you mean 'unified'", id="misspelt"),
        pytest.param(lambda: convert(Vit(), "crms"), "one feature less", id="crms"),
        pytest.param(lambda: convert(Vit(), "rms", "blocks.7.norm1"), "matches no norm of the model; did you mean", id="where"),
        pytest.param(lambda: convert(Vit(), "unified", warmup=3), "did you mean 'warmup_iters'", id="option"),
        pytest.param(lambda: convert(nn.Linear(2, 2), "rms"), "the model has no norm", id="no norm"),
        pytest.param(lambda: convert(nn.RMSNorm(4), "rms"), "of that kind already", id="already"),
        pytest.param(lambda: convert(nn.GroupNorm(2, 4), "rms"), "GroupNorm has no counterpart", id="GroupNorm"),
        pytest.param(lambda: convert(nn.LayerNorm((2, 4)), "unified"), "over 2 axes at once", id="two axes"),
        pytest.param(lambda: convert("resnet50", "rms"), "expected a torch.nn.Module", id="no module"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_several_axes_where_the_layer_takes_them():
    norm = randomise_norms(nn.LayerNorm((3, 4)))
    assert convert(norm, "l1").weight.shape == (3, 4)
    assert convert(norm, "rms")(torch.randn(2, 3, 4)).shape == (2, 3, 4)


def test_shared_modules_and_tied_parameters_stay_so():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.LayerNorm(D)
            self.b = self.a
            self.c = nn.LayerNorm(D)
            self.c.weight = self.a.weight
            self.embed, self.head = nn.Embedding(5, D), nn.Linear(D, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return self.head(self.c(self.b(self.a(self.embed(i)))))

    new = convert(Shared(), "rms")
    assert new.a is new.b
    assert isinstance(new.a, nn.RMSNorm)
    assert new.c.weight is new.a.weight
    assert new.head.weight is new.embed.weight
    assert [s.path for s in swaps(new)] == ["a", "c"]


def test_mode_dtype_and_frozen_parameters_are_kept():
    model = Vit().to(torch.bfloat16).eval()
    model.blocks[0].norm1.train()
    model.norm.requires_grad_(False)
    for to in ("unified", "l1", "dyt"):
        new = convert(model, to)
        assert not new.norm.training
        assert new.blocks[0].norm1.training
        assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in new.norm.parameters())
        assert all(p.requires_grad for p in new.blocks[1].norm1.parameters())
    meta = convert(Vit().to("meta"), "unified")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}


@pytest.mark.parametrize("to", ["unified", "power"])
def test_tokens_on_two_axes(to):
    class Window(Vit):
        def forward(self, x):
            x = self.stem(x)
            return self.head(self.norm(x.unflatten(1, (5, 1)))).mean((1, 2))

    losses = trained(new := convert(randomise_norms(Window(0)), to, rows=True), TOKENS)
    assert losses[-1] < losses[0]
    report = normfuse.report(normfuse.optimize(new.eval(), (TOKENS,)))
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    torch.testing.assert_close(convert(new, "layer").norm.weight, new.norm.norm.weight)


def test_rms_norm_with_a_shift_and_without_eps():
    from normfuse.nn.rms_with_bias import RMSNormWithBias

    norm = randomise_norms(RMSNormWithBias(D))
    new = convert(norm, "dyt")
    torch.testing.assert_close(new.bias, norm.bias)


def test_norms_without_affine():
    new = convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)).double(), "l1")
    assert new[1].weight is None
    new = convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)).double(), "unified")
    assert new[1].weight.dtype is torch.float64


def test_hooks_move_and_foreign_ones_stop_the_swap():
    model, seen = Vit(), []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    convert(model, "rms")(TOKENS)
    assert seen == ["RMSNorm"]
    parametrize.register_parametrization(model.norm, "weight", nn.Softplus())
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.blocks[0].norm1)
    new = convert(model, "rms")
    left = {s.path: s.note for s in swaps(new) if s.left}
    assert "parametrized" in left["norm"]
    assert "hook WeightNorm" in left["blocks.0.norm1"]
    assert isinstance(new.blocks[0].norm2, nn.RMSNorm)


def test_a_name_alone_is_no_proof():
    class LlamaRMSNorm(nn.Module):
        """Called so, but divides by the norm and not by the root mean square."""

        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(D)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.norm(dim=-1, keepdim=True) + self.variance_epsilon)

    class WrongEps(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 100 * self.eps)

    new = convert(nn.ModuleList([LlamaRMSNorm(), nn.LayerNorm(D), WrongEps(D)]), "dyt")
    assert [s.after for s in swaps(new)] == ["LlamaRMSNorm", "DynamicTanh", "WrongEps"]
    assert "computes neither" in swaps(new)[0].note


def test_options_reach_the_layers():
    new = convert(Vit(), "dyt", alpha_init=lambda path: 0.25 if path == "norm" else 0.75)
    assert new.norm.alpha.item() == 0.25
    assert new.blocks[0].norm1.alpha.item() == 0.75
    assert convert(Vit(), "unified", window_size=8).norm.buffer_x2.shape[0] == 8
    assert convert(Vit(), "rms", eps=0.5).norm.eps == 0.5


def test_what_was_done_is_told(caplog):
    new = convert(randomise_norms(Vit()), "rms", ["norm", "blocks.0.*"])
    assert all(s.path in caplog.text for s in swaps(new))
    assert str(swaps(new)[-1]).startswith("norm: LayerNorm → RMSNorm, kept γ (")
    lines = str(swaps(new)).splitlines()
    assert lines[0].split() == ["3", "×", "LayerNorm", "→", "RMSNorm,", "kept", "γ"]
    assert max(map(len, lines)) <= 80
    assert swaps(Vit()) == ()
    assert swaps(copy.deepcopy(new)) == swaps(new)
