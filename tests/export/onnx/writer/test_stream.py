"""Files whose weights are written one after the other."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from normfuse.errors import ExportError
from normfuse.export import to_onnx
from normfuse.export.onnx.writer.outline import outline
from normfuse.export.onnx.writer.stream import write_streamed

ir = pytest.importorskip("onnx_ir")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bytes_are_those_of_the_library(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 40)).to(dtype).eval()
    to_onnx(model, tmp_path / "m.onnx", example_inputs=(torch.randn(2, 64).to(dtype),), progress=False, verify=False, dtype=None)
    loaded = ir.load(tmp_path / "m.onnx")
    for value in loaded.graph.initializers.values():  # tensors of a message are copied as they are; these are large ones of arrays
        value.const_value = ir.tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
    kept = {name: value.const_value for name, value in loaded.graph.initializers.items()}
    ir.save(loaded, tmp_path / "theirs.onnx")
    write_streamed(loaded, tmp_path / "ours.onnx")
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert max(v.nbytes for v in kept.values()) > 1024
    assert all(loaded.graph.initializers[name].const_value is v for name, v in kept.items())


def test_no_more_than_one_weight_is_held(tmp_path):
    size, count = 1 << 20, 8
    weights = [ir.Value(name=f"w{i}", const_value=ir.tensor(np.full(size // 4, i, np.float32), name=f"w{i}")) for i in range(count)]
    graph = ir.Graph([], weights, nodes=[], initializers=weights, opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    tracemalloc.start()
    try:
        write_streamed(model, tmp_path / "m.onnx")
        outline(tmp_path / "m.onnx")
        assert tracemalloc.get_traced_memory()[1] < 3 * size
    finally:
        tracemalloc.stop()
    assert (tmp_path / "m.onnx").stat().st_size > count * size


def test_a_weight_of_another_size_is_refused(tmp_path):
    x = ir.val("x", ir.DataType.FLOAT, (1024,))
    wrong = ir.LazyTensor(lambda: ir.tensor(torch.zeros(4).numpy()), ir.DataType.FLOAT, ir.Shape((1024,)), name="w")
    w = ir.Value(name="w", const_value=wrong, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1024,)))
    node = ir.node("Add", [x, w])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20}, name="g")
    with pytest.raises(ExportError, match="weight w has 16 bytes and should have 4096"):
        write_streamed(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
