"""LayerNorm Scaling: which norms are scaled by which factor, that the result is the formula, and that it costs nothing."""

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.errors import UsageError
from normfuse.passes.depth_scale import DepthScale
from normfuse.passes.recognise import Recognise
from tests.zoo import randomise_norms
from tests.zoo_streams import Attention

pytestmark = pytest.mark.slow

D = 16


class Scaled(nn.Module):
    """The formula itself: what a reference model has in the place of a pre-norm."""

    def __init__(self, norm, depth):
        super().__init__()
        self.norm, self.factor = norm, 1 / math.sqrt(depth)

    def forward(self, x):
        return self.norm(x) * self.factor


def mlp(d=D):
    return nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


class Block(nn.Module):
    def __init__(self, make, parts="am", d=D):
        super().__init__()
        self.norms = nn.ModuleDict({f"n{i}": make(d) for i in range(len(parts))})
        self.parts = nn.ModuleList(Attention(d) if p in "ac" else mlp(d) for p in parts)
        self.kinds = parts

    def forward(self, x, memory=None):
        for kind, norm, part in zip(self.kinds, self.norms.values(), self.parts, strict=True):
            x = x + (part(norm(x), memory) if kind == "c" else part(norm(x)))
        return x


class Parallel(nn.Module):
    """x + A(N x) + M(N x), as in GPT-J and PaLM."""

    def __init__(self, make, d=D):
        super().__init__()
        self.norm, self.attn, self.mlp = make(d), Attention(d), mlp(d)

    def forward(self, x):
        y = self.norm(x)
        return self.attn(y) + self.mlp(y) + x


class Model(nn.Module):
    def __init__(self, block, make, depth=4):
        super().__init__()
        self.stem, self.layers = nn.Linear(6, D), nn.ModuleList(block(make) for _ in range(depth))
        self.norm, self.head = make(D), nn.Linear(D, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def layer_norm(d):
    return nn.LayerNorm(d)


def rms_norm(d):
    return nn.RMSNorm(d, eps=1e-6)


def scaled(model, depth_of):
    """A copy of the model with explicit factors: the reference."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        depth = depth_of(path) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None
        if depth is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Scaled(module, depth))
    return model


def by_list_index(path):
    numbers = [int(p) for p in path.split(".") if p.isdecimal()]
    return numbers[0] + 1 if numbers else None


def check(model, x, depth_of, scale=None, passes=("default",)):
    """The pass, then the pipeline: the function of the reference, with the operators of the plain model."""
    model = randomise_norms(model).double().eval()
    scale = DepthScale() if scale is None else scale
    fast = normfuse.optimize(model, x, passes=["cleanup", scale, *passes])
    with torch.no_grad():
        expected, found, unscaled = scaled(model, depth_of)(*x), fast(*x), model(*x)
    assert float((expected - found).abs().max() / expected.abs().max()) <= 1e-9
    assert float((expected - unscaled).abs().max() / expected.abs().max()) > 1e-3
    plain = normfuse.optimize(model, x, passes=["cleanup", *passes])
    assert operators(fast) == operators(plain)
    report = normfuse.report(fast)
    assert not report.undone
    return {s.path: s.note for s in report.applied if s.rule == "scale_by_depth"}


def operators(gm):
    return Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_function")


X = (torch.randn(2, 5, 6, dtype=torch.float64),)


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
@pytest.mark.parametrize("block", [Block, Parallel])
def test_pre_norm_models_equal_the_formula_at_no_cost(make, block):
    notes = check(Model(block, make), X, by_list_index)
    assert len(notes) == (8 if block is Block else 4)
    assert "norm" not in notes
    depths = [n.split(":")[0] for n in notes.values()]
    assert depths == [f"ℓ = {i}" for i in range(1, 5) for _ in range(2 if block is Block else 1)]


def test_factors_are_the_oracle():
    notes = check(Model(Parallel, rms_norm), X, by_list_index)
    assert [n.split("× ")[1] for n in notes.values()] == ["1", "0.707107", "0.57735", "0.5"]


def test_base_shifts_the_count():
    notes = check(
        Model(Parallel, rms_norm), X, lambda p: None if by_list_index(p) is None else by_list_index(p) + 2, DepthScale(base=3)
    )
    assert [n.split(":")[0] for n in notes.values()] == ["ℓ = 3", "ℓ = 4", "ℓ = 5", "ℓ = 6"]


def test_also_after_expose():
    model = randomise_norms(Model(Block, layer_norm)).double().eval()
    fast = normfuse.optimize(model, X, passes=["cleanup", "expose", DepthScale(), "affine", "mean_free", "affine", "realise"])
    torch.testing.assert_close(fast(*X), scaled(model, by_list_index)(*X), rtol=1e-9, atol=1e-9)


def test_a_shift_that_has_left_its_norm_is_not_forgotten():
    model = randomise_norms(Model(Block, layer_norm)).double().eval()
    report = normfuse.report(normfuse.optimize(model, X, passes=["expose", "affine", DepthScale(), "realise"]))
    assert not [s for s in report.applied if s.rule == "scale_by_depth"]
    assert {s.remedy for s in report.refused if s.rule == "scale_by_depth"} == {"put depth_scale before affine"}


def test_alone_it_scales_behind_gamma_and_beta():
    model = randomise_norms(Model(Block, layer_norm)).double().eval()
    fast = normfuse.optimize(model, X, passes=[DepthScale()])
    torch.testing.assert_close(fast(*X), scaled(model, by_list_index)(*X), rtol=1e-9, atol=1e-9)


def test_it_is_reported_as_a_change():
    model = randomise_norms(Model(Block, layer_norm)).eval()
    report = normfuse.report(normfuse.optimize(model, (X[0].float(),), passes=[DepthScale(), "default"]))
    assert any("multiplies the output of every pre-norm in block ℓ by 1/√ℓ" in n for n in report.notes)
    assert report.exact.max_rel <= 1e-9  # the passes after it are identities


def test_without_example_inputs():
    class Plain(nn.Module):  # control flow that the shape-free tracer can follow
        def __init__(self):
            super().__init__()
            self.stem, self.norms = nn.Linear(6, D), nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
            self.mlps, self.norm, self.head = nn.ModuleList(mlp() for _ in range(3)), nn.LayerNorm(D), nn.Linear(D, 3)

        def forward(self, x):
            x = self.stem(x)
            for norm, part in zip(self.norms, self.mlps, strict=True):
                x = x + part(norm(x))
            return self.head(self.norm(x))

    model = randomise_norms(Plain()).double().eval()
    fast = normfuse.optimize(model, passes=[DepthScale(), "default"])
    torch.testing.assert_close(fast(*X), scaled(model, by_list_index)(*X), rtol=1e-9, atol=1e-9)


# -- counting ----------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """One attention and one MLP used again and again: no list index anywhere, only the structure counts."""

    def __init__(self, times=3):
        super().__init__()
        self.stem, self.block, self.times = nn.Linear(6, D), Block(layer_norm), times
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x, factors=None):
        x = self.stem(x)
        for i in range(self.times):
            f = 1.0 if factors is None else factors[i]
            a, m = self.block.norms.values()
            x = x + self.block.parts[0](a(x) * f)
            x = x + self.block.parts[1](m(x) * f)
        return self.head(self.norm(x))


def test_structure_counts_where_paths_do_not():
    model = randomise_norms(Functional()).double().eval()
    fast = normfuse.optimize(model, X, passes=[DepthScale(), "default"])
    torch.testing.assert_close(fast(*X), model(X[0], [1, 2**-0.5, 3**-0.5]), rtol=1e-9, atol=1e-9)


class Coder(nn.Module):
    """Encoder and decoder with cross-attention: each counts its own blocks."""

    def __init__(self, make=layer_norm):
        super().__init__()
        self.source, self.target = nn.Linear(6, D), nn.Linear(6, D)
        self.encoder = nn.ModuleList(Block(make) for _ in range(3))
        self.decoder = nn.ModuleList(Block(make, "acm") for _ in range(2))
        self.enc_norm, self.dec_norm, self.head = make(D), make(D), nn.Linear(D, 3)

    def forward(self, x, y):
        memory = self.source(x)
        for block in self.encoder:
            memory = block(memory)
        memory, y = self.enc_norm(memory), self.target(y)
        for block in self.decoder:
            y = block(y, memory)
        return self.head(self.dec_norm(y))


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
def test_encoder_and_decoder_count_their_own_blocks(make):
    notes = check(Coder(make), (X[0], torch.randn(2, 4, 6, dtype=torch.float64)), by_list_index)
    assert len(notes) == 3 * 2 + 2 * 3
    assert notes["decoder.0.norms.n0"].startswith("ℓ = 1:")
    assert notes["encoder.2.norms.n1"].startswith("ℓ = 3:")


class Macaron(Model):
    """Half an MLP, attention, half an MLP: only the paths say where a block begins."""

    def __init__(self, make=layer_norm):
        super().__init__(lambda m: Block(m, "mam"), make, 3)


def test_paths_count_where_the_structure_is_open():
    notes = check(Macaron(), X, by_list_index)
    assert [n.split(":")[0] for n in notes.values()] == [f"ℓ = {i}" for i in (1, 2, 3) for _ in range(3)]


class Stages(nn.Module):
    """Two stages of two blocks, the second half as long: blocks are counted through."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Linear(6, D), nn.Linear(D, D)
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList(Block(layer_norm) for _ in range(2))}) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x):
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = self.down(x) if i else x
            for block in stage["blocks"]:
                x = block(x)
        return self.head(self.norm(x))


def test_stages_are_counted_through():
    def depth(path):
        numbers = [int(p) for p in path.split(".") if p.isdecimal()]
        return 2 * numbers[0] + numbers[1] + 1 if numbers else None

    notes = check(Stages(), X, depth)
    assert notes["stages.1.blocks.1.norms.n1"].startswith("ℓ = 4:")


# -- refusals ----------------------------------------------------------------------------------------------------------


class PostNorm(Model):
    def __init__(self):
        super().__init__(lambda make: nn.Identity(), layer_norm, 1)
        self.parts, self.after = nn.ModuleList(mlp() for _ in range(2)), nn.ModuleList(nn.LayerNorm(D) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for part, norm in zip(self.parts, self.after, strict=True):
            x = norm(x + part(x))
        return self.head(x)


class MlpOnly(nn.Module):
    """Two kinds of branches, no attention, no paths."""

    def __init__(self):
        super().__init__()
        self.stem, self.n, self.m, self.a, self.b = nn.Linear(6, D), nn.LayerNorm(D), nn.LayerNorm(D), mlp(), mlp()

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = x + self.a(self.n(x))
            x = x + self.b(self.m(x))
        return x


class Contradiction(Model):
    """List index 0 holds two blocks, 1 holds one: paths and structure disagree."""

    def __init__(self):
        super().__init__(lambda make: nn.Identity(), layer_norm, 1)
        self.layers = nn.ModuleList([Block(layer_norm, "amam"), Block(layer_norm, "am")])


class Fork(nn.Module):
    """One trunk, two branches of blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.trunk = nn.Linear(6, D), Block(layer_norm)
        self.left, self.right = Block(layer_norm), Block(layer_norm)

    def forward(self, x):
        x = self.trunk(self.stem(x))
        return self.left(x), self.right(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        pytest.param(PostNorm, "no pre-norm found", id="Post-LN"),
        pytest.param(MlpOnly, "neither module paths nor attention show", id="nothing tells the blocks"),
        pytest.param(Contradiction, "disagree on which norms form a block", id="paths against structure"),
        pytest.param(Fork, "splits in two", id="two branches"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_left_alone(model, reason):
    model = randomise_norms(model()).eval()
    x = X[0].float()
    fast = normfuse.optimize(model, (x,), passes=[DepthScale()])
    (site,) = [s for s in normfuse.report(fast).refused if s.rule == "scale_by_depth"]
    assert reason in site.note
    assert "where=" in site.remedy
    torch.testing.assert_close(fast(x), model(x))


def test_a_model_that_carries_the_factor_is_not_scaled_twice():
    model = scaled(randomise_norms(Model(Parallel, rms_norm)).double().eval(), by_list_index)
    report = normfuse.report(normfuse.optimize(model, X, passes=["cleanup", DepthScale()]))
    assert [s.note for s in report.refused] == [f"its result is multiplied by 1/√{i} already" for i in (2, 3, 4)]


def test_norms_that_are_no_pre_norms_stay():
    class Extra(Parallel):
        """A norm of the embedding, of the queries and behind the branch."""

        def __init__(self, make):
            super().__init__(make)
            self.inner, self.behind = make(D), make(D)

        def forward(self, x):
            y = self.norm(x)
            return x + self.behind(self.mlp[2](F.gelu(self.mlp[0](self.inner(self.attn(y))))))

    notes = check(Model(Extra, layer_norm), X, lambda p: by_list_index(p) if p.endswith(".norm") else None)
    assert len(notes) == 4


# -- where= ------------------------------------------------------------------------------------------------------------


def test_where_a_mapping_names_norms_or_modules_around_pre_norms():
    where = {"layers.0": 2, "layers.3.norms.n1": 7, "layers.3": 5, "norm": 9}
    depth = {"layers.0.norms.n0": 2, "layers.0.norms.n1": 2, "layers.3.norms.n0": 5, "layers.3.norms.n1": 7, "norm": 9}
    assert set(check(Model(Block, layer_norm), X, depth.get, DepthScale(where=where))) == set(depth)


def test_where_a_function_of_the_path():
    def where(path):
        return 4 if path.endswith("n1") else None

    assert len(check(Model(Block, layer_norm), X, where, DepthScale(where=where))) == 4


def test_where_does_not_need_an_order():
    model = randomise_norms(Fork()).double().eval()
    fast = normfuse.optimize(model, X, passes=[DepthScale(where={"trunk": 1, "left": 2, "right": 3}), "default"])
    reference = scaled(model, lambda p: {"trunk": 1, "left": 2, "right": 3}[p.split(".")[0]])
    for found, expected in zip(fast(*X), reference(*X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_where_decides_what_the_graph_does_not():
    model = randomise_norms(MlpOnly()).double().eval()
    report = normfuse.report(normfuse.optimize(model, X, passes=[DepthScale(where={"n": 1, "m": 2})]))
    assert not report.refused
    assert len(report.applied) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 0}, "base = 0: expected a whole number from 1 on"),
        ({"base": 1.5}, "base = 1.5"),
        ({"where": {"layers.0.norms.n0": 0}}, r"where\['layers.0.norms.n0'\] = 0"),
        ({"where": {"layers.0.norms.nO": 2}}, "did you mean 'layers.0.norms.n"),
        ({"where": {"stem": 2}}, "'stem' is no LayerNorm"),
        ({"where": lambda path: -1}, "expected a whole number"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        normfuse.optimize(Model(Block, layer_norm).double().eval(), X, passes=[DepthScale(**options)])


# -- real architectures ------------------------------------------------------------------------------------------------


def test_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=31, n_positions=12)
    model = randomise_norms(transformers.GPT2LMHeadModel(config)).double().eval()
    ids = torch.arange(10).reshape(2, 5)
    fast = normfuse.optimize(model, {"input_ids": ids}, passes=["cleanup", DepthScale(), "default"])
    reference = scaled(model, by_list_index)
    torch.testing.assert_close(fast(input_ids=ids).logits, reference(ids).logits, rtol=1e-9, atol=1e-9)
    notes = {s.path: s.note for s in normfuse.report(fast).applied if s.rule == "scale_by_depth"}
    assert len(notes) == 8
    assert notes["transformer.h.3.ln_2"].startswith("ℓ = 4:")


def test_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = randomise_norms(transformers.LlamaForCausalLM(config)).eval()
    ids = torch.arange(10).reshape(2, 5)
    fast = normfuse.optimize(model, {"input_ids": ids}, passes=["cleanup", Recognise(), DepthScale(), "default"])
    report = normfuse.report(fast)
    notes = {s.path: s.note for s in report.applied if s.rule == "scale_by_depth"}
    assert len(notes) == 8
    assert notes["model.layers.2.post_attention_layernorm"] == "ℓ = 3: × 0.57735"
    assert not report.undone
    reference = copy.deepcopy(model)
    for i, layer in enumerate(reference.model.layers):
        layer.input_layernorm = Scaled(layer.input_layernorm, i + 1)
        layer.post_attention_layernorm = Scaled(layer.post_attention_layernorm, i + 1)
    with torch.no_grad():  # its norms compute in float32 whatever they are given
        torch.testing.assert_close(fast(input_ids=ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
    plain = normfuse.optimize(model, {"input_ids": ids}, passes=["cleanup", Recognise(), "default"])
    assert operators(fast) == operators(plain)


class ByHand(nn.Module):
    """A LayerNorm in arithmetic: its β stands behind the recognised core."""

    def __init__(self, d=D):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


@pytest.mark.parametrize("middle", [(), ("expose",)], ids=["recognised", "exposed"])
def test_a_norm_written_by_hand_is_scaled_with_its_shift(middle):
    model = Model(Block, lambda d: ByHand(d))
    for norm in (m for m in model.modules() if isinstance(m, ByHand)):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    model = model.double().eval()
    fast = normfuse.optimize(model, X, passes=["cleanup", Recognise(), *middle, DepthScale(), "default"])
    reference = copy.deepcopy(model)
    for i, layer in enumerate(reference.layers):
        layer.norms = nn.ModuleDict({k: Scaled(n, i + 1) for k, n in layer.norms.items()})
    torch.testing.assert_close(fast(*X), reference(*X), rtol=1e-9, atol=1e-9)


def test_timm_vit_and_swin():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=4, num_heads=2, num_classes=5)
    notes = check(vit, (torch.randn(2, 3, 16, 16, dtype=torch.float64),), by_list_index)
    assert len(notes) == 8
    swin = timm.models.SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2))
    swin = randomise_norms(swin).eval()
    report = normfuse.report(normfuse.optimize(swin, (torch.randn(1, 3, 32, 32),), passes=["cleanup", DepthScale()]))
    notes = {s.path: s.note.split(":")[0] for s in report.applied if s.rule == "scale_by_depth"}
    assert list(notes.values()) == ["ℓ = 1", "ℓ = 1", "ℓ = 2", "ℓ = 2", "ℓ = 3", "ℓ = 3"]


def test_t5_and_whisper_like_names():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, vocab_size=40, num_mel_bins=8, max_source_positions=10, max_target_positions=12, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = randomise_norms(transformers.WhisperModel(config)).eval()
    inputs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.arange(4)[None]}
    report = normfuse.report(normfuse.optimize(model, inputs, passes=["cleanup", DepthScale()]))
    notes = {s.path: s.note.split(":")[0] for s in report.applied if s.rule == "scale_by_depth"}
    assert len(notes) == 2 * 2 + 3 * 3
    assert notes["decoder.layers.2.encoder_attn_layer_norm"] == "ℓ = 3"
    assert notes["encoder.layers.1.final_layer_norm"] == "ℓ = 2"
