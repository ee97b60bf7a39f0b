"""Files of norms whose weights have another dtype than their input."""

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse.export import to_onnx
from tests.zoo_entry import randomise_norms

NORMS = {
    "layer": lambda: nn.LayerNorm(5),
    "rms": lambda: nn.RMSNorm(5),
    "group": lambda: nn.GroupNorm(2, 6),
    "batch": lambda: nn.BatchNorm1d(6),
    "instance": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
}


class Narrow(nn.Module):
    """A norm on a stream of another dtype."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.dtype = norm, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.to(self.dtype)).float()


@pytest.mark.parametrize(("target", "opset"), [("onnxruntime", 23), ("portable", 17)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_float32_weights_on_a_half_stream(kind, dtype, target, opset, tmp_path):
    model = Narrow(randomise_norms(NORMS[kind]()), dtype).eval()
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    given, inputs = (model, (x,)) if opset == 17 else (normfuse.optimize(model, (x,)), None)
    exported = to_onnx(given, tmp_path / "m.onnx", target=target, opset=opset, example_inputs=inputs)
    assert exported.error is not None
    assert exported.error.max_rel < torch.finfo(dtype).eps


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(("dtype", "weights"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_an_rms_norm_takes_any_two_dtypes(dtype, weights, opset, tmp_path):
    model = Narrow(randomise_norms(nn.RMSNorm(5)).to(weights), dtype).eval()
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    exported = to_onnx(normfuse.optimize(model, (x,)), tmp_path / "m.onnx", opset=opset)
    assert exported.error is not None
    assert exported.error.max_rel < 1e-6
