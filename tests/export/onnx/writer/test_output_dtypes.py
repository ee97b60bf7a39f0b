"""Outputs of a file have the dtypes of the module's outputs."""

import onnx
import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.export import to_onnx


class Reduced(nn.Module):
    """What torch computes in float32 for a half, as an output and as a value inside."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x.sum(1, keepdim=True)
        return (
            x.amax(1),
            x.amin(1),
            total,
            x.prod(1),
            x.cumsum(1),
            torch.cosine_similarity(x, x.flip(1), 1),
            x.mean(1),
            total * x,
            total,
        )


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_reductions_keep_their_dtype(dtype, opset, tmp_path):
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    exported = to_onnx(normfuse.optimize(Reduced(), (x,)), tmp_path / "m.onnx", opset=opset)
    assert exported.error is not None
    wanted = {torch.float16: onnx.TensorProto.FLOAT16, torch.float64: onnx.TensorProto.DOUBLE}[dtype]
    outputs = onnx.load(exported.path).graph.output
    assert len(outputs) == 9
    assert {o.type.tensor_type.elem_type for o in outputs} == {wanted}
