"""What a tree of modules cannot express stays bit for bit, with the reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import normfuse
from tests.folding.models import IMAGE, TwoViews, classes, folded, reasons


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
