"""What an engine of a real ViT must be: small, of few layers, with fused attention, without LayerNorms, and the same each time."""

from pathlib import Path

import pytest
import torch

import normfuse
from normfuse.export.tensorrt import Engine, build_onnx

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
timm = pytest.importorskip("timm")
pytestmark = pytest.mark.slow
DEPTH, NORMS = 12, 25
SHAPES = {"x": ((1, 3, 224, 224), (8, 3, 224, 224), (64, 3, 224, 224))}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ViT-tiny before and after, as ONNX; compared with the module by `to_onnx`."""
    torch.manual_seed(0)
    original = timm.create_model("vit_tiny_patch16_224").eval()
    inputs, shapes = (torch.randn(2, 3, 224, 224),), ({0: torch.export.Dim("batch", min=1, max=64)},)
    models = {"original": original, "optimized": normfuse.optimize(original, inputs, dynamic_shapes=shapes)}
    folder = tmp_path_factory.mktemp("vit")
    for name, model in models.items():
        normfuse.export.to_onnx(
            model, folder / f"{name}.onnx", target="tensorrt", attention="attention23", example_inputs=inputs, dynamic_shapes=shapes
        )
    return {name: folder / f"{name}.onnx" for name in models}


def _engine(file: Path, folder: Path, dtype: str) -> Engine:
    return build_onnx(file, folder / f"{file.stem}.engine", dtype=dtype, shapes=SHAPES, force=True, progress=False)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_vit_tiny(files: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    before = _engine(files["original"], tmp_path, dtype)
    after = _engine(files["optimized"], tmp_path, dtype)
    assert before.kinds["LayerNormalization"] == NORMS
    assert "LayerNormalization" not in after.kinds
    assert after.kinds["RMSNormalization"] == NORMS
    assert len(after.layers) <= len(before.layers)
    if dtype != "fp32":  # there is no fused kernel for attention in float32
        assert before.kinds["fused attention"] == after.kinds["fused attention"] == DEPTH
        assert after.weight_bytes is not None
        assert after.weight_bytes < 0.51 * files["optimized"].stat().st_size
    gelu = [layer for layer in after.layers if any(node.endswith("/Gelu") for node in layer.onnx)]
    assert [layer.type for layer in gelu] == ["runtime_fusion"] * DEPTH, "GELU stands alone"


def test_hashes_are_reproducible(files: dict[str, Path], tmp_path: Path) -> None:
    first, second = (_engine(files["optimized"], tmp_path, "fp16") for _ in range(2))
    assert first.sha256 == second.sha256
