"""Half precision at the edges of a graph: inputs and outputs, models that are half already, integers, subgraphs, functions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfuse.errors import UsageError
from normfuse.export.onnx.precision import to_precision
from tests.export.onnx.precision.precision_graphs import (
    converted,
    dtypes,
    errors,
    graph,
    ir,
    onnx,
    run,
    small_inputs,
)

pytestmark = pytest.mark.filterwarnings("ignore")

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
    from normfuse.export.onnx.own_nodes import add_functions

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
