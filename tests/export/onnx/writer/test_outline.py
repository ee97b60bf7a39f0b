"""A file without its weights."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from normfuse.export import to_onnx
from normfuse.export.onnx.writer.outline import outline

onnx = pytest.importorskip("onnx")


@pytest.fixture
def file(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 40)).eval()
    to_onnx(model, tmp_path / "m.onnx", example_inputs=(torch.randn(2, 64),), progress=False)
    return tmp_path / "m.onnx"


def test_it_says_where_the_weights_stand(file):
    found = outline(file)
    onnx.save(found, file.with_name("outline.onnx"))
    assert file.with_name("outline.onnx").stat().st_size < 8000 < file.stat().st_size
    # read back with the weights at their places it is the file
    whole = onnx.load(file.with_name("outline.onnx"))
    for tensor in whole.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    assert whole == onnx.load(file)


def test_what_is_cut_off_is_no_message(file):
    content = file.read_bytes()
    for length in (1, 20, len(content) // 2):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut off"):
            outline(file)
    file.write_bytes(b"\x0f" + content)
    with pytest.raises(ValueError, match="wire type 7"):
        outline(file)
