"""Plugin nodes in ONNX files, and engines of the real builder with them. Each engine is built in a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from normfuse.errors import ExportError, UsageError
from normfuse.quant.packing import pack
from normfuse.quant.weight import QuantizedWeight

pytest.importorskip("triton", reason="compiles kernels")
ir = pytest.importorskip("onnx_ir", reason="writes ONNX files")
onnx = pytest.importorskip("onnx", reason="writes ONNX files")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - behind importorskip

from normfuse.export.onnx.own_nodes import add_functions  # noqa: E402
from normfuse.export.tensorrt.plugins.placing import kernel_capabilities, place  # noqa: E402
from normfuse.gpu.planes import layout  # noqa: E402

D, OUT, ROWS = 64, 48, 6
TYPES = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
ALL = ("rms_norm", "crms_norm", "l1_norm", "rms_norm_linear", "shiftquant_linear", "two_pass_softmax")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are compiled once for the whole file, and nothing is left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORMFUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _node(op: str, inputs: list[str], outputs: list[str], module: str, domain: str = "normfuse", **attributes: Any) -> Any:
    return helper.make_node(op, inputs, outputs, domain=domain, name=f"/{module.replace('.', '/')}/{op}", **attributes)


def _weights(npdtype: Any, *, linear: bool = True) -> list[Any]:
    rng = np.random.default_rng(0)
    codes = torch.tensor(rng.integers(-7, 8, (OUT, D)), dtype=torch.int8)
    exponents = torch.tensor(rng.integers(0, 3, D), dtype=torch.uint8)
    packed = pack(QuantizedWeight(codes=codes, exponents=exponents, scale=torch.ones(OUT), bits=4))
    arrays = {
        "gain": rng.standard_normal(D).astype(npdtype),
        "shift": rng.standard_normal(D).astype(npdtype),
        "w": rng.standard_normal((D, D)).astype(npdtype),
        "packed": packed.numpy(),
        "exponents": exponents.numpy(),
        "scale": rng.random(OUT).astype(np.float32),
        "bias": rng.random(OUT).astype(np.float32),
        "b": rng.random(D).astype(npdtype),
    }
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def _model(nodes: list[Any], dtype: str, out: str, *, width: int | str = D, last: int = D, **shapes: int) -> Any:
    """x [B, 6, D] -> out; values in between have D features, or what `shapes` says."""
    code, npdtype = TYPES[dtype]
    inner = [v for n in nodes for v in n.output if v and v != out]
    read = {v for n in nodes for v in n.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", code, ["B", ROWS, width])],
        [helper.make_tensor_value_info(out, code, ["B", ROWS, last])],
        [w for w in _weights(npdtype) if w.name in read],
        value_info=[helper.make_tensor_value_info(v, code, ["B", ROWS, shapes.get(v, width)]) for v in inner],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("normfuse", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=11))


def _everything(dtype: str) -> Any:
    return _model(
        [
            _node("RmsNorm", ["x", "gain", "x"], ["y1", "s1"], "blocks.0.norm1", eps=1e-6),
            _node("CrmsNorm", ["y1"], ["y2"], "blocks.0.norm2", eps=1e-6),
            _node("L1Norm", ["y2", "gain", "shift"], ["y3"], "blocks.0.norm3", eps=1e-6, scale_const=1.25),
            _node("TwoPassSoftmax", ["y3"], ["y4"], "blocks.0.attn"),
            _node("RmsNormLinear", ["y4", "w", "b"], ["y5"], "blocks.0.mlp", eps=1e-6, epilogue="gelu"),
            helper.make_node("Add", ["y5", "s1"], ["y6"], name="/blocks/0/Add"),
            _node("RMSNormalization", ["y6", "gain"], ["y7"], "norm", domain="", axis=-1, epsilon=1e-6),
            _node(
                "ShiftQuantLinear", ["y7", "packed", "exponents", "scale", "bias"], ["z"], "head.0", bits=4, activation_bits=8,
                epilogue="relu",
            ),
            _node(
                "ShiftQuantLinear", ["y7", "packed", "exponents", "scale", "", "z"], ["y"], "head.1", bits=4, activation_bits=8,
                epilogue="none", input_scale=0.05,
            ),
        ],
        dtype,
        "y",
        last=OUT,
        z=OUT,
    )  # fmt: skip


PLACED = {
    "/blocks/0/norm1/RmsNorm": "RmsNorm",
    "/blocks/0/norm2/CrmsNorm": "CrmsNorm",
    "/blocks/0/norm3/L1Norm": "L1Norm",
    "/blocks/0/attn/TwoPassSoftmax": "TwoPassSoftmax",
    "/blocks/0/mlp/RmsNormLinear": "RmsNormLinear",
    "/norm/RMSNormalization": "RmsNorm",
    "/head/0/QuantizeRows": "QuantizeRows",
    "/head/0/ShiftQuantLinear": "ShiftQuantMatMul",
    "/head/1/QuantizeRows": "QuantizeRows",
    "/head/1/ShiftQuantLinear": "ShiftQuantMatMul",
}


def _built(model: Any, folder: Path) -> tuple[bytes, dict[str, str]]:
    """The plan, and the type of the layer of each ONNX node."""
    pytest.importorskip("tensorrt_rtx", reason="builds engines")
    from normfuse.export.tensorrt.builder import ask
    from normfuse.export.tensorrt.layers import layers

    ir.save(model, folder / "m.onnx")
    request = {
        "onnx": str(folder / "m.onnx"),
        "plan": str(folder / "m.engine"),
        "log": str(folder / "m.log"),
        "profiles": {"x": [[1, ROWS, D], [2, ROWS, D], [4, ROWS, D]]},
        "capabilities": [],
        "plugins": True,
    }
    answer = ask("tensorrt_rtx", "build", request)
    assert not answer["warnings"]
    return (folder / "m.engine").read_bytes(), {name: layer.type for layer in layers(answer["facts"]) for name in layer.onnx}


@functools.lru_cache(maxsize=3)
def _engine(dtype: str, folder: Path) -> tuple[Any, bytes, dict[str, str]]:
    model = _everything(dtype)
    place(model, ALL, dtype=dtype, capabilities=(80, 90) if dtype == "fp16" else (80,))
    return (model, *_built(model, folder))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, bytes, dict[str, str]]]:
    folders = {dtype: tmp_path_factory.mktemp(dtype) for dtype in TYPES}
    return lambda dtype: _engine(dtype, folders[dtype])


@pytest.mark.parametrize("dtype", [pytest.param(d, id=d) for d in TYPES])
@pytest.mark.parametrize("node", [pytest.param(n, id=n) for n in PLACED])
def test_engine_holds_the_kernel_of_every_op(dtype: str, node: str, engine: Callable[[str], Any]) -> None:
    model, plan, found = engine(dtype)
    assert found[node] == "custom_layer"
    (placed,) = (n for n in model.graph if n.name == node)
    assert placed.op_type == PLACED[node]
    images = [i for i in placed.attributes["ptx"].as_string().split("\0") if i]
    assert len(images) == len(placed.attributes["images"].as_ints()) // 5
    twice = 1 + (len(placed.attributes["grid"].as_ints()) > 2)  # one launch for many rows, one for few
    assert twice == 1 + (placed.op_type in ("RmsNormLinear", "ShiftQuantMatMul"))
    assert [i.partition(".target ")[2].partition("\n")[0] for i in images] == (
        ["sm_80", "sm_90a"] if dtype == "fp16" else ["sm_80"]
    ) * twice
    assert all(i.encode() in plan for i in images)


@pytest.mark.parametrize("dtype", [pytest.param(d, id=d) for d in TYPES])
def test_every_node_is_placed_and_counted(dtype: str) -> None:
    model = _everything(dtype)
    count = place(model, ALL, dtype=dtype, capabilities=(80,))
    assert count == {n: list(PLACED.values()).count(n) for n in PLACED.values()}
    assert {n.name: n.op_type for n in model.graph if n.domain == "normfuse"} == PLACED


def test_every_architecture_that_differs_is_carried(tmp_path: Path) -> None:
    model = _model([_node("TwoPassSoftmax", ["x"], ["y"], "attn")], "fp32", "y")
    place(model, ["two_pass_softmax"], dtype="fp32")
    (node,) = model.graph
    numbers = node.attributes["images"].as_ints()
    carried = dict(zip(numbers[0::5], numbers[1::5], strict=True))
    assert [c for c, exact in carried.items() if exact] == [90, 100, 120]
    assert min(carried) == 80  # every GPU has one: 86 and 89 theirs or that of 80
    plan, found = _built(model, tmp_path)
    assert found == {"/attn/TwoPassSoftmax": "custom_layer"}
    for image in filter(None, node.attributes["ptx"].as_string().split("\0")):
        assert image.encode() in plan


def test_only_named_ops_are_placed_and_their_bodies_go(tmp_path: Path) -> None:
    """The others keep theirs, which TensorRT writes out."""
    nodes = [
        _node("RmsNorm", ["x", "gain"], ["a"], "norm1", eps=1e-6),
        _node("CrmsNorm", ["a", "gain"], ["c"], "norm2", eps=1e-6),
        _node("RmsNorm", ["c"], ["y"], "norm3", eps=1e-6),
    ]
    model = _model(nodes, "fp32", "y")
    add_functions(model, 23)
    assert {name for _, name, _ in model.functions} == {"RmsNorm", "CrmsNorm"}
    assert place(model, ["rms_norm"], dtype="fp32", capabilities=(80,)) == {"RmsNorm": 2}
    assert {name for _, name, _ in model.functions} == {"CrmsNorm"}
    _, found = _built(model, tmp_path)
    assert [name for name, kind in found.items() if kind == "custom_layer"] == ["/norm1/RmsNorm", "/norm3/RmsNorm"]


def test_nothing_named_changes_nothing() -> None:
    model = _everything("fp16")
    before = ir.to_proto(model).SerializeToString()
    assert place(model, [], dtype="fp16") == {}
    assert ir.to_proto(model).SerializeToString() == before


def test_weights_are_packed_once_for_layers_that_share_them() -> None:
    model = _everything("fp16")
    place(model, ["shiftquant_linear"], dtype="fp16", capabilities=(80,))
    assert {"packed", "exponents"}.isdisjoint(model.graph.initializers)
    products = [n for n in model.graph if n.op_type == "ShiftQuantMatMul"]
    assert products[0].inputs[2] is products[1].inputs[2]
    (planes,) = (v for v in model.graph.initializers.values() if v.name.endswith("planes"))
    assert planes.const_value.nbytes == OUT * layout(4).tile // 2  # 4 bits a code


def test_rows_that_two_layers_read_are_quantized_once() -> None:
    nodes = [
        _node(
            "ShiftQuantLinear",
            ["x", "packed", "exponents", "scale", *rest],
            [out],
            name,
            bits=4,
            activation_bits=8,
            epilogue="none",
        )
        for rest, out, name in (([], "a", "q"), (["", "a"], "y", "k"))
    ]
    model = _model(nodes, "fp16", "y", last=OUT, a=OUT)
    assert place(model, ["shiftquant_linear"], dtype="fp16", capabilities=(80,)) == {"QuantizeRows": 1, "ShiftQuantMatMul": 2}


def test_layer_that_is_called_twice_has_names_for_both(tmp_path: Path) -> None:
    call = {"bits": 4, "activation_bits": 8, "epilogue": "none"}
    nodes = [
        _node("ShiftQuantLinear", ["x", "packed", "exponents", "scale"], ["a"], "fc", **call),
        helper.make_node("Neg", ["x"], ["n"], name="/Neg"),
        _node("ShiftQuantLinear", ["n", "packed", "exponents", "scale", "", "a"], ["y"], "fc", **call),
    ]
    nodes[2].name = "/fc/ShiftQuantLinear_1"
    model = _model(nodes, "fp16", "y", last=OUT, a=OUT)
    assert place(model, ["shiftquant_linear"], dtype="fp16", capabilities=(80,)) == {"QuantizeRows": 2, "ShiftQuantMatMul": 2}
    ir.save(model, tmp_path / "m.onnx")
    names = [name for node in onnx.load(tmp_path / "m.onnx").graph.node for name in (node.name, *node.output)]
    assert len(names) == len(set(names))


def test_operands_of_other_types_are_cast(tmp_path: Path) -> None:
    """A float32 residual in a float16 model, a float16 bias of a product, and a reader that expects float32."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT, name="/Cast"),
        _node("RmsNorm", ["x", "gain", "wide"], ["a", "s"], "norm", eps=1e-6),
        helper.make_node("Add", ["s", "wide"], ["t"], name="/Add"),
        helper.make_node("Cast", ["t"], ["t16"], to=TensorProto.FLOAT16, name="/Cast_1"),
        helper.make_node("Add", ["a", "t16"], ["c"], name="/Add_1"),
        _node(
            "ShiftQuantLinear",
            ["c", "packed", "exponents", "scale", "bias"],
            ["y"],
            "fc",
            bits=4,
            activation_bits=8,
            epilogue="none",
        ),
    ]
    model = _model(nodes, "fp16", "y", last=OUT)
    for node in model.graph:
        for value in node.outputs:
            if value.name in ("wide", "s", "t"):
                value.dtype = ir.DataType.FLOAT
    bias = model.graph.initializers["bias"]
    bias.const_value = ir.tensor(bias.const_value.numpy().astype(np.float16), name="bias")
    bias.dtype = ir.DataType.FLOAT16
    place(model, ["rms_norm", "shiftquant_linear"], dtype="fp16", capabilities=(80,))
    _, found = _built(model, tmp_path)
    assert found["/norm/RmsNorm"] == found["/fc/ShiftQuantLinear"] == "custom_layer"


def test_output_of_the_model_keeps_its_name_and_type() -> None:
    model = _model([_node("TwoPassSoftmax", ["x"], ["y"], "attn")], "fp16", "y")
    (out,) = model.graph.outputs
    out.dtype = ir.DataType.FLOAT
    place(model, ["two_pass_softmax"], dtype="fp16", capabilities=(80,))
    (out,) = model.graph.outputs
    assert (out.name, out.dtype, out.producer().op_type) == ("y", ir.DataType.FLOAT, "Cast")
    assert out.producer().inputs[0].dtype == ir.DataType.FLOAT16


def test_sum_without_residual_is_the_input() -> None:
    model = _model([_node("RmsNorm", ["x"], ["y", "s"], "norm", eps=1e-6)], "fp32", "y")
    model.graph.outputs.append(model.graph[0].outputs[1])
    place(model, ["rms_norm"], dtype="fp32", capabilities=(80,))
    total = model.graph.outputs[1]
    assert (total.name, total.producer().op_type, total.producer().inputs[0].name) == ("s", "Identity", "x")


def _float64(model: Any) -> None:
    model.graph.inputs[0].dtype = ir.DataType.DOUBLE


def _without_shape(model: Any) -> None:
    model.graph.inputs[0].shape = None


def _computed_weight(model: Any) -> None:
    node = model.graph[0]
    made = ir.node("Identity", [node.inputs[1]], num_outputs=1)
    model.graph.insert_before(node, [made])
    node.replace_input_with(1, made.outputs[0])


NORM = _node("RmsNorm", ["x"], ["y"], "blocks.3.norm1", eps=1e-6)
LINEAR = _node(
    "ShiftQuantLinear", ["x", "packed", "exponents", "scale"], ["y"], "blocks.3.fc", bits=4, activation_bits=8, epilogue="none"
)
STANDARD = _node("RMSNormalization", ["x", "gain"], ["y"], "blocks.3.norm1", domain="", axis=1, epsilon=1e-6)


@pytest.mark.parametrize(
    ("node", "width", "change", "name", "message"),
    [
        pytest.param(NORM, "T", None, "rms_norm", r"blocks\.3\.norm1 .*last axis of its input x is T", id="dynamic features"),
        pytest.param(NORM, D, _without_shape, "rms_norm", "nothing is known of the shape", id="no shape"),
        pytest.param(NORM, D, _float64, "rms_norm", r"blocks\.3\.norm1 .*input x is double", id="float64"),
        pytest.param(STANDARD, D, None, "rms_norm", "normalizes from axis 1 on", id="several axes"),
        pytest.param(
            LINEAR, D, _computed_weight, "shiftquant_linear", r"blocks\.3\.fc .*its weight is computed", id="computed weight"
        ),
    ],
)
def test_refusal_names_the_module_and_the_way_out(
    node: Any, width: int | str, change: Callable[[Any], None] | None, name: str, message: str
) -> None:
    model = _model([node], "fp32", "y", width=width)
    if change is not None:
        change(model)
    with pytest.raises(ExportError, match=message) as error:
        place(model, [name], dtype="fp32", capabilities=(80,))
    assert f"leave {name} out of plugins" in str(error.value)


@pytest.mark.parametrize(
    ("names", "capabilities", "message"),
    [
        pytest.param(["rms"], (80,), "expected names of rms_norm, crms_norm", id="name"),
        pytest.param(["rms_norm"], (75,), "expected some of 80, 86", id="capability"),
        pytest.param(["rms_norm"], (), "expected some of 80, 86", id="no capability"),
    ],
)
def test_wrong_arguments_are_refused(names: list[str], capabilities: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        place(_model([NORM], "fp32", "y"), names, dtype="fp32", capabilities=capabilities)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        pytest.param((), (80, 86, 89, 90, 100, 120), id="none"),
        pytest.param(("8.9",), (80, 89), id="one"),
        pytest.param(("12.1",), (80,), id="one that has no kernel of its own"),
    ],
)
def test_kernels_for_the_targets_of_an_engine(targets: tuple[str, ...], expected: tuple[int, ...]) -> None:
    assert kernel_capabilities(targets) == expected


def test_target_that_no_kernel_runs_on_is_refused() -> None:
    with pytest.raises(UsageError, match=r"plugins for compute capability 7\.5: .* need 8\.0 or newer"):
        kernel_capabilities(("7.5", "8.6"))


def test_damaged_plugin_node_is_refused_and_the_builder_lives_on(tmp_path: Path) -> None:
    model = _model([NORM], "fp32", "y")
    place(model, ["rms_norm"], dtype="fp32", capabilities=(80,))
    del model.graph[0].attributes["ptx"]
    with pytest.raises(ExportError, match=r"blocks\.3\.norm1"):
        _built(model, tmp_path)
