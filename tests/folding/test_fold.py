"""`normfuse.fold`: a copy with the same classes and less in it, and what it leaves alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import normfuse
from normfuse.app.random_norms import randomise_norms
from normfuse.errors import CaptureError, UsageError
from tests.tolerances import IDENTITY, TOLERANCES

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def folded(model, inputs=(IMAGE,), **options):
    """The copy, once it is the model, the model is as it was, and the report says so."""
    randomise_norms(model, seed=0).eval()
    before = copy.deepcopy(model.state_dict())
    copied = normfuse.fold(model, inputs, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(copied(*inputs), model(*inputs), rtol=0, atol=float(model(*inputs).abs().max()) * 2**-15)
    if options.get("verify") != "off":
        assert normfuse.report(copied).exact.max_rel <= IDENTITY
    copy.deepcopy(copied).load_state_dict(copied.state_dict())
    return copied


def classes(model):
    return [type(m).__name__ for m in model.modules() if not list(m.children())]


def reasons(model):
    return " | ".join(s.note for s in (*normfuse.report(model).refused, *normfuse.report(model).undone))


class Functional(nn.Module):
    """A BatchNorm whose values another forward uses."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias)


class Twice(nn.Module):
    """Two norms of one convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.a(self.conv(x)) - self.b(self.conv(x))


class Tied(nn.Module):
    """A weight that is read again behind the norm, or only belongs to another layer too."""

    def __init__(self, read=True):
        super().__init__()
        self.first, self.norm, self.last, self.read = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), read
        self.last.weight = self.first.weight

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.last(x) if self.read else x


class Odd(nn.Module):
    """Pads in front of the norm at odd sizes only, which the example does not have."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(F.pad(x, (0, 1)) if x.shape[-1] % 2 else x)


class ResponseNorm(nn.Module):
    """A gain and a shift in the code, on something that takes neither (the GRN of ConvNeXt V2)."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(3, 1, 1) + 0.5), nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        return self.gain * (x * x.norm(dim=(2, 3), keepdim=True)) + self.shift + x


class Asking(nn.Module):
    """Reads an attribute that nn.Identity does not have."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.num_features


class PreNorm(nn.Module):
    """Two LayerNorms on a stream, gains and shifts of which have a place to go."""

    def __init__(self, d=16):
        super().__init__()
        self.start, self.norm1, self.mlp = nn.Linear(8, d), nn.LayerNorm(d), nn.Linear(d, d)
        self.norm2, self.head = nn.LayerNorm(d), nn.Linear(d, 3, bias=False)

    def forward(self, x):
        x = self.start(x)
        return self.head(self.norm2(x + self.mlp(self.norm1(x))))


class Branches(nn.Module):
    """A BatchNorm of the value that convolutions beside it read, added or subtracted."""

    def __init__(self, sign=1, groups=3):
        super().__init__()
        self.conv, self.sign = nn.Conv2d(3, 3, 3, padding=1, groups=groups, bias=False), sign
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        a, b, c = self.norms
        x = x.relu()
        return a(self.conv(x)) + self.sign * b(x) if self.sign > 0 else c(x) - (a(self.conv(x)) - b(x))


class Gained(nn.Module):
    """A branch whose result the forward multiplies by a parameter of its own."""

    def __init__(self, d=16):
        super().__init__()
        self.start, self.norm, self.mlp, self.last = nn.Linear(8, d), nn.LayerNorm(d), nn.Linear(d, d), nn.LayerNorm(d)
        self.gain, self.head = nn.Parameter(torch.rand(d) + 0.5), nn.Linear(d, 3)

    def forward(self, x):
        x = self.start(x)
        x = x + self.gain * self.mlp(self.norm(x))
        return self.head(self.last(x)), x


# -- what becomes less -------------------------------------------------------------------------------------------------


def test_batch_norm_is_an_identity_and_its_shift_a_bias():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    made = folded(model)
    assert classes(made) == ["Conv2d", "Identity", "ReLU"]
    assert sorted(made.state_dict()) == ["0.bias", "0.weight"]
    assert normfuse.report(made).norms_after == {"batch_norm": 0}
    assert normfuse.report(made).applied[0].note == "BatchNorm2d is nn.Identity; into 0"


@pytest.mark.parametrize("size", [7, 8, 13])
def test_copy_takes_every_size_that_the_model_takes(size):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    made, x = folded(model), torch.randn(5, 3, size, size)
    torch.testing.assert_close(made(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), id="down"),
        pytest.param(lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2, bias=False), nn.BatchNorm2d(8)), id="transposed"),
        pytest.param(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double(), id="float64"),
        pytest.param(lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), id="graph"),
    ],
)
def test_batch_norms_go(model):
    model = model()
    dtype = next(model.parameters()).dtype
    made = folded(model, (IMAGE.to(dtype),))
    assert isinstance(made, torch.fx.GraphModule) is isinstance(model, torch.fx.GraphModule)
    assert "BatchNorm2d" not in classes(made)


def test_layer_norms_are_rms_norms():
    made = folded(PreNorm(), (torch.randn(4, 5, 8),))
    assert classes(made) == ["Linear", "RMSNorm", "Linear", "RMSNorm", "Linear"]
    assert made.norm1.weight is None
    assert made.head.bias is not None


def test_frozen_batch_norm_and_norm_with_activation():
    torchvision, layers = pytest.importorskip("torchvision"), pytest.importorskip("timm.layers")
    made = folded(nn.Sequential(nn.Conv2d(3, 8, 3), torchvision.ops.FrozenBatchNorm2d(8), layers.ConvNormAct(8, 4, 3)))
    assert classes(made) == ["Conv2d", "Identity", "Conv2d", "ReLU"]
    assert isinstance(made[2].bn.act, nn.ReLU)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("groups", [1, 3])
def test_batch_norms_beside_a_convolution_are_identities(sign, groups):
    """Nothing can become one convolution in a copy; the convolution takes s − 1, and the value itself is added."""
    made = folded(Branches(sign, groups))
    assert [type(n).__name__ for n in made.norms] == ["Identity"] * 2 + ["BatchNorm2d" if sign > 0 else "Identity"]


def test_gain_in_the_code_is_one_where_that_lets_norms_become_rms_norms():
    class Whole(Gained):
        def forward(self, x):
            return super().forward(x)[0]

    made = folded(Whole(), (torch.randn(4, 5, 8),))
    assert isinstance(made.last, nn.RMSNorm)
    assert bool((made.gain == 1).all())


def test_gain_in_the_code_stays_where_nothing_comes_of_it():
    model = randomise_norms(Gained(), seed=0).eval()
    made = normfuse.fold(model, (torch.randn(4, 5, 8),))
    assert isinstance(made.last, nn.LayerNorm)  # the stream is an output
    assert torch.equal(made.gain, model.gain)
    assert "it would stay, as a multiplication by one" in reasons(made)


def test_without_inputs_nothing_is_proven():
    model = randomise_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), seed=0).eval()
    made = normfuse.fold(model)
    torch.testing.assert_close(made(IMAGE), model(IMAGE), rtol=0, atol=1e-5)
    assert classes(made) == ["Conv2d", "Identity"]
    assert "not verified" in normfuse.report(made).notes[0]


class TwoViews(nn.Module):
    """One encoder for two inputs of different sizes."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x):
        return torch.cat([self.head(self.encoder(x)), self.head(self.encoder(x[..., 2:]))], -1)


def test_modules_that_are_called_more_than_once_are_folded_on_their_own():
    made = folded(TwoViews())
    assert classes(made) == ["Conv2d", "Identity", "ReLU", "Conv2d", "Identity"]
    assert {s.path for s in normfuse.report(made).applied} == {"encoder.1", "head.1"}
    assert normfuse.report(made).norms_before == {"batch_norm": 4}


def test_shared_module_stays_where_its_weight_is_read_elsewhere():
    class Reading(TwoViews):
        def __init__(self):
            super().__init__()
            self.again = nn.Conv2d(3, 4, 3, bias=False)
            self.again.weight = self.encoder[0].weight

        def forward(self, x):
            return super().forward(x) + self.again(x).mean()

    made = folded(Reading())
    assert isinstance(made.encoder[1], nn.BatchNorm2d)
    assert isinstance(made.head[1], nn.Identity)
    assert made.again.weight is made.encoder[0].weight


# -- what stays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        pytest.param(Functional, (IMAGE,), "it is arithmetic in the forward of the model", id="functional"),
        pytest.param(Twice, (IMAGE,), "conv is called more than once, and a module has one value for all", id="two-uses"),
        pytest.param(Tied, (torch.randn(4, 8),), "first.weight is read by first and last", id="tied"),
        pytest.param(lambda: Tied(read=False), (torch.randn(4, 8),), "first.weight is tied to last.weight", id="tied-elsewhere"),
        pytest.param(
            lambda: nn.Sequential(nn.Conv2d(3, 3, 1), ResponseNorm(), nn.BatchNorm2d(3)), (IMAGE,), "up: ", id="gain-that-stays"
        ),
        pytest.param(Odd, (IMAGE,), "at [2, 3, 9, 11] it moves the outputs by", id="other-at-odd-sizes"),
        pytest.param(Asking, (IMAGE,), "'Identity' object has no attribute 'num_features'", id="attribute"),
        pytest.param(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True)), (IMAGE,), "relu commutes only", id="nowhere"),
        pytest.param(
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)),
            (IMAGE,), "its weight is computed", id="parametrized",
        ),
    ],
)  # fmt: skip
def test_what_modules_cannot_express_stays_bit_for_bit(model, inputs, reason):
    model = model()
    made = folded(model, inputs)
    assert classes(made) == classes(model)
    assert torch.equal(made(*inputs), model(*inputs))
    assert reason in reasons(made)


def test_layers_that_hand_their_weights_to_one_kernel_stay():
    """nn.TransformerEncoderLayer gives the gains of its norms to a fused kernel when no gradients are asked for."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(8, 16), layer, nn.LayerNorm(16), nn.Linear(16, 4))
    made = folded(model, (torch.randn(2, 5, 8),))
    assert isinstance(made[1].norm1, nn.LayerNorm)


class Skipping(nn.Module):
    """A norm that a flag leaves out, one that a flag only says more about, and a flag that nothing takes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.more, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, skip=False, *, hidden=False, never=False):
        if never:
            raise ValueError
        y = self.conv(x)
        y = self.more(y if skip else self.norm(y)).relu()
        return (self.last(y), y) if hidden else self.last(y)


@pytest.mark.parametrize("inputs", [(IMAGE,), (IMAGE, False), (IMAGE, True)], ids=["default", "given", "turned"])
def test_a_flag_may_lead_past_a_norm(inputs):
    model = Skipping()
    made = folded(model, inputs)
    for skip in (False, True):
        torch.testing.assert_close(made(IMAGE, skip), model(IMAGE, skip), rtol=0, atol=1e-5)
    assert isinstance(made.norm, nn.BatchNorm2d)


def test_a_flag_that_returns_what_flows_between_modules_takes_nothing_back():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, hidden=False):
            y = self.conv(x)
            return (self.norm(y), y) if hidden else self.norm(y)

    assert classes(folded(Hidden())) == ["Conv2d", "Identity"]


def _doubled(norm):
    norm.register_forward_hook(lambda module, args, out: out * 2)


def _reading(norm):
    norm.register_forward_hook(lambda module, args, out: out * module.eps)


def _parametrized(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh())


class Louder(nn.LayerNorm):
    """Doubles; its gain and the 2 are one affine."""

    def forward(self, x):
        return super().forward(x) * 2


class Scaled(nn.LayerNorm):
    """Has a parameter of its own beside gain and shift."""

    def __init__(self, size):
        super().__init__(size)
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("verify", ["end", "off"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_doubled, "a hook on BatchNorm2d takes part in what it computes"),
        (lambda n: n.register_forward_pre_hook(lambda module, args: (args[0] * 2,)), "a hook on BatchNorm2d takes part"),
        (_reading, "a hook on BatchNorm2d takes part"),
        (lambda n: prune.random_unstructured(n, "weight", 0.5), "a hook on BatchNorm2d takes part"),
        (_parametrized, "are computed (parametrize)"),
        (
            lambda n: n.register_forward_hook(lambda module, args, out: module.num_features and None),
            "has no attribute 'num_features'",
        ),
    ],
    ids=["hook", "pre-hook", "hook-reads", "pruned", "parametrized", "hook-asks"],
)
def test_norms_that_others_take_part_in_stay(change, reason, verify):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    change(model[1])
    made = normfuse.fold(model, (IMAGE,), verify=verify)
    assert isinstance(made[1], nn.BatchNorm2d)
    assert torch.equal(made(IMAGE), model(IMAGE))
    assert reason in reasons(made)


@pytest.mark.parametrize("verify", ["end", "off"])
@pytest.mark.parametrize(("kind", "reason"), [(Louder, "does more than an nn.LayerNorm"), (Scaled, "multiplies or adds as well")])
def test_layer_norms_that_do_more_keep_their_parameters(kind, reason, verify):
    model = nn.Sequential(nn.Linear(8, 8), kind(8), nn.Linear(8, 4))
    made = folded(model, (torch.randn(4, 8),), verify=verify)
    assert dict(made[1].named_parameters()).keys() == dict(model[1].named_parameters()).keys()
    assert reason in reasons(made)


def test_layer_norm_in_the_forward_of_the_model_stays_in_its_code():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            n = self.norm
            return self.last(F.layer_norm(self.first(x), n.normalized_shape, n.weight, n.bias, n.eps))

    model = Written()
    made = folded(model, (torch.randn(4, 8),))
    assert isinstance(made.norm, nn.LayerNorm)


def test_code_that_asks_for_the_class_of_a_norm_is_heard_without_a_proof():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y + 1 if isinstance(self.norm, nn.BatchNorm2d) else y

    made = folded(Asks(), verify="off")
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert "taken back" in reasons(made)


class Checks(nn.Module):
    """Code that takes another way when its norm is gone."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), way

    def forward(self, x):
        y, here = self.norm(self.conv(x)), isinstance(self.norm, nn.BatchNorm2d)
        return y * self.norm.num_features if self.way == "reads" else y + int(here) if self.way == "adds" else y * 2 if here else y


class Deaf(nn.Conv2d):
    """Has a place for a bias and does not read it."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Checks("reads"), "cannot be captured"),
        (lambda: Checks("adds"), "computes something else"),
        (lambda: Checks("doubles"), "computes something else"),
        (lambda: nn.Sequential(Deaf(3, 8, 3, bias=False), nn.BatchNorm2d(8)), "does not read 0.bias"),
    ],
    ids=["reads", "adds", "doubles", "deaf"],
)
def test_code_is_traced_again_where_there_are_no_inputs(make, reason):
    model = randomise_norms(make(), seed=0).eval()
    made = normfuse.fold(model)
    assert torch.equal(made(IMAGE), model(IMAGE))
    assert reason in reasons(made)


class Parts(nn.BatchNorm2d):
    """A norm with parts: one that it calls, one that it does not, and a dropout."""

    def __init__(self, size):
        super().__init__(size)
        self.other, self.drop, self.act = nn.Sigmoid(), nn.Dropout(0.1), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Backwards(nn.BatchNorm2d):
    def __init__(self, size):
        super().__init__(size)
        self.last, self.first = nn.Softmax(1), nn.Tanh()

    def forward(self, x):
        return self.last(self.first(super().forward(x)))


def test_parts_of_a_norm_stay_as_it_calls_them():
    made = folded(nn.Sequential(nn.Conv2d(3, 8, 3), Parts(8)))
    assert classes(made) == ["Conv2d", "Dropout", "ReLU"]
    made = folded(nn.Sequential(nn.Conv2d(3, 8, 3), Backwards(8)))
    assert "calls its parts in another order" in reasons(made)


def test_arguments_that_were_not_tried_are_named():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, mask=None, flag: bool | None = None):
            y = self.conv(x)
            return y if flag else self.norm(y if mask is None else y * mask)

    mask = torch.rand(2, 1, 6, 6)
    model = Masked()
    made = folded(model, (IMAGE, mask))
    torch.testing.assert_close(made(IMAGE, mask, True), model(IMAGE, mask, True), rtol=0, atol=1e-5)

    class Whole(Masked):
        def forward(self, x, mask=None):
            return super().forward(x, mask)

    assert "the example inputs do not give it: mask" in " ".join(normfuse.report(folded(Whole())).notes)


@pytest.mark.parametrize("options", [{}, {"verify": "off"}, {"without": True}], ids=["proven", "off", "no-inputs"])
def test_a_train_of_its_own_may_ask_a_norm(options):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def train(self, mode=True):
            self.norm.momentum = 0.1 if self.norm.track_running_stats else 0
            return super().train(mode)

        def forward(self, x):
            return self.norm(self.conv(x))

    made = normfuse.fold(Own().eval(), **options) if options.pop("without", False) else folded(Own(), **options)
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert "no attribute 'track_running_stats'" in reasons(made)


def test_one_image_may_go_another_way():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.conv(x) if x.shape[0] == 1 else self.norm(self.conv(x))

    made = folded(Single())
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert "at [1, 3, 8, 8]" in reasons(made)


def test_random_models_are_folded_without_a_proof():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Noise()).eval()
    assert isinstance(normfuse.fold(model, (IMAGE,), verify="off")[1], nn.Identity)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_lazy_modules_are_to_be_called_first():
    with pytest.raises(UsageError, match="call the model on an input once"):
        normfuse.fold(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()), (IMAGE,))


def test_report_says_what_is_not_proven():
    made = folded(PreNorm(), (torch.randn(4, 5, 8),))
    assert "what flows between modules has changed" in normfuse.report(made).notes[-1]


def test_kinds_of_models_that_have_no_modules():
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(UsageError, match=r"ExportedProgram, which has no modules; use normfuse.optimize"):
        normfuse.fold(program)
    with pytest.raises(UsageError, match="verify='never'"):
        normfuse.fold(nn.Linear(2, 2), verify="never")


def test_rewrite_that_is_wrong_in_the_tree_is_taken_back(monkeypatch):
    """A norm that does nothing is put where one is needed: the proof of the copy sees it."""
    import normfuse.folding.written_back as written_back

    right = written_back._lighten

    def wrong(found, tree, path, rest):
        right(found, tree, path, rest)
        if path == "1":
            found.model[1] = nn.ReLU()

    monkeypatch.setattr(written_back, "_lighten", wrong)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    made = folded(model)
    assert classes(made) == ["Conv2d", "BatchNorm2d", "Conv2d", "Identity"]
    assert [s.path for s in normfuse.report(made).undone] == ["1"]


def test_kinds_of_models_that_are_taken_as_they_come():
    """Compiled, made under inference mode, in half precision, captured under autocast, traced by torch.fx, folded already."""

    def model():
        return randomise_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), seed=0).eval()

    with torch.inference_mode():
        frozen = model()
    half = model().bfloat16()
    made = [
        normfuse.fold(torch.compile(model(), backend="eager"), (IMAGE,)),
        normfuse.fold(frozen, (IMAGE,)),
        normfuse.fold(half, (IMAGE.bfloat16(),)),
        normfuse.fold(normfuse.fold(model(), (IMAGE,)), (IMAGE,)),
    ]
    with torch.autocast("cpu"):
        made.append(normfuse.fold(model(), (IMAGE,)))
    assert all(classes(m) == ["Conv2d", "Identity", "ReLU"] for m in made)
    whole = model()
    graph = normfuse.fold(torch.fx.symbolic_trace(whole), (IMAGE,))
    again = normfuse.optimize(graph)  # without inputs it is traced like any module, not taken for a result of `optimize`
    torch.testing.assert_close(again(IMAGE), whole(IMAGE), rtol=0, atol=1e-5)


# -- what works on the copy --------------------------------------------------------------------------------------------


def test_hooks_compile_pruning_and_pickle():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    seen = []
    model[1].register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    made = folded(model)
    seen.clear()
    made(IMAGE)
    assert seen == ["Identity"]  # who listened to the norm hears the same values
    torch.testing.assert_close(torch.compile(made, backend="aot_eager")(IMAGE), made(IMAGE))
    model[1]._forward_hooks.clear()
    made = folded(model)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert normfuse.report(again) == normfuse.report(made)
    prune.l1_unstructured(made[0], "weight", 0.5)
    assert made(IMAGE).shape == model(IMAGE).shape


def test_it_trains_and_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4), nn.LayerNorm(4))
    model[3].requires_grad_(False)
    made = folded(model).train()
    assert {n for n, p in made.named_parameters() if not p.requires_grad} == {"3.weight", "3.bias"}
    step = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(3):
        loss = (made(IMAGE) - 1).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_torchao_quantizes_it():
    quantization = pytest.importorskip("torchao.quantization")
    model = PreNorm(64)
    x = torch.randn(4, 5, 8)
    made = folded(model, (x,))
    quantization.quantize_(made, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=0, atol=0.1 * float(model(x).abs().max()))
    assert type(made.mlp.weight) is not nn.Parameter


def test_adapters_fit():
    peft = pytest.importorskip("peft")
    x = torch.randn(4, 5, 8)
    made = folded(PreNorm(), (x,))
    adapted = peft.get_peft_model(copy.deepcopy(made), peft.LoraConfig(target_modules=["mlp"], r=2))
    torch.testing.assert_close(adapted(x), made(x))


# -- Hugging Face ------------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 101}


@pytest.mark.parametrize(
    ("config", "options", "converted"),
    [
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101, "tie_word_embeddings": False}, 4),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101}, 0),  # its embedding is its head
        ("GPTNeoXConfig", TINY, 4),
        ("LlamaConfig", TINY, 0),
        ("GemmaConfig", {**TINY, "head_dim": 16, "num_key_value_heads": 1}, 0),
    ],
)
def test_what_from_pretrained_makes_of_it_gives_the_same_tokens(config, options, converted, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (1, 7))
    config = getattr(transformers, config)(**options, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = randomise_norms(transformers.AutoModelForCausalLM.from_config(config), seed=0).eval()
    made = normfuse.fold(model, {"input_ids": ids})
    assert type(made) is type(model)
    assert normfuse.report(made).norms_after.get("rms_norm", 0) - normfuse.report(made).norms_before.get("rms_norm", 0) == converted
    assert set(made.state_dict()) == set(model.state_dict())
    made.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, made, again)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert made.config.use_cache is model.config.use_cache


def test_batch_norm_that_a_configuration_brings_back_stays():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = randomise_norms(transformers.ResNetModel(config), seed=0).eval()
    made = normfuse.fold(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
    assert classes(made) == classes(model)
    assert "is rebuilt from its configuration" in reasons(made)


def test_state_dict_of_the_model_does_not_pass_for_that_of_the_copy():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**{k: v for k, v in TINY.items() if k != "vocab_size"}, image_size=16, patch_size=8)
    model = randomise_norms(transformers.ViTModel(config), seed=0).eval()
    made = normfuse.fold(model, {"pixel_values": torch.randn(2, 3, 16, 16)})
    assert normfuse.report(made).norms_after["layer_norm"] == 1  # the last one is an output
    made.load_state_dict(made.state_dict())
    with pytest.raises(RuntimeError, match="is folded and takes no gain and shift"):
        made.load_state_dict(model.state_dict())


def test_vision_transformer_of_timm():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")
    made = folded(model, (torch.randn(2, 3, 160, 160),))
    kinds = classes(made)
    assert "LayerNorm" not in kinds
    assert kinds.count("RMSNorm") == 13
    larger = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        torch.testing.assert_close(made(larger), model(larger), rtol=0, atol=TOLERANCES[torch.float32].rtol)


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}, {}], ids=["no-bias", "no-affine", "affine"])
def test_norms_are_saved_with_what_they_had(options):
    """As in MPT, whose LayerNorms have no bias."""

    class Saved(nn.Sequential):
        def save_pretrained(self, path):
            raise NotImplementedError

    def make():
        return Saved(nn.Linear(8, 8), nn.LayerNorm(8, **options), nn.Linear(8, 4)).half()

    model = randomise_norms(make(), seed=0).eval()
    x = torch.randn(4, 8).half()
    made = normfuse.fold(model, (x,))
    assert type(made[1]) is nn.RMSNorm
    assert {k: (v.dtype, v.shape) for k, v in made.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in model.state_dict().items()
    }
    again = make().eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=2e-2)


def test_a_function_that_holds_the_modules_of_another_model_is_said():
    """A copy does not copy what a lambda refers to: here a norm that trains and is no module of the model."""

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.call = lambda x: norm(x)

        def forward(self, x):
            return self.call(self.conv(x))

    with pytest.raises(CaptureError, match="may hold modules of another model"):
        normfuse.fold(Holding().train(), (IMAGE,))
