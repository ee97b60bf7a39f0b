"""What the real builder makes of quantized models: which layers stay integers, and how many bytes they take."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import ExportError, UsageError
from normfuse.export import Engine, to_tensorrt
from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.onnx.program import program
from normfuse.export.onnx.quantized.forms import possible_forms
from normfuse.export.targets import TARGETS
from normfuse.export.tensorrt import build_onnx
from tests.export.quantized_models import linear

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
onnx = pytest.importorskip("onnx")
timm = pytest.importorskip("timm")

DEPTH = 1
LINEARS = 4 * DEPTH + 1
PRODUCTS = ("runtime_fusion", "gemm", "correlation")
SPECS = {
    "w4a8": {"weight_bits": 4},
    "w6a8": {"weight_bits": 6},
}


@functools.cache
def _vit() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=DEPTH).eval()
    return model, torch.randn(2, 3, 32, 32)


@functools.cache
def _quantized(**spec: Any) -> nn.Module:
    model, x = _vit()
    return normfuse.optimize(
        model, (x,), quantize=normfuse.ShiftQuant(prefer="size", exponents="range", **spec), calibration=[x], verify="off"
    )


def _engine(model: nn.Module, folder: Path, dtype: str, **options: Any) -> Engine:
    return to_tensorrt(model, folder / "model.engine", dtype=dtype, force=True, progress=False, **options)


@functools.cache
def _plain(dtype: str) -> tuple[int, int]:
    """Weight bytes and fused layers of the float model."""
    import tempfile

    model, x = _vit()
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(normfuse.optimize(model, (x,), verify="off"), Path(folder), dtype, verify=False)
    assert engine.weight_bytes is not None
    return engine.weight_bytes, len(engine.layers)


def _holding(engine: Engine, kind: str) -> list[Any]:
    return [layer for layer in engine.layers if kind in layer.constants]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [pytest.param(s, d, id=f"{s}-{d}") for s, d in (("w4a8", "fp16"), ("w4a8", "fp32"), ("w6a8", "fp16"))],
)
def test_every_linear_layer_multiplies_by_packed_weights(spec: str, dtype: str, tmp_path: Path) -> None:
    engine = _engine(_quantized(**SPECS[spec]), tmp_path, dtype, verify=(spec, dtype) == ("w4a8", "fp16"))
    assert engine.form == "weight_only"
    wanted = "Int4" if spec == "w4a8" else "Int8"
    fused = [layer for layer in _holding(engine, wanted) if layer.type == "runtime_fusion"]
    assert len(fused) == LINEARS
    if spec == "w4a8":
        assert len(_holding(engine, "Int4")) == LINEARS  # nothing unpacks a weight beside its product
        assert len(_holding(engine, "Int8")) == 1  # the patch embedding
    else:
        assert len(_holding(engine, "Int8")) == LINEARS + 1
    bytes_, layers = _plain("fp16")
    assert engine.weight_bytes is not None
    # 4 bits, a scale for 64 of them, and the patch embedding in 8 bits
    assert engine.weight_bytes / bytes_ < (0.31 if spec == "w4a8" else 0.55)
    if dtype == "fp16":
        # a product of packed weights leaves its bias and activation to the next kernel; the patch embedding is unpacked in one
        assert len(engine.layers) <= layers + LINEARS


def test_static_scales_give_integer_products(tmp_path: Path) -> None:
    engine = _engine(_quantized(weight_bits=8, groups=1, activations="static"), tmp_path, "fp16", verify=False)
    assert engine.form == "qdq"
    fused = [layer for layer in _holding(engine, "Int8") if layer.type in PRODUCTS]
    assert [layer.type for layer in fused].count("gemm") == LINEARS
    assert [layer.type for layer in fused].count("correlation") == 1
    bytes_, layers = _plain("fp16")
    assert engine.weight_bytes is not None
    assert engine.weight_bytes / bytes_ < 0.55
    assert len(engine.layers) <= layers + LINEARS


class Residual(nn.Module):
    """Two convolutions and an addition, as in a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.down = nn.Conv2d(3, 32, 3, 2, 1), Residual(32), nn.Conv2d(32, 64, 1, 2)
        self.second, self.head = Residual(64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.down(self.first(torch.relu(self.stem(x))))).mean((2, 3)))


def _net(**spec: Any) -> nn.Module:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    quantize = normfuse.ShiftQuant(prefer="size", exponents="range", **spec) if spec else None
    return normfuse.optimize(ResNet().eval(), (x,), quantize=quantize, calibration=[x], verify="off")


def test_convolutions(tmp_path: Path) -> None:
    plain = _engine(_net(), tmp_path, "fp32", verify=False)
    # 4 bits in 4 groups are an int8, shifted
    static = _engine(_net(weight_bits=4, groups=4, activations="static"), tmp_path, "fp32")
    assert static.form == "qdq"
    assert [layer.type for layer in _holding(static, "Int8")].count("correlation") == 6
    dynamic = _engine(_net(weight_bits=8), tmp_path, "fp16", verify=False)
    assert dynamic.form == "weight_only"
    held = _holding(dynamic, "Int8")
    assert [layer.type for layer in held].count("kgen") == 6  # a convolution has its weight unpacked in front of it
    assert [layer.type for layer in held].count("runtime_fusion") == 1
    assert plain.weight_bytes is not None
    for engine in (static, dynamic):
        assert engine.weight_bytes is not None
        assert engine.weight_bytes < 0.4 * plain.weight_bytes


def test_rows_of_a_table_stay_packed(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(512, 64), nn.Linear(64, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    ids = torch.randint(0, 512, (2, 8))
    spec = normfuse.ShiftQuant(prefer="size", embedding_bits=4)
    engine = _engine(normfuse.optimize(Text().eval(), (ids,), quantize=spec, verify="off"), tmp_path, "fp16", verify=False)
    held = _holding(engine, "Int4")
    assert sorted(layer.type for layer in held) == ["kgen", "runtime_fusion"]
    assert any("Gath" in layer.name for layer in held)  # rows are unpacked behind the gather
    assert engine.weight_bytes is not None
    assert engine.weight_bytes < 512 * 64 + 64 * 32  # less than 8 bits a weight


def test_forms_that_tensorrt_does_not_take() -> None:
    model = quantized_layers(program(linear(8, 16).eval(), (torch.randn(2, 16),)).exported)
    target = TARGETS["tensorrt"]
    assert possible_forms(model, target, 23, "auto") == ("weight_only",)
    for form, words in (
        ("integer", "form='qdq' or form='weight_only'"),
        ("native", "form='qdq' or form='weight_only'"),
        ("qdq", "form='weight_only'"),
        ("packed", "unknown form"),
    ):
        with pytest.raises(UsageError, match=words):
            possible_forms(model, target, 23, form)
    with pytest.raises(UsageError, match="packs its weights anyway"):
        possible_forms(model, target, 23, "weight_only", int4=True)


def test_the_builder_has_no_integer_product(tmp_path: Path) -> None:
    """Why the target does not take the integer form."""
    h = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((8, 8), np.int8), "w")
    x, y = (
        h.make_tensor_value_info("x", onnx.TensorProto.INT8, [2, 8]),
        h.make_tensor_value_info("y", onnx.TensorProto.INT32, [2, 8]),
    )
    model = h.make_model(h.make_graph([h.make_node("MatMulInteger", ["x", "w"], ["y"])], "g", [x], [y], [weight]))
    file = tmp_path / "integer.onnx"
    onnx.save(model, file)
    with pytest.raises(ExportError, match="MatMulInteger"):
        build_onnx(file, tmp_path / "integer.engine", progress=False)
