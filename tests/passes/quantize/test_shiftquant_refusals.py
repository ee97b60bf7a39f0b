"""What stays in float and why, and what is a mistake."""

import math
import re

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant
from normfuse.errors import UsageError
from tests.passes.quantize.quantized import SIZE, ConvNet, Mlp, draw, entries, made


class Scaled(nn.Module):
    def forward(self, x, w):
        return torch.nn.functional.linear(x, w)


class Called(nn.Module):
    """Another layer, of which the first output is given on."""

    def __init__(self, m):
        super().__init__()
        self.m = m.eval()

    def forward(self, x):
        y = self.m(x)
        return y[0] if isinstance(y, tuple) else y


class Product(nn.Module):
    def __init__(self, shape, f):
        super().__init__()
        self.w, self.f = nn.Parameter(draw(*shape, seed=1)), f

    def forward(self, x):
        return self.f(x, self.w)


@torch.library.custom_op("normfuse_tests::by_expert", mutates_args=())
def by_expert(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, w)


@by_expert.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], x.shape[1], w.shape[2])


def nan_weight():
    model = made(Mlp)
    model.down.weight.data[0, 0] = math.nan
    return model


def wide():
    """1600 codes of 127, seven bits above the least exponent, times 127."""
    model = nn.Linear(1600, 4).eval()
    model.weight.data.fill_(1.0)
    model.weight.data[:, -1] = 2.0**-7
    return model


REFUSALS = [
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(4, 4, 2)).eval(), (draw(4, 5, 5),), {}, "0",
        "it reads one image without a batch axis", id="no batch",
    ),
    pytest.param(nan_weight, (draw(4, 24),), {}, "down", "its weight holds NaN or Inf", id="NaN in a weight"),
    pytest.param(lambda: made(Mlp), (draw(4, 24),), {"keep": "up"}, "up", "kept in float by keep='up'", id="keep"),
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(32, 4)).eval(), (draw(2, 8, 4, 4),), {}, "0",
        "1 input channels a group are too few", id="depthwise",
    ),
    pytest.param(
        lambda: nn.Sequential(nn.Conv3d(4, 4, 2)).eval(), (draw(2, 4, 3, 3, 3),), {}, "0",
        "there is no integer form of a convolution in 3 dimensions", id="3-d",
    ),
    pytest.param(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2)).eval(), (draw(2, 4, 3, 3),), {}, "0",
        "there is no integer form of conv_transpose2d", id="transposed",
    ),
    pytest.param(lambda: Called(nn.LSTM(8, 4)), (draw(3, 2, 8),), {}, "m", "there is no integer form of lstm", id="LSTM"),
    pytest.param(lambda: Called(nn.GRUCell(8, 4)), (draw(2, 8),), {}, "m", "there is no integer form of gru_cell", id="cell"),
    pytest.param(
        lambda: Called(nn.EmbeddingBag(9, 4)), (torch.arange(6).reshape(2, 3),), {}, "m",
        "there is no integer form of embedding_bag", id="bag",
    ),
    pytest.param(
        lambda: Product((4, 8), lambda x, w: w @ x), (draw(2, 8, 3),), {}, "matmul", "its weight is the left factor", id="left",
    ),
    pytest.param(
        lambda: Product((2, 8, 4), torch.bmm), (draw(2, 3, 8),), {}, "bmm",
        "its weight has more than two dimensions", id="3-d weight",
    ),
    pytest.param(
        lambda: Product((8, 4), lambda x, w: torch.einsum("abc,cd->abd", x, w)), (draw(2, 3, 8),), {}, "einsum",
        "there is no integer form of einsum", id="einsum",
    ),
    pytest.param(
        lambda: Product((2, 8, 4), lambda x, w: torch.ops.normfuse_tests.by_expert(x, w)), (draw(2, 3, 8),), {}, "normfuse_tests",
        "there is no integer form of normfuse_tests::by_expert", id="operator of another library",
    ),
    pytest.param(
        wide, (draw(2, 1600),), {"weight_bits": 8, "groups": 8, "exponents": "range"}, "linear",
        "its sums do not fit into 32 bits", id="accumulator",
    ),
]  # fmt: skip


BESIDE_OTHERS = ("NaN in a weight", "keep", "depthwise")
ARGUMENTS = ("build", "inputs", "options", "path", "reason")


@pytest.mark.parametrize(ARGUMENTS, [p for p in REFUSALS if p.id not in BESIDE_OTHERS])
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights")
def test_a_refusal_of_all_that_there_is_is_an_error(build, inputs, options, path, reason):
    said = rf"none of 1 layers: 1 because {re.escape(reason)}.*\(the first is {path}"
    with pytest.raises(UsageError, match=said):
        normfuse.optimize(build(), inputs, quantize=ShiftQuant(**{"prefer": "size"} | options), verify="off")


@pytest.mark.parametrize(ARGUMENTS, [p for p in REFUSALS if p.id in BESIDE_OTHERS])
@pytest.mark.filterwarnings("ignore:.*NaN")
def test_refusals(build, inputs, options, path, reason):
    fast = normfuse.optimize(build(), inputs, quantize=ShiftQuant(**{"prefer": "size"} | options), verify="off")
    found = [e for e in entries(normfuse.report(fast)) if e.kept]
    assert any(e.kept.startswith(reason) and e.path.startswith(path) for e in found), found
    sites = [s for s in normfuse.report(fast).refused if s.rule == "shiftquant"]
    assert {s.note for s in sites} == {e.kept for e in found}


def test_a_weight_that_is_computed():
    with pytest.raises(UsageError, match="none of 1 layers: 1 because its weight is computed when the model runs"):
        normfuse.optimize(Scaled(), (draw(4, 8), draw(3, 8)), quantize=SIZE)


@pytest.mark.parametrize(
    "product",
    [
        pytest.param(lambda x, w: x @ x.transpose(1, 2), id="matmul"),
        pytest.param(lambda x, w: torch.einsum("abc,abd->acd", x, x), id="einsum"),
        pytest.param(lambda x, w: w[:, :, :1] @ x[:, :1], id="vector"),
    ],
)
def test_products_without_weights_are_no_layers(product):
    with pytest.raises(UsageError, match="has quantized nothing: the model has no linear layer, convolution or embedding"):
        normfuse.optimize(Product((2, 4, 4), product), (draw(2, 3, 8),), quantize=SIZE)


def test_nan_inside_the_model_keeps_what_reads_it_in_float():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(torch.log(self.a(x)))

    fast = normfuse.optimize(made(Log), (draw(16, 8),), quantize=SIZE)
    a, b = entries(normfuse.report(fast))
    assert a.kept == ""
    assert b.kept == "what it reads holds NaN or Inf in the calibration data"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"activations": "static"}, "static activations need calibration data", id="static"),
        pytest.param({"rounding": "gptq"}, 'rounding="gptq" needs calibration data', id="gptq"),
    ],
)
def test_what_needs_data_refuses_without(options, reason):
    spec = ShiftQuant(prefer="size", **options)
    with pytest.raises(UsageError, match=f"none of 1 layers: 1 because {reason}"):
        normfuse.optimize(nn.Linear(8, 8).eval(), quantize=spec, allow_random_calibration=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param({"keep": ("dwn",)}, r"keep: no layer matches 'dwn'; did you mean 'down'\?", id="keep"),
        pytest.param(
            {"overrides": {"zzz": {"groups": 1}}}, r"overrides: no layer matches 'zzz'; there are up, down", id="overrides"
        ),
    ],
)
def test_patterns_that_match_nothing(options, text):
    with pytest.raises(UsageError, match=text):
        normfuse.optimize(made(Mlp), (draw(4, 24),), quantize=ShiftQuant(**options))


def test_a_pattern_that_names_a_block():
    with pytest.raises(UsageError, match=r"did you mean 'body\.\*'\?"):
        normfuse.optimize(made(ConvNet), (draw(4, 4, 10, 10),), quantize=ShiftQuant(keep="body"))


@pytest.mark.parametrize("wrong", [ShiftQuant, 8, {"weight_bits": 4}], ids=str)
def test_quantize_takes_a_specification(wrong):
    with pytest.raises(UsageError, match=r"expected a normfuse\.ShiftQuant"):
        normfuse.optimize(made(Mlp), (draw(4, 24),), quantize=wrong)


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        pytest.param([], "gave no batch", id="empty"),
        pytest.param(iter(()), "gave no batch", id="empty iterator"),
        pytest.param([draw(4, 7)], r"batch 0 .*\(4, 7\)", id="shape"),
        pytest.param([draw(4, 24), torch.full((4, 24), math.nan)], "batch 1 .*NaN", id="NaN"),
        pytest.param([3], "batch 0", id="no tensor"),
    ],
)
def test_calibration_that_does_not_fit(calibration, text):
    with pytest.raises(UsageError, match=text):
        normfuse.optimize(made(Mlp), (draw(4, 24),), quantize=SIZE, calibration=calibration)


def test_a_loader_is_read_once_and_overrides_hold():
    def loader():
        for s in range(3):
            yield (draw(4, 24, seed=s),)

    spec = ShiftQuant(weight_bits=4, overrides={"d*": {"weight_bits": 8, "activation_bits": 6}}, prefer="size")
    fast = normfuse.optimize(made(Mlp), (draw(4, 24),), quantize=spec, calibration=loader())
    assert [(e.weight_bits, e.activation_bits) for e in entries(normfuse.report(fast))] == [(4, 8), (8, 6)]
