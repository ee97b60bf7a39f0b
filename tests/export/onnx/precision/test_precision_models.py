"""Real architectures in half precision, in ONNX Runtime and in the builder of TensorRT-RTX."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import nn

from tests.export.onnx.precision.precision_graphs import Big, Rms, converted, dtypes, errors, exported, ir
from tests.zoo_entry import randomise_norms

pytestmark = pytest.mark.filterwarnings("ignore")


def _convnext():
    timm = pytest.importorskip("timm")
    model = timm.models.convnext.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), use_grn=True, ls_init_value=None, num_classes=5
    )
    return model, (torch.randn(1, 3, 64, 64),)


def _swin():
    timm = pytest.importorskip("timm")
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )
    return model, (torch.randn(1, 3, 32, 32),)


def _bert():
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 3:] = 0
    return hf.BertModel(config), {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": mask}


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


def _unet():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), Gate(8), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8, affine=True)]
    layers += [nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Upsample(scale_factor=2, mode="bilinear")]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 2), nn.Hardswish()), (torch.randn(1, 3, 16, 16),)


def _vit():
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5
    )
    return model, (torch.randn(1, 3, 32, 32),)


REAL = {"bert": _bert, "convnext": _convnext, "swin": _swin, "unet": _unet, "vit": _vit}


@functools.cache
def real(name):
    torch.manual_seed(0)
    model, inputs = REAL[name]()
    return exported(randomise_norms(model), inputs)


@pytest.mark.parametrize("name", REAL)
def test_real_architectures(name):
    full, feeds = real(name)
    low, notes = converted(full)
    assert notes == ()
    assert max(errors(full, feeds, low)) < 5e-3
    kinds = dtypes(low)
    assert {k for op in ("Conv", "Gemm", "MatMul") for k in kinds.get(op, [])} == {"FLOAT16"}
    converted(full, "bf16")


def _built(model):
    """The plan of TensorRT-RTX and the names of its fused layers."""
    trt = pytest.importorskip("tensorrt_rtx")

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self):
            trt.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, message):
            self.lines.append((int(severity), message))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(ir.to_proto(model).SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, [m for s, m in log.lines if s <= int(trt.ILogger.ERROR)]
    layers = next(m for _, m in log.lines if m.startswith("Layers:"))
    return bytes(plan), layers


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["bert", "convnext", "unet", "vit"])
def test_tensorrt_takes_it(name, dtype):
    low, _ = converted(real(name)[0], dtype)
    _, layers = _built(low)
    if name in ("bert", "vit"):
        assert len(re.findall(r"^Name: _gemm_mha", layers, re.M)) == 2


def test_tensorrt_takes_statistics_by_hand():
    _, layers = _built(converted(exported(Big(Rms(32)), (torch.randn(4, 16),))[0])[0])
    # the cast of the input, two products, and everything of the norm in one kernel
    assert len(re.findall("^Name: ", layers, re.M)) <= 5
