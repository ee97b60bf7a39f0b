"""A mean-free stream without one of its coordinates: the same function, one feature narrower."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import normfuse
from normfuse.api import DEFAULT
from normfuse.errors import UsageError
from normfuse.nn.crms import CRMSNorm
from normfuse.passes.streams.compress import Compress
from tests.zoo import ZOO, randomise_norms
from tests.zoo_streams import Block, DecoderBlock, PrelnGpt

D = 16


def compressed(model, example, *, index=None, same_width=False, passes=DEFAULT, **options):
    model = randomise_norms(model).eval()
    fast = normfuse.optimize(model, example, passes=[*passes, Compress(index, same_width)], **options)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    return fast, report


def entries(report, name="compress"):
    return next(p for p in report.passes if p.name == name)


def deviation(fast, model, *args, **kwargs):
    """Largest relative error in float64."""
    model, fast = model.double(), fast.double()
    found, expected = (torch.utils._pytree.tree_leaves(m(*args, **kwargs)) for m in (fast, model))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


class Stack(nn.Module):
    """Pre-LN blocks, with something special at one place."""

    def __init__(self, special="", blocks=2):
        super().__init__()
        self.special, self.stem = special, nn.Linear(6, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)
        self.token, self.conv = nn.Parameter(torch.randn(1, 1, D)), nn.Conv1d(D, 4, 3)

    def forward(self, x):
        x = self.stem(x)
        if self.special == "token":
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.special == "nonlinear stem":
            x = torch.tanh(x)
        for block in self.blocks:
            x = block(x)
        if self.special == "reshaped":
            x = x.reshape(-1, D).view(x.shape[0], x.shape[1], 1, D).squeeze(2)
        if self.special == "unflattened":
            x = x.unflatten(-1, (1, D)).squeeze(-2)
        if self.special == "split":
            x = torch.cat(x.split([2, 3], dim=1)[::-1], dim=1)
        y = self.norm(x)
        if self.special == "mean of tokens":
            return self.head(y.mean(dim=1))
        if self.special == "convolution reads":
            return self.conv(y.transpose(1, 2))
        if self.special == "output":
            return self.head(y), x
        if self.special == "normalized output":
            return y
        if self.special == "features joined":
            return torch.cat([y[:, 0], y[:, 1]], dim=-1)
        if self.special == "nonlinear reader":
            return self.head(torch.tanh(y))
        return self.head(y)


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("same_width", [pytest.param(False, id="narrower"), pytest.param(True, id="same width")])
@pytest.mark.parametrize(
    "special", ["", "token", "nonlinear stem", "reshaped", "unflattened", "split", "mean of tokens", "convolution reads"]
)
def test_stream_loses_a_coordinate(special, same_width):
    # a stream of two blocks pays for a centering of its own only if it is long enough
    fast, report = compressed(Stack(special, blocks=4 if "nonlinear" in special else 2), (X,), same_width=same_width)
    done = entries(report)
    assert len(done.applied) == (9 if "nonlinear" in special else 5)
    assert not done.refused
    assert {k: n for k, n in report.norms_after.items() if n}.keys() == {"crms_norm"}
    width = D if same_width else D - 1
    weights = {k: v.shape for k, v in fast.state_dict().items() if k.endswith("blocks.0.attn.q.weight")}
    assert set(weights.values()) == {(D, width)}
    assert all("coordinate" in s.note for s in done.applied)
    assert all(("is zero" if same_width else f"width {D} → {D - 1}; {D - 1} is no multiple of 8") in s.note for s in done.applied)


@pytest.mark.parametrize("same_width", [pytest.param(False, id="narrower"), pytest.param(True, id="same width")])
@pytest.mark.parametrize("index", [0, 7, -1, None])
def test_any_coordinate_will_do(index, same_width):
    fast, report = compressed(PrelnGpt(), ZOO["preln_gpt"].args, index=index, same_width=same_width)
    note = entries(report).applied[0].note
    assert "shared" in note  # the head is tied to the embedding
    if index is not None:
        assert f"coordinate {index % D} " in note
    else:  # the columns of the readers, with γ inside
        model = randomise_norms(PrelnGpt())
        assert fast.state_dict()["wte.weight"].shape == model.wte.weight.shape  # the root is centered, the table stays


@pytest.mark.parametrize("index", [D, -D - 1])
def test_an_index_outside_of_the_stream_is_an_error(index):
    with pytest.raises(UsageError, match="the stream has 16 features"):
        compressed(Stack(), (X,), index=index)


def test_shapes_on_the_nodes_are_those_of_the_values():
    fast, _ = compressed(Stack("split"), (X,))

    class Check(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            known = n.meta.get("val")
            if isinstance(value, torch.Tensor) and n.op == "call_function":
                assert tuple(value.shape) == tuple(known.shape), n
                assert value.dtype == known.dtype
            return value

    Check(fast).run(X)


def test_the_norm_is_crms_norm():
    model = nn.Sequential(nn.Linear(6, D), nn.LayerNorm(D, eps=1e-3), nn.Linear(D, 3)).double()
    fast, _ = compressed(model, (X.double(),), index=4, passes=("cleanup", "expose", "affine", "mean_free", "affine", "realise"))

    class Values(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    values = {}
    Values(fast).run(X.double())
    writer, reader = fast.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert values[writer].shape == (2, 5, D - 1)
    expected = CRMSNorm(D - 1, eps=1e-3)(values[writer])
    assert torch.allclose(values[reader.args[0]], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("same_width", [pytest.param(False, id="narrower"), pytest.param(True, id="same width")])
def test_before_the_affines_are_realised(same_width):
    early = ("cleanup", "expose", "affine", "mean_free", "affine")
    entry = ZOO["preln_gpt"]  # the γ and β of its last norm are still an affine
    _, report = compressed(entry.build(), entry.args, passes=early, same_width=same_width)
    assert len(entries(report).applied) == 5


@pytest.mark.parametrize(
    ("special", "reason"),
    [
        pytest.param("normalized output", "the result of norm is an output of the model", id="normalized output"),
        pytest.param("features joined", "reads all of its features", id="features joined"),
        pytest.param("nonlinear reader", "reads all of its features", id="nonlinear reader"),
        pytest.param("output", "it is a LayerNorm", id="the stream is an output"),
    ],
)
def test_refusals(special, reason):
    fast, report = compressed(Stack(special), (X,))
    done = entries(report)
    assert not done.applied
    assert len(done.refused) == 5
    assert all(reason in s.note for s in done.refused)
    assert fast.state_dict()["blocks.0.attn.q.weight"].shape == (D, D)


def test_a_mean_free_stream_that_is_an_output_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(6, D), nn.RMSNorm(D), nn.Linear(D, 3)
            with torch.no_grad():
                self.stem.weight -= self.stem.weight.mean(0)
                self.stem.bias -= self.stem.bias.mean()

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.norm(x)), x

    torch.set_default_dtype(torch.float64)
    try:
        _, report = compressed(Model(), (X.double(),))
    finally:
        torch.set_default_dtype(torch.float32)
    assert [s.note for s in entries(report).refused] == ["the stream is an output of the model"]


@pytest.mark.parametrize("name", ["llama_rms", "rms_eps_none"])
def test_a_stream_with_a_mean_is_refused(name):
    entry = ZOO[name]
    report = normfuse.report(normfuse.optimize(entry.build(), entry.args, passes=[*DEFAULT, Compress()]))
    done = entries(report)
    assert not done.applied
    assert {s.note.partition("(")[0] for s in done.refused} == {"embed.weight has a mean over its features "}
    assert not done.refused[0].remedy


def test_rounded_weights_are_refused_with_a_remedy():
    model = randomise_norms(Stack()).eval()
    again = normfuse.optimize(normfuse.optimize(model, (X,)), passes=[Compress()])
    refused = normfuse.report(again).refused
    assert len(refused) == 5
    assert all("has a mean over its features" in s.note and "in one call" in s.remedy for s in refused)


def test_post_ln_is_refused():
    entry = ZOO["postln_bert"]
    report = normfuse.report(normfuse.optimize(entry.build(), entry.args, passes=[*DEFAULT, Compress()]))
    assert len(entries(report).refused) == 5
    assert not entries(report).applied


def test_post_rms_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(6, D), nn.Linear(D, 3)
            self.lins, self.norms = (nn.ModuleList(f() for _ in range(2)) for f in (lambda: nn.Linear(D, D), lambda: nn.RMSNorm(D)))

        def forward(self, x):
            x = self.stem(x)
            for lin, norm in zip(self.lins, self.norms, strict=True):
                x = norm(x + lin(x))
            return self.head(x)

    _, report = compressed(Model(), (X,))
    assert not entries(report).applied
    assert len(entries(report).refused) == 2


def test_without_shapes_the_width_is_unknown():
    model = nn.Sequential(nn.Linear(6, D), nn.RMSNorm(D), nn.Linear(D, 3)).eval()
    report = normfuse.report(normfuse.optimize(model, passes=[*DEFAULT, Compress()]))
    (site,) = entries(report).refused
    assert (site.note, site.remedy) == ("shape unknown", "pass example_inputs")


def test_a_writer_shared_with_a_reader_of_another_value_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(6, D, bias=False).double(), nn.RMSNorm(D), nn.Linear(D, 3)
            with torch.no_grad():
                self.stem.weight -= self.stem.weight.mean(0)

        def forward(self, x):
            return self.head(self.norm(self.stem(x))) + torch.tanh(self.stem(torch.sin(x)))[..., :3]

    model = Model().double().eval()
    report = normfuse.report(normfuse.optimize(model, (X.double(),), passes=["cleanup", "expose", "affine", "realise", Compress()]))
    assert ["shared with stem" in s.note for s in entries(report).refused] == [True]


class Translator(nn.Module):
    """Pre-LN encoder and decoder; cross-attention reads the encoder through its final norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.source = nn.Embedding(23, D), nn.Linear(6, D)
        self.encoder, self.decoder = (nn.ModuleList(f(D) for _ in range(2)) for f in (Block, DecoderBlock))
        self.encoder_norm, self.decoder_norm, self.head = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 23)

    def forward(self, x, ids):
        memory, y = self.source(x), self.embed(ids)
        for block in self.encoder:
            memory = block(memory)
        memory = self.encoder_norm(memory)
        for block in self.decoder:
            y = block(y, memory)
        return self.head(self.decoder_norm(y))


def test_encoder_and_decoder_are_two_streams():
    ids = torch.randint(0, 23, (2, 7))
    model = Translator()
    fast, report = compressed(model, (X, ids))
    assert len(entries(report).applied) == 12
    assert len({s.note for s in entries(report).applied}) == 2 or "coordinate" in entries(report).applied[0].note
    assert fast.state_dict()["decoder.0.cross.k.weight"].shape == (D, D - 1)


def test_dynamic_batch():
    model = Stack("token")
    fast, report = compressed(model, (X,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    assert len(entries(report).applied) == 5
    big = torch.randn(7, 5, 6)
    assert torch.allclose(fast(big), model(big), atol=1e-4)


def test_idempotent():
    model = Stack()
    fast, _ = compressed(model, (X,))
    again = normfuse.optimize(fast, passes=[Compress()])
    assert not normfuse.report(again).applied
    assert torch.equal(again(X), fast(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    model = randomise_norms(Stack()).to(dtype).eval()
    x = X.to(dtype)
    fast = normfuse.optimize(model, (x,), passes=[*DEFAULT, Compress()])
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert len(entries(report).applied) == 5
    assert fast(x).dtype == dtype
    assert report.drift.max_rel < 0.1


@pytest.mark.slow
def test_timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=3, num_classes=5, init_values=0.1
    )
    fast, report = compressed(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=({0: Dim("batch", max=64)},))
    assert len(entries(report).applied) == 7
    assert not entries(report).refused
    assert fast.state_dict()["blocks.0.attn.qkv.weight"].shape == (72, 23)
    assert fast.state_dict()["blocks.0.attn.proj.weight"].shape == (23, 24)
    assert fast.state_dict()["patch_embed.proj.weight"].shape[0] == 23


@pytest.mark.slow
def test_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=24, n_head=3, vocab_size=31, n_positions=16, use_cache=False)
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 31, (2, 9))
    fast, report = compressed(model, {"input_ids": ids})
    assert len(entries(report).applied) == 7
    assert "shared" in entries(report).applied[0].note
    assert fast.state_dict()["transformer.h.0.attn.c_attn.weight"].shape == (23, 72)


def test_gradients_follow_the_chain_rule():
    """What the narrow model gets is Eᵀ ∂W for a writer W, and the columns of ∂W without one for a reader."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Linear(6, D), nn.Linear(D, D)
            self.norm, self.last = (nn.LayerNorm(D, elementwise_affine=False) for _ in range(2))
            self.head = nn.Linear(D, 3)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.fc(self.norm(x))
            return self.head(self.last(x))

    model = Model().double().eval()
    k, x = 5, X.double()
    fast = normfuse.optimize(model, (x,), passes=[*DEFAULT, Compress(k)])
    assert len(entries(normfuse.report(fast)).applied) == 2
    for p in fast.parameters():
        p.requires_grad_(True)
    target = torch.randn(2, 5, 3, dtype=torch.float64)
    for m in (model, fast):
        torch.nn.functional.mse_loss(m(x), target).backward()
    keep = [i for i in range(D) if i != k]
    drop = torch.eye(D, dtype=torch.float64)[keep]  # D (d − 1, d)
    centre = torch.eye(D, dtype=torch.float64) - 1 / D
    restore = drop.T - torch.eye(D, dtype=torch.float64)[:, [k]]  # E (d, d − 1)
    grads = {n: p.grad for n, p in fast.named_parameters()}
    # writers: W' = D P W, so that ∂W = Pᵀ Dᵀ ∂W'
    for name in ("stem.weight", "stem.bias"):
        expected = model.get_parameter(name).grad
        assert torch.allclose(centre @ drop.T @ grads[name], expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
        # and the other way round: what the narrow model gets is Eᵀ ∂W
        assert torch.allclose(restore.T @ expected, grads[name], rtol=0, atol=1e-9)
    # readers: W' = W E sees x̂ only, whose gradient is the first d − 1 columns of that of W, since x is mean-free
    expected = model.head.weight.grad
    assert torch.allclose(grads["head.weight"], expected[:, keep], rtol=0, atol=1e-9 * float(expected.abs().max()))
    # the middle layer reads and writes: W' = D P W E
    expected = model.fc.weight.grad
    found = centre @ drop.T @ grads["fc.weight"]
    assert torch.allclose(found, expected[:, keep], rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_the_report_counts_norms_that_are_arithmetic_now():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 2)).eval()
    report = normfuse.report(normfuse.optimize(model, (torch.randn(3, 4),), passes=["default", "compress"]))
    assert {k: n for k, n in report.norms_after.items() if n} == {"crms_norm": 1}
    assert any("15 is no multiple of 8" in note for note in report.notes)
