"""Names, nesting, dtypes and sizes of inputs and outputs."""

from collections import namedtuple

import onnx
import pytest
import torch
from torch import nn

from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.inspect import provenance
from tests.export.models import AUTO, exported, outputs, relative

Pair = namedtuple("Pair", ["left", "right"])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x, keep=None, *, ids):
        y = self.blocks[1](self.blocks[0](x))
        if keep is not None:
            y = y.masked_fill(~keep[:, None], 0.0)
        return {"y": y, "pair": (y, x), "named": Pair(ids + 1, None), "count": 3, "rows": x.shape[0]}


def _inputs():
    return {"x": torch.randn(2, 4), "keep": torch.tensor([True, False]), "ids": torch.tensor([3, 5])}


def _file(tmp_path, **options):
    batch = torch.export.Dim("batch", min=1, max=8)
    model = Nested().eval()
    return exported(model, _inputs(), tmp_path, dynamic_shapes={k: {0: batch} for k in _inputs()}, **options), model


def test_names_and_values(tmp_path):
    result, model = _file(tmp_path)
    assert result.inputs == ("x", "keep", "ids")
    assert result.outputs == ("y", "pair.0", "pair.1", "named.left")
    assert result.notes == ("outputs that are no tensors were left out: named.right, count, rows",)
    x, keep, ids = torch.randn(5, 4), torch.rand(5) > 0.5, torch.arange(5)
    got, want = outputs(result, x=x, keep=keep, ids=ids), model(x, keep, ids=ids)
    assert relative(got["y"], want["y"]) < 1e-6
    assert torch.equal(got["pair.1"], x)
    assert torch.equal(got["named.left"], ids + 1)
    graph = onnx.load(result.path).graph
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert dims["x"] == ["batch", 4]
    assert dims["keep"] == ["batch"]
    assert dims["y"] == ["batch", 4]


def test_node_names_are_module_paths_and_hold_no_trace_of_the_machine(tmp_path):
    result, _ = _file(tmp_path)
    model = onnx.load(result.path)
    names = [n.name for n in model.graph.node]
    assert names[:2] == ["/blocks/0/Gemm", "/blocks/1/Gemm"]
    assert len(set(names)) == len(names)
    assert {"blocks.0.weight", "blocks.1.bias"} <= {i.name for i in model.graph.initializer}
    assert b".py" not in result.path.read_bytes()


def test_two_exports_are_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval(), torch.randn(2, 4)
    first = exported(model, (x,), tmp_path).path.read_bytes()
    assert exported(model, (x,), tmp_path, force=True).path.read_bytes() == first


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        pytest.param(({0: torch.export.Dim("n"), 1: AUTO},), ["n", "x_1", 4], id="Dim and AUTO"),
        pytest.param({"x": {0: "rows", 1: "columns"}}, ["rows", "columns", 4], id="strings"),
        pytest.param(({1: AUTO},), [2, "x_1", 4], id="one"),
        pytest.param(None, [2, 3, 4], id="none"),
    ],
)
def test_axis_names(tmp_path, shapes, names):
    class Scale(nn.Module):
        def forward(self, x):
            return x * 2

    result = exported(Scale().eval(), (torch.randn(2, 3, 4),), tmp_path, dynamic_shapes=shapes)
    (value,) = onnx.load(result.path).graph.input
    assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == names


def test_provenance(tmp_path):
    result, _ = _file(tmp_path, target="portable", opset=18)
    facts = provenance(result.path)
    assert facts["normfuse.target"] == "portable"
    assert facts["normfuse.opset"] == "18"
    assert float(facts["normfuse.error"]) == pytest.approx(result.error.max_rel, rel=1e-3)
    assert len(facts["normfuse.inputs_sha256"]) == len(facts["normfuse.weights_sha256"]) == 64


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param(torch.float16, 2e-2, id="float16"), pytest.param(torch.float64, 1e-9, id="float64")]
)
def test_dtypes(tmp_path, dtype, bound):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU()).to(dtype).eval()
    result = exported(model, (torch.randn(2, 8).to(dtype),), tmp_path)
    assert result.tolerance == bound
    assert result.error.dtype == str(dtype).removeprefix("torch.")


def test_an_opset_is_recommended_only_if_it_takes_the_dtype(tmp_path):
    class Best(nn.Module):
        def forward(self, x):
            return x.topk(2).values

    with pytest.raises(ExportError, match=r"TopK.*; export in float32$"):
        exported(Best().eval(), (torch.randn(2, 8).bfloat16(),), tmp_path, target="tensorrt", opset=20)
    model, x = nn.Conv2d(3, 4, 3).bfloat16().eval(), torch.randn(1, 3, 8, 8).bfloat16()
    with pytest.raises(ExportError, match=r"Conv.*; export with opset=23, or in float32$"):
        exported(model, (x,), tmp_path, target="tensorrt", opset=20)


def test_inputs_are_asked_for(tmp_path):
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="pass example_inputs"):
        exported(graph, None, tmp_path)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        pytest.param((torch.randn(2, 5),), "does not run on the example inputs", id="shape"),
        pytest.param({"y": torch.randn(2, 2)}, "does not run on the example inputs|cannot capture", id="name"),
        pytest.param("x", "must be a tuple of positional inputs", id="type"),
    ],
)
def test_wrong_inputs(tmp_path, inputs, error):
    graph = torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)).module()
    with pytest.raises((UsageError, ExportError), match=error):
        exported(graph, inputs, tmp_path)


def test_a_module_without_tensor_outputs(tmp_path):
    class Count(nn.Module):
        def forward(self, x):
            return x.shape[0]

    with pytest.raises(ExportError, match="returns no tensor"):
        exported(Count().eval(), (torch.randn(2),), tmp_path)


def test_an_op_without_translation_is_named(tmp_path):
    class Strange(nn.Module):
        def forward(self, x):
            return torch.special.i0e(x)

    with pytest.raises(ExportError, match="i0e"):
        exported(Strange().eval(), (torch.randn(2),), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_module_in_training_mode(tmp_path):
    with pytest.raises(UsageError, match=r"Linear is in training mode: call \.eval\(\)"):
        exported(nn.Linear(2, 2).train(), (torch.randn(2, 2),), tmp_path)


@pytest.mark.parametrize("extreme", [torch.amin, torch.amax])
def test_extremes_over_all_axes(tmp_path, extreme):
    class Extreme(nn.Module):
        def forward(self, x):
            return x - extreme(x), extreme(x, 1)

    x = torch.randn(2, 4, 8)
    result = exported(Extreme().eval(), (x,), tmp_path)
    for found, expected in zip(outputs(result, x=x).values(), Extreme()(x), strict=True):
        torch.testing.assert_close(found, expected)
