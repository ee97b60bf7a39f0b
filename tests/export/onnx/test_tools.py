"""Sessions, inspection and the baseline."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.baseline import export_original
from normfuse.export.onnx.compare import deviation, tolerance_for
from normfuse.export.onnx.inspect import norm_counts, op_counts, provenance
from normfuse.export.onnx.runtime import run, session
from tests.export.models import exported
from tests.zoo_entry import randomise_norms


def _model():
    return randomise_norms(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.RMSNorm(8))).eval()


def test_counts(tmp_path):
    result = exported(_model(), (torch.randn(2, 8),), tmp_path)
    assert norm_counts(result.path) == {"LayerNormalization": 1, "RMSNormalization": 1} == result.norms
    assert op_counts(result.path) == op_counts(onnx.load(result.path)) == result.ops
    assert provenance(result.path)["normfuse.target"] == "onnxruntime"


def test_counts_look_into_subgraphs():
    body = helper.make_graph(
        [helper.make_node("LayerNormalization", ["x", "g"], ["y"])], "body", [], [helper.make_tensor_value_info("y", 1, [2])]
    )
    node = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    graph = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])])
    assert norm_counts(helper.make_model(graph)) == {"LayerNormalization": 2}


@pytest.mark.parametrize("content", [None, b"", b"no model at all", b"\x08\x07"])
def test_what_is_no_onnx_file(tmp_path, content):
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"there is no file|is not an ONNX model"):
        op_counts(path)


def test_sessions_take_arrays_and_tensors(tmp_path):
    model, x = _model(), torch.randn(2, 8)
    result = exported(model, (x,), tmp_path)
    opened = session(result.path, threads=1, optimized=False)
    name = result.inputs[0]
    a, b = (run(opened, {name: v})["output"] for v in (x, x.numpy()))
    assert torch.equal(a, b)
    assert opened.get_session_options().intra_op_num_threads == 1
    with pytest.raises(ExportError, match="ONNX Runtime fails on the inputs"):
        run(opened, {name: np.zeros((2, 9), np.float32)})
    with pytest.raises(ExportError, match="does not take the model"):
        session(b"nonsense")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_on_one_side_is_no_small_error(bad):
    assert deviation([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, bad])], ["y"]).max_rel == float("inf")


def test_deviation_is_relative_to_the_largest_value():
    found = deviation([torch.tensor([1.0, -4.0])], [torch.tensor([1.5, -4.0])], ["y"])
    assert (found.max_abs, found.max_rel) == (0.5, 0.125)
    same = torch.tensor([float("nan"), float("inf"), 1.0])
    assert deviation([same], [same.clone()], ["y"]).max_rel == 0


def test_integers_count_what_differs():
    assert deviation([torch.arange(4)], [torch.tensor([0, 1, 2, 9])], ["y"]).max_rel == 0.25


def test_another_shape_is_an_error():
    with pytest.raises(ExportError, match=r"output y on example inputs is float32\[3\] in the file and float32\[2\] in the module"):
        deviation([torch.zeros(2)], [torch.zeros(3)], ["y"])


def test_the_coarsest_dtype_sets_the_tolerance():
    assert tolerance_for([torch.float32, torch.float16]) == tolerance_for([torch.float16])
    assert tolerance_for([torch.int64]) == tolerance_for([torch.float32])


@pytest.mark.filterwarnings("ignore")
def test_the_baseline_is_what_torch_writes(tmp_path):
    model, x = _model().train(), torch.randn(2, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = export_original(model, (x,), path=tmp_path / "o.onnx", dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    opened = session(path, threads=1)
    y = next(iter(run(opened, {opened.get_inputs()[0].name: torch.randn(5, 8)}).values()))
    assert y.shape == (5, 8)
    assert provenance(path) == {}
    with pytest.raises(UsageError, match="exists already"):
        export_original(model, (x,), path=path)
