"""Pooling that ONNX has no operator for."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from normfuse.errors import ExportError
from normfuse.export import to_onnx


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 3, 5), (None, 1, 4)])
def test_means_of_volumes_in_unequal_bins(tmp_path, size, dtype):
    volume = torch.randn(2, 3, 6, 4, 7).to(dtype)
    made = to_onnx(
        nn.AdaptiveAvgPool3d(size).eval(), tmp_path / "m.onnx", example_inputs=(volume,), target="portable", progress=False
    )
    assert made.ops == {"MatMul": 3, "Reshape": 2}
    assert made.error.max_rel < 1e-6


def test_bins_that_depend_on_the_input_are_refused(tmp_path):
    shapes = {0: None, 2: torch.export.Dim("depth", min=4, max=64)}
    volume = torch.randn(2, 3, 6, 4, 7)
    with pytest.raises(ExportError, match="fix depth, height and width"):
        to_onnx(
            nn.AdaptiveAvgPool3d((3, 4, 5)).eval(),
            tmp_path / "m.onnx",
            example_inputs=(volume,),
            dynamic_shapes=(shapes,),
            progress=False,
        )
    assert not list(tmp_path.iterdir())
