"""Float32 graphs in half precision: what becomes half, what does not, and that the numbers stay right."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normfuse.errors import UsageError
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.precision import to_precision
from normfuse.export.onnx.program import program
from normfuse.export.targets import target_named
from tests.export.models import AUTO

onnx = pytest.importorskip("onnx")
for _part in ("onnx.parser", "onnx.reference"):
    pytest.importorskip(_part)
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

pytestmark = pytest.mark.filterwarnings("ignore")

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
MIXED = {"BatchNormalization", "Cast", "If", "Loop", "Resize"}
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def exported(module, inputs, *, opset=23, form="decomposed", dynamic=None):
    found = program(module.eval(), inputs, dynamic)
    model = finished(translated(found, opset), found, target_named("tensorrt"), opset, form)[0]
    return model, {k: v.numpy() for k, v in found.feeds(found.flat_inputs()).items()}


def graph(body, *, inputs="float[2,8] x", outputs="float[2,8] y", opset=21, weights=(), functions="", domains=""):
    """A model from the text form of ONNX; `weights` are arrays w0, w1, ..."""
    text = f'<ir_version: 10, opset_import: ["": {opset}{domains}]> g ({inputs}) => ({outputs}) {{ {body} }} {functions}'
    proto = onnx.parser.parse_model(text)
    for i, w in enumerate(weights):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(w), f"w{i}"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"/blocks/{i}/{node.op_type}"
    return model


def session_of(proto):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, feeds):
    opened = session_of(ir.to_proto(model))
    return opened.run(None, {k: v for k, v in feeds.items() if k in {i.name for i in opened.get_inputs()}})


def converted(model, dtype="fp16", **options):
    """A converted copy, checked: valid, strongly typed, names unique, no cast without a use."""
    copy = model.clone()
    notes = to_precision(copy, dtype, **options)
    proto = ir.to_proto(copy)
    onnx.checker.check_model(proto, full_check=True)
    again = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    nodes = list(again.graph.all_nodes())
    for node in nodes:
        floats = {v.dtype for v in node.inputs if v is not None and v.dtype in FLOATS}
        assert len(floats) <= 1 or node.op_type in MIXED or node.domain, (node.name, floats)
        if node.op_type == "Cast":
            before = node.inputs[0].producer()
            assert node.inputs[0].dtype != node.outputs[0].dtype, node.name
            assert before is None or before.op_type != "Cast" or before.inputs[0].dtype != node.outputs[0].dtype, node.name
    assert len({n.name for n in nodes}) == len(nodes)
    casts = [(n.inputs[0], n.outputs[0].dtype) for n in nodes if n.op_type == "Cast"]
    assert len(set(casts)) == len(casts)
    return copy, notes


def dtypes(model):
    """The dtype that each node computes in, by op type; of several nodes of a type, the dtypes in order."""
    found: dict = {}
    for node in model.graph.all_nodes():
        floats = [v.dtype for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in FLOATS]
        if floats and node.op_type != "Cast":
            found.setdefault(node.op_type, []).append(floats[0].name)
    return found


def evaluated(model, feeds):
    """Every node in the dtype that it says: ONNX Runtime computes half in float32 on the CPU, between casts that it drops."""
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def errors(model, feeds, low):
    """max |low − full| / max |full| for each float output"""
    pairs = zip(run(low, feeds), run(model, feeds), strict=True)
    return [float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max()) for a, b in pairs if b.dtype == np.float32]


def small_inputs(model, rng):
    return {v.name: rng.standard_normal(tuple(v.shape.dims)).astype(np.float32) for v in model.graph.inputs}


# --- norms that are spelt out -----------------------------------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        h = x.float()
        return self.gain * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-12)).to(x.dtype)


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


class Big(nn.Module):
    """Norms of activations around 600, whose squares no half holds."""

    def __init__(self, *norms):
        super().__init__()
        self.inner, self.norms, self.outer = nn.Linear(16, 32), nn.ModuleList(norms), nn.Linear(32, 16)

    def forward(self, x):
        x = self.inner(x) * 600
        return tuple(self.outer(norm(x)) for norm in self.norms)


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


# --- the edges of the graph -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io_dtype", ["fp32", "low"])
def test_inputs_and_outputs(io_dtype):
    model = graph(
        "y = MatMul(x, w0)  z = Relu(x)  s = Exp(x)",
        outputs="float[2,8] y, float[2,8] z, float[2,8] s",
        weights=[np.eye(8, dtype=np.float32)],
    )
    low, _ = converted(model, io_dtype=io_dtype)
    wanted = ir.DataType.FLOAT if io_dtype == "fp32" else ir.DataType.FLOAT16
    assert [(v.name, v.dtype) for v in low.graph.inputs] == [("x", wanted)]
    assert [(v.name, v.dtype) for v in low.graph.outputs] == [("y", wanted), ("z", wanted), ("s", wanted)]
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    got = run(low, {"x": x if io_dtype == "fp32" else x.astype(np.float16)})
    for a, b in zip(got, run(model, {"x": x}), strict=True):
        assert np.abs(a - b).max() < 5e-3


def test_output_that_is_read_inside_and_given_twice():
    model = graph(
        "y = MatMul(x, w0)  z = MatMul(y, w0)  e = Exp(y)",
        outputs="float[2,8] y, float[2,8] z, float[2,8] e",
        weights=[np.eye(8, dtype=np.float32)],
    )
    low, _ = converted(model)
    assert [v.name for v in low.graph.outputs] == ["y", "z", "e"]
    assert sum(n.op_type == "Cast" for n in low.graph) == 3  # x down; y and z up; Exp reads the output
    assert errors(model, small_inputs(model, np.random.default_rng(0)), low)[0] < 2e-3


def test_input_that_is_an_output():
    model = graph("y = MatMul(x, w0)", outputs="float[2,8] y, float[2,8] x", weights=[np.eye(8, dtype=np.float32)])
    for io_dtype in ("fp32", "low"):
        low, _ = converted(model, io_dtype=io_dtype)
        assert low.graph.outputs[1] is low.graph.inputs[0]


def test_float32_changes_nothing():
    model = graph("y = MatMul(x, w0)", weights=[np.eye(8, dtype=np.float32)])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert to_precision(model, "fp32") == ()
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# --- models that are not float32 --------------------------------------------------------------------------------------


def test_half_model_stays_as_it_is():
    model = graph("y = MatMul(x, w0)", inputs="float16[2,8] x", outputs="float16[2,8] y", weights=[np.eye(8, dtype=np.float16)])
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    (note,) = to_precision(model, "fp16")
    assert "float16 already" in note
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    with pytest.raises(UsageError, match="float16 already"):
        to_precision(model, "bf16")


def test_float64_is_refused():
    model = graph("y = MatMul(x, w0)", inputs="double[2,8] x", outputs="double[2,8] y", weights=[np.eye(8)])
    with pytest.raises(UsageError, match=r"x is float64.*model\.float\(\)"):
        to_precision(model, "fp16")


@pytest.mark.parametrize(("dtype", "io"), [("fp8", "fp32"), ("fp16", "half")])
def test_unknown_arguments_are_refused(dtype, io):
    with pytest.raises(UsageError, match="expected one of"):
        to_precision(graph("y = Relu(x)"), dtype, io_dtype=io)


# --- quantized graphs -------------------------------------------------------------------------------------------------


def _qdq(scale, opset=21):
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 127, (8, 8)).astype(np.int8)
    body = """q = QuantizeLinear(x, w0, w1)  d = DequantizeLinear(q, w0, w1)
              w = DequantizeLinear(w2, w3, w1)  a = MatMul(d, w)  b = DequantizeLinear(w4, w5)  y = Add(a, b)"""
    bias = rng.integers(-1000, 1000, 8).astype(np.int32)
    weights = [np.float32(0.02), np.int8(0), codes, np.float32(scale), bias, np.float32(0.02 * scale)]
    return graph(body, weights=weights, opset=opset)


@pytest.mark.parametrize("opset", [21, 23])
def test_quantized_products_are_half(opset):
    model = _qdq(0.01, opset)
    low, notes = converted(model)
    assert notes == ()
    # the scale of the bias is 2e-4, that of codes 1e-2: both are normal halves
    assert set(dtypes(low)["DequantizeLinear"]) == set(dtypes(low)["QuantizeLinear"]) == {"FLOAT16"}
    assert low.graph.initializers["w2"].dtype == ir.DataType.INT8
    assert errors(model, small_inputs(model, np.random.default_rng(0)), low)[0] < 2e-2


def test_scale_below_half_stays_float32():
    low, _ = converted(_qdq(1e-4))
    kinds = dtypes(low)
    assert kinds["DequantizeLinear"] == ["FLOAT16", "FLOAT16", "FLOAT"]  # 2e-6 is what half rounds by 1 %
    assert kinds["MatMul"] == kinds["Add"] == ["FLOAT16"]


def test_accumulators_of_integer_products_stay_float32():
    model = graph(
        "q, s, z = DynamicQuantizeLinear(x)  a = MatMulInteger(q, w0, z)  f = Cast<to=1>(a)  t = Mul(s, w1)  b = Mul(f, t)"
        " c = Abs(b)  y = MatMul(c, w2)",
        weights=[np.full((8, 8), 127, np.int8), np.float32(1e-3), np.eye(8, dtype=np.float32)],
    )
    low, _ = converted(model)
    assert dtypes(low)["Mul"] == ["FLOAT", "FLOAT"]
    assert dtypes(low)["MatMul"] == ["FLOAT16"]
    assert errors(model, small_inputs(model, np.random.default_rng(0)), low)[0] < 2e-3


# --- subgraphs and functions ------------------------------------------------------------------------------------------


def test_branches_compute_in_half():
    model = graph(
        """h = MatMul(x, w0)
        y = If(c) <then_branch = t () => (float[2,8] u) { p = MatMul(h, w0)  u = Relu(p) },
                   else_branch = e () => (float[2,8] v) { k = Constant<value_float = 300.0>()  q = Mul(h, k)  o = Mul(q, q)
                                                         a = ReduceMean<keepdims=1>(o)  r = Sqrt(a)  v = Div(q, r) }>""",
        inputs="float[2,8] x, bool c",
        weights=[np.eye(8, dtype=np.float32) + 0.1],
    )
    low, _ = converted(model)
    kinds = dtypes(low)
    assert kinds["MatMul"] == ["FLOAT16", "FLOAT16"]
    assert kinds["ReduceMean"] == ["FLOAT"]
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    for c in (True, False):
        assert errors(model, {"x": x, "c": np.array(c)}, low)[0] < 3e-3


def test_loop_carries_float32():
    model = graph(
        """n = Constant<value = int64 {3}>()  t = Constant<value = bool {1}>()
        y = Loop(n, t, x) <body = b (int64 i, bool go, float[2,8] s) => (bool on, float[2,8] r)
            { on = Identity(go)  p = MatMul(s, w0)  r = Add(s, p) }>""",
        weights=[np.eye(8, dtype=np.float32) * 0.5],
    )
    low, _ = converted(model)
    assert dtypes(low)["MatMul"] == ["FLOAT16"]
    assert errors(model, small_inputs(model, np.random.default_rng(0)), low)[0] < 3e-3


def _with_function(op, inputs, outputs):
    from normfuse.export.onnx.quantized.native import add_functions

    names = re.findall(r"(\w+)(?:,|$)", outputs.replace("[2,8]", ""))
    body = f"h = Mul(x, w0)  {', '.join(names[:-1])} = normfuse.{op}(h{inputs})  z = MatMul(y, w1)"
    weights = [np.float32(600), np.eye(8, dtype=np.float32), np.linspace(0.5, 2, 8, dtype=np.float32)]
    model = graph(body, outputs=outputs, weights=weights, domains=', "normfuse": 1')
    for node in model.graph:
        if node.domain == "normfuse" and op != "TwoPassSoftmax":
            node.attributes["eps"] = ir.AttrFloat32("eps", 1e-6)
        for out in node.outputs:
            out.dtype, out.shape = ir.DataType.FLOAT, ir.Shape((2, 8))
    add_functions(model, 21)
    return model


@pytest.mark.parametrize(
    ("op", "inputs", "outputs"),
    [
        pytest.param("RmsNorm", ", w2", "float[2,8] y, float[2,8] z", id="gain"),
        pytest.param("RmsNorm", ", w2, x", "float[2,8] y, float[2,8] sum, float[2,8] z", id="residual"),
        pytest.param("CrmsNorm", "", "float[2,8] y, float[2,8] z", id="crms"),
        pytest.param("TwoPassSoftmax", "", "float[2,8] y, float[2,8] z", id="softmax"),
    ],
)
def test_functions_of_normfuse_take_half(op, inputs, outputs):
    model = _with_function(op, inputs, outputs)
    low, _ = converted(model, io_dtype="low")
    (node,) = [n for n in low.graph if n.domain == "normfuse"]
    assert {v.dtype for v in (*node.inputs, *node.outputs)} == {ir.DataType.FLOAT16}
    assert [key[2] for key in low.functions] == [node.overload]
    assert not any(n.op_type == "Cast" for n in low.graph)
    low, _ = converted(model)
    assert max(errors(model, small_inputs(model, np.random.default_rng(0)), low)) < 3e-3
    converted(model, "bf16")


def test_function_with_a_weight_beyond_half_stays_float32():
    model = _with_function("RmsNorm", ", w2", "float[2,8] y, float[2,8] z")
    gain = np.full(8, 1e5, np.float32)
    model.graph.initializers["w2"].const_value = ir.tensor(gain, name="w2")
    low, notes = converted(model)
    assert "w2" in notes[0]
    (node,) = [n for n in low.graph if n.domain == "normfuse"]
    assert {v.dtype for v in (*node.inputs, *node.outputs)} == {ir.DataType.FLOAT}
    assert np.isfinite(run(low, small_inputs(model, np.random.default_rng(0)))[0]).all()


def test_foreign_functions_are_islands():
    model = graph(
        "h = MatMul(x, w0)  e = mine.Twice(h)  y = MatMul(e, w0)",
        weights=[np.eye(8, dtype=np.float32)],
        domains=', "mine": 1',
        functions='<domain: "mine", opset_import: ["": 21]> Twice (a) => (b) { k = Constant<value_float = 2.0>()  b = Mul(a, k) }',
    )
    for node in model.graph:
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape((2, 8))
    low, _ = converted(model)
    assert dtypes(low)["MatMul"] == ["FLOAT16", "FLOAT16"]
    assert errors(model, small_inputs(model, np.random.default_rng(0)), low)[0] < 2e-3


# --- graphs by chance -------------------------------------------------------------------------------------------------

STEPS = (
    "MatMul(a, w0)", "Add(a, b)", "Mul(a, b)", "Sub(a, b)", "Relu(a)", "Sigmoid(a)", "Tanh(a)", "Softmax(a)", "Abs(a)", "Gelu(a)",
    "LayerNormalization(a, w1, w1)", "ReduceMean<keepdims=1>(a, last)", "Mul(a, a)", "Add(a, tiny)", "Mul(a, big)", "Transpose(a)",
    "Concat<axis=0>(a, b)", "Where(c, a, b)", "Where(c, a, low)", "Clip(a, tiny, big)", "Max(a, b)", "Neg(a)", "Identity(a)",
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=9), st.booleans())
@settings(max_examples=40)
def test_random_graphs_stay_valid(steps, low_io):
    """Whatever stands beside whatever: the file is valid, strongly typed, and its values are those of float32 or out of range."""
    values, lines = ["x"], []
    for i, (step, a, b) in enumerate(steps):
        pick = {"a": values[a % len(values)], "b": values[b % len(values)]}
        name, _, rest = step.partition("(")
        args = ", ".join(pick.get(arg, arg) for arg in rest[:-1].split(", "))
        lines.append(f"v{i} = {name}({args})")
        # everything is 4 x 4 again, so that all fits to all
        if name.startswith("Concat"):
            lines.append(f"s{i} = Slice(v{i}, zero, four, zero)")
        elif name.startswith("ReduceMean"):
            lines.append(f"s{i} = Expand(v{i}, shape)")
        values.append(f"s{i}" if name.startswith(("Concat", "ReduceMean")) else f"v{i}")
    lines.append(f"y = Identity({values[-1]})")
    constants = (
        "float tiny = {1e-12}, float big = {1e6}, float low = {-3.4e38}, int64[1] last = {-1}, int64[1] zero = {0},"
        " int64[1] four = {4}, int64[2] shape = {4, 4}"
    )
    signature = f"g (float[4,4] x, bool[4,4] c) => (float[4,4] y) <{constants}>"
    text = f'<ir_version: 10, opset_import: ["": 21]> {signature} {{ {" ".join(lines)} }}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(len(steps))
    for i, w in enumerate((rng.standard_normal((4, 4)), np.ones(4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(w.astype(np.float32), f"w{i}"))
    for i, node in enumerate(proto.graph.node):
        node.name = f"/m/{i}/{node.op_type}"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    x, c = rng.standard_normal((4, 4)).astype(np.float32), rng.random((4, 4)) < 0.7
    low, _ = converted(model, io_dtype="low" if low_io else "fp32")
    got = run(low, {"x": x.astype(np.float16) if low_io else x, "c": c})[0]
    want = run(model, {"x": x, "c": c})[0]
    assert got.shape == want.shape
    if np.isfinite(want).all() and np.abs(want).max() < 1e3:
        assert np.isfinite(got).all()
