"""What the exporter makes of every norm, at every opset and dtype."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfuse.export.onnx.runtime import session
from tests.export.models import AUTO, exported, outputs, relative
from tests.zoo_entry import randomise_norms


class Norm(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call, self.weight = call, nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, x):
        return self.call(x, self.weight)


RMS = {
    "weight": lambda x, w: F.rms_norm(x, (16,), w, 1e-3),
    "plain": lambda x, w: F.rms_norm(x, (16,), None, 1e-3),
    "two axes": lambda x, w: F.rms_norm(x, (5, 16), None, 1e-3),
    "own eps": lambda x, w: F.rms_norm(x, (16,), w),
}


@pytest.mark.parametrize("opset", [17, 18, 23])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(tmp_path, name, opset):
    model = Norm(RMS[name]).eval()
    result = exported(model, (torch.randn(2, 5, 16),), tmp_path, opset=opset, target="portable", dynamic_shapes=({0: AUTO},))
    assert ("RMSNormalization" in result.ops) == (opset == 23)
    assert "ConstantOfShape" not in result.ops  # the exporter's own translation makes a gain as large as the input
    for x in (torch.randn(3, 5, 16), torch.randn(1, 5, 16) * 1e-4):  # so small that eps decides
        assert relative(outputs(result, x=x)["output"], model(x)) < 1e-5


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(
    ("dtype", "small", "bound"),
    [
        pytest.param(torch.float64, 1e-9, 1e-9, id="float64"),
        pytest.param(torch.float16, 1e-3, 5e-3, id="float16"),
    ],
)
def test_rms_norm_without_eps_uses_that_of_the_dtype_that_torch_computes_in(tmp_path, opset, dtype, small, bound):
    model = Norm(RMS["own eps"]).to(dtype).eval()
    result = exported(model, (torch.randn(2, 5, 16).to(dtype),), tmp_path, opset=opset, target="portable")
    x = (torch.randn(2, 5, 16) * small).to(dtype)
    assert relative(outputs(result, x=x)["output"], model(x)) < bound


def test_float16_does_not_overflow_in_the_square(tmp_path):
    model, x = Norm(RMS["weight"]).half().eval(), torch.full((2, 5, 16), 300.0).half()
    result = exported(model, (x,), tmp_path, opset=18, target="portable")
    assert relative(outputs(result, x=x)["output"], model(x)) < 5e-3


def test_onnx_runtime_fuses_the_spelt_out_form_to_one_kernel(tmp_path):
    result = exported(Norm(RMS["weight"]).eval(), (torch.randn(2, 5, 16),), tmp_path, opset=18)
    session(result.path, threads=1, dump=tmp_path / "optimized.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("opset", [17, 20, 23])
@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(lambda: nn.LayerNorm(8), id="layer"),
        pytest.param(lambda: nn.LayerNorm((6, 8), elementwise_affine=False), id="layer2"),
        pytest.param(lambda: nn.GroupNorm(2, 4), id="group"),
        pytest.param(lambda: nn.InstanceNorm2d(4, affine=True), id="instance"),
        pytest.param(lambda: nn.BatchNorm2d(4), id="batch"),
    ],
)
def test_other_norms(tmp_path, norm, opset):
    model = randomise_norms(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), norm())).eval()
    result = exported(model, (torch.randn(2, 4, 6, 8),), tmp_path, opset=opset, dynamic_shapes=({0: AUTO},))
    x = torch.randn(3, 4, 6, 8)
    assert relative(outputs(result, **{result.inputs[0]: x})["output"], model(x)) < 1e-5


class PostLN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x):
        y = self.norm(x + self.fc(x))
        return self.last(y + self.fc(y).tanh())


def test_onnx_runtime_keeps_addition_and_norm_apart(tmp_path):
    model, x = randomise_norms(PostLN()).eval(), torch.randn(2, 5, 16)
    fused = {}
    for target in ("onnxruntime", "portable"):
        result = exported(model, (x,), tmp_path, target=target, opset=20, force=True)
        session(result.path, threads=1, dump=tmp_path / "optimized.onnx")
        fused[target] = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node].count("SkipLayerNormalization")
    assert fused == {"onnxruntime": 0, "portable": 2}  # the second shows that the runtime would have merged them
    session(result.path, threads=1, dump=tmp_path / "optimized.onnx", disabled_optimizers=["SkipLayerNormFusion"])
    assert "SkipLayerNormalization" not in [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_gelu_is_one_kernel(tmp_path, opset, kind):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(approximate=kind)).eval()
    result = exported(model, (torch.randn(2, 8),), tmp_path, opset=opset)
    session(result.path, threads=1, dump=tmp_path / "optimized.onnx")
    ops = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert len(ops) == 2
    assert {"Erf", "Tanh"}.isdisjoint(ops)


class Tiny(nn.Module):
    def forward(self, x):
        return x * 1.000009 / (x.abs().sum(-1, keepdim=True) + 1e-9), (x + 3e-9) - x


@pytest.mark.parametrize("opset", [18, 23])
def test_small_numbers_are_kept(tmp_path, opset):
    """The optimizer of torch's exporter takes 1e-9 for 0 and 1.000009 for 1: a row of zeros then gives NaN."""
    model, x = Tiny().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    result = exported(model, (x,), tmp_path, opset=opset)
    x[1] = 0
    for got, want in zip(outputs(result, x=x).values(), model(x), strict=True):
        assert relative(got, want) < 1e-14
