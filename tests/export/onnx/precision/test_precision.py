"""Float32 graphs in half precision: which norms, constants and positions stay float32, and that the numbers stay right."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.export.onnx.precision import to_precision
from tests.export.models import AUTO
from tests.export.onnx.precision.precision_graphs import (
    LOW,
    Big,
    Rms,
    converted,
    dtypes,
    errors,
    evaluated,
    exported,
    graph,
    ir,
    onnx,
    run,
    small_inputs,
)

pytestmark = pytest.mark.filterwarnings("ignore")

# --- norms that are spelt out -----------------------------------------------------------------------------------------


def l1(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.abs().mean(-1, keepdim=True) + 1e-12)


def crms(x):
    square = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
    return x / torch.sqrt(square / (x.shape[-1] + 1) + 1e-20)


def by_hand(x):
    e = torch.exp(x / 100 - (x / 100).amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def grn(x):
    g = x.norm(p=2, dim=(1,), keepdim=True)
    return x * (g / (g.mean(-1, keepdim=True) + 1e-6)) + x


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


NORMS = {
    "rms": Rms(32),
    "l1": Call(l1),
    "crms": Call(crms),
    "normalize": Call(functools.partial(F.normalize, dim=-1, eps=1e-12)),
    "softmax": Call(by_hand),
    "grn": Call(grn),
    "std": Call(lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-9)),
    "layer": nn.LayerNorm(32),
    "instance": Call(lambda x: F.instance_norm(x[:, None]).squeeze(1)),
    "group": Call(lambda x: F.group_norm(x[..., None], 4).squeeze(-1)),
    "logsumexp": Call(lambda x: x - torch.logsumexp(x / 100, -1, keepdim=True)),
    "distance": Call(lambda x: x / ((x - x.flip(0)) * (x - x.flip(0))).sum(-1, keepdim=True).sqrt()),
}


@functools.cache
def norms(opset):
    torch.manual_seed(0)
    return exported(Big(*NORMS.values()), (torch.randn(4, 16),), opset=opset)


@functools.cache
def rms():
    return exported(Big(Rms(32)), (torch.randn(4, 16),))[0]


@pytest.mark.parametrize("opset", [18, 23])
def test_norms_of_activations_whose_square_overflows(opset):
    model, feeds = norms(opset)
    low, notes = converted(model)
    assert notes == ()
    assert set(dtypes(low)["Gemm"]) == {"FLOAT16"}
    converted(model, "bf16")
    triples = zip(NORMS, evaluated(low, feeds), run(low, feeds), run(model, feeds), strict=True)
    # the reference forgets the stash_type of LayerNormalization, ONNX Runtime has a kernel for it
    wrong = {name: float(np.abs((c if name == "layer" else a) - b).max() / np.abs(b).max()) for name, a, c, b in triples}
    assert max(wrong.values()) < 4e-3, wrong


def test_all_in_half_would_be_wrong(monkeypatch):
    """The models of the test above are a test: without islands they overflow."""
    from normfuse.export.onnx.precision import islands

    monkeypatch.setattr(islands._Planner, "_decide", lambda self, node: None)
    monkeypatch.setattr(islands._Planner, "_between", lambda self, node: False)
    monkeypatch.setattr(islands._Planner, "_feeds_sum", lambda self, node: False)
    model, feeds = norms(18)
    low = model.clone()
    to_precision(low, "fp16")
    with np.errstate(all="ignore"):
        pairs = zip(NORMS, evaluated(low, feeds), run(model, feeds), strict=True)
        wrong = {name for name, a, b in pairs if not np.abs(a - b).max() < 0.1 * np.abs(b).max()}
    assert wrong >= {"rms", "crms", "std", "distance"}


def test_island_is_entered_and_left_once():
    low, _ = converted(rms(), io_dtype="low")
    casts = [n.name for n in low.graph if n.op_type == "Cast"]
    assert casts == ["/norms/0/Cast", "/norms/0/Cast_1"]
    kinds = dtypes(low)
    assert kinds["Pow"] == kinds["ReduceMean"] == kinds["Sqrt"] == ["FLOAT"]
    assert kinds["Mul"] == ["FLOAT16", "FLOAT", "FLOAT16"]  # · 600, · 1/rms, · gain


def test_residual_stream_stays_in_half():
    norm = (
        "p{i} = Pow(h{i}, w1)  m{i} = ReduceMean<keepdims=1>(p{i})  e{i} = Add(m{i}, w2)  r{i} = Sqrt(e{i})  n{i} = Div(h{i}, r{i})"
    )
    block = "a{i} = MatMul(x{i}, w0)  h{i} = Add(x{i}, a{i})  " + norm + "  b{i} = MatMul(n{i}, w0)  x{j} = Add(h{i}, b{i})"
    body = "  ".join(block.format(i=i, j=i + 1) for i in range(2)).replace("x0", "x").replace("x2", "y")
    model = graph(body, weights=[np.eye(8, dtype=np.float32), np.float32(2), np.float32(1e-6)])
    low, _ = converted(model)
    assert dtypes(low)["Add"] == ["FLOAT16", "FLOAT", "FLOAT16"] * 2  # the eps of each norm


def test_fused_norms_and_softmax_get_half():
    body = "l = LayerNormalization<epsilon=1e-12>(x, w0, w0)  r = RMSNormalization<epsilon=1e-12>(l, w0)  y = Softmax(r)"
    model = graph(body, weights=[np.linspace(0.5, 2, 8, dtype=np.float32)], opset=23)
    low, _ = converted(model, io_dtype="low")
    assert dtypes(low) == {"LayerNormalization": ["FLOAT16"], "RMSNormalization": ["FLOAT16"], "Softmax": ["FLOAT16"]}
    assert (
        errors(model, {"x": np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32) * 500}, converted(model)[0])[0]
        < 3e-3
    )


# --- constants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("m = Where(c, zero, low)  s = Add(x, m)  y = Softmax(s)", id="where"),
        pytest.param("s = Where(c, x, low)  y = Softmax(s)", id="scores"),
        pytest.param("f = Cast<to=1>(c)  g = Sub(one, f)  m = Mul(g, low)  s = Add(x, m)  y = Softmax(s)", id="product"),
        pytest.param(
            "f = Cast<to=1>(c)  g = Sub(one, f)  m = Mul(g, low)  n = Add(m, m)  s = Add(n, x)  y = Softmax(s)", id="twice"
        ),
    ],
)
def test_masks_stay_finite(body, dtype):
    constants = "float one = {1.0}, float zero = {0.0}, float low = {-3.4028234663852886e38}"
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[2,4] x, bool[2,4] c) => (float[2,4] y) <{constants}> {{ {body} }}'
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    for i, node in enumerate(model.graph):
        node.name = f"/attn/{node.op_type}_{i}"
    low, notes = converted(model, dtype)
    assert notes == ()
    numbers = [v.const_value.numpy().astype(np.float32) for v in low.graph.initializers.values() if v.dtype == LOW[dtype]]
    assert all(np.isfinite(n).all() for n in numbers)
    if dtype == "fp16":
        x = np.array([[1, 2, 3, 4], [200, -300, 100, 0]], np.float32)
        c = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], bool)
        got, want = run(low, {"x": x, "c": c})[0], run(model, {"x": x, "c": c})[0]
        assert np.isfinite(got).all()  # a row without any token too
        assert np.abs(got - want)[0].max() < 1e-3


def test_infinite_masks_stay_infinite():
    model = graph("s = Add(x, w0)  y = Softmax(s)", weights=[np.array([0, -np.inf] * 4, np.float32)])
    low, _ = converted(model)
    assert np.isneginf(low.graph.initializers["w0"].const_value.numpy()).sum() == 4


def test_weights_beyond_half_stay_float32_and_are_named():
    big = np.full((8, 8), 1e5, np.float32)
    model = graph(
        "a = MatMul(x, w0)  b = Mul(a, w1)  y = MatMul(b, w2)", weights=[big, np.float32(1e-6), np.eye(8, dtype=np.float32)]
    )
    low, notes = converted(model)
    assert len(notes) == 1
    assert "w0" in notes[0]
    assert "blocks.0" in notes[0]
    assert dtypes(low)["MatMul"] == ["FLOAT", "FLOAT16"]
    feeds = small_inputs(model, np.random.default_rng(0))
    assert errors(model, feeds, low)[0] < 2e-3
    assert converted(model, "bf16")[1] == ()


def test_weights_below_half_stay_float32():
    tiny = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32) * 1e-7
    model = graph("a = MatMul(x, w0)  y = Mul(a, w1)", weights=[tiny, np.float32(1e7)])
    low, notes = converted(model)
    assert "rounds away" in notes[0]
    assert errors(model, small_inputs(model, np.random.default_rng(0)), low)[0] < 2e-3


def test_tiny_biases_cost_nothing():
    model = graph("a = MatMul(x, w0)  y = Add(a, w1)", weights=[np.eye(8, dtype=np.float32), np.arange(8, dtype=np.float32) * 1e-7])
    low, notes = converted(model)
    assert notes == ()
    assert set(dtypes(low)["Add"]) == {"FLOAT16"}


def test_eps_of_a_division_stays():
    model = graph("a = Abs(x)  b = Add(a, w0)  y = Div(a, b)", weights=[np.float32(1e-12)])
    low, _ = converted(model)
    assert not np.isnan(run(low, {"x": np.zeros((2, 8), np.float32)})[0]).any()
    assert dtypes(low)["Add"] == ["FLOAT"]
    assert dtypes(converted(model, "bf16")[0])["Add"] == ["BFLOAT16"]  # bfloat16 holds 1e-12


def test_one_weight_read_in_both_dtypes():
    model = graph("a = Mul(x, w0)  p = Pow(w0, w1)  b = Mul(a, p)  y = MatMul(b, w2)", weights=[
        np.linspace(0.5, 2, 8, dtype=np.float32), np.float32(3), np.eye(8, dtype=np.float32)])  # fmt: skip
    low, _ = converted(model)
    found = {k: v.dtype.name for k, v in low.graph.initializers.items()}
    assert found["w0"] == "FLOAT16"
    assert found["w0.float"] == "FLOAT"
    assert model.graph.initializers["w0"].dtype == ir.DataType.FLOAT  # the model that was copied is as it was


# --- positions --------------------------------------------------------------------------------------------------------


class Rope(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.register_buffer("freq", 1.0 / 100 ** (torch.arange(4) / 4))

    def forward(self, x, positions):
        angle = (self.freq[None, :, None] @ positions[:, None, :].float()).transpose(1, 2)
        angle = torch.cat((angle, angle), -1)
        q = self.q(x)
        return q * angle.cos() + torch.cat((-q[..., 4:], q[..., :4]), -1) * angle.sin()


def test_position_tables_are_computed_in_float32():
    dynamic = {"x": {0: AUTO, 1: AUTO}, "positions": {0: AUTO, 1: AUTO}}
    model, feeds = exported(Rope(), {"x": torch.randn(2, 6, 8), "positions": torch.arange(6).repeat(2, 1) + 5000}, dynamic=dynamic)
    low, _ = converted(model)
    kinds = dtypes(low)
    assert kinds["Cos"] == kinds["Sin"] == ["FLOAT"]
    assert sorted(kinds["MatMul"]) == ["FLOAT", "FLOAT16"]
    assert errors(model, feeds, low)[0] < 2e-3


def test_angles_of_a_float_input_are_float32():
    model = graph("a = Mul(x, w0)  b = Mul(a, w1)  c = Sin(b)  y = MatMul(c, w2)", weights=[
        np.linspace(0, 1, 8, dtype=np.float32), np.float32(1000), np.eye(8, dtype=np.float32)])  # fmt: skip
    low, _ = converted(model)
    assert dtypes(low) == {"Mul": ["FLOAT", "FLOAT"], "Sin": ["FLOAT"], "MatMul": ["FLOAT16"]}
    feeds = small_inputs(model, np.random.default_rng(0))
    assert np.abs(evaluated(low, feeds)[0] - run(model, feeds)[0]).max() < 2e-3


def test_image_of_bytes_does_not_make_the_network_float32():
    body = "f = Cast<to=1>(x)  s = Div(f, w0)  c = Conv(s, w1)  y = Relu(c)"
    weights = [np.float32(255), np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)]
    model = graph(body, inputs="uint8[1,3,8,8] x", outputs="float[1,4,6,6] y", weights=weights)
    low, _ = converted(model)
    assert dtypes(low) == {"Div": ["FLOAT"], "Conv": ["FLOAT16"], "Relu": ["FLOAT16"]}
