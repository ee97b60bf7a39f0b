"""ShiftQuant through torchao's quantize_."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normfuse import ShiftQuant
from normfuse.errors import UsageError
from normfuse.quant.quantizer import quantize_weight

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization import quantize_

from normfuse.plugs.torchao import IntegerLinear, ShiftQuantConfig


def model(seed: int = 0, **how: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64, **how), nn.ReLU(), nn.Linear(64, 10)).eval()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("words", "bound"), [("w8a8", 0.02), ("w6a8", 0.05), ("w4a8", 0.2), (ShiftQuant(weight_bits=5), 0.1)])
def test_layers_become_integers_near_the_floats(words: Any, bound: float, seed: int) -> None:
    original, x = model(seed), torch.randn(3, 5, 48)
    quantized = copy.deepcopy(original)
    quantize_(quantized, ShiftQuantConfig(words))
    assert [type(m) for m in quantized] == [IntegerLinear, nn.ReLU, IntegerLinear]
    with torch.inference_mode():
        wanted, found = original(x), quantized(x)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < bound


def test_a_layer_is_what_the_operator_computes() -> None:
    """A row of one number is quantized without a loss, so that the layer gives its own weight."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 4, bias=False)
    holder = nn.Sequential(layer)
    config = ShiftQuantConfig("w4a8")
    quantize_(holder, config)
    wanted = quantize_weight(layer.weight.detach().double(), config.spec).dequantized().float()
    torch.testing.assert_close(holder(torch.eye(16)).T, wanted, rtol=1e-6, atol=0)


def test_the_result_is_saved_exported_and_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    from normfuse.export import to_onnx

    quantized, again, x = model(1), model(2), torch.randn(4, 48)
    for each in (quantized, again):
        quantize_(each, ShiftQuantConfig("w8a8"))
    again.load_state_dict(quantized.state_dict())
    with torch.inference_mode():
        wanted = quantized(x)
        assert torch.equal(again(x), wanted)
        assert torch.equal(torch.export.export(quantized, (x,)).module()(x), wanted)
    made = to_onnx(quantized, tmp_path / "q.onnx", example_inputs=(x,), form="integer")
    assert made.ops["MatMulInteger"] == 2


def test_half_and_no_bias_and_chosen_layers() -> None:
    half = model(3, bias=False).half()
    quantize_(half, ShiftQuantConfig("w8a8"), filter_fn=lambda m, path: path == "0")
    assert [type(m) for m in half] == [IntegerLinear, nn.ReLU, nn.Linear]
    assert half(torch.randn(2, 48).half()).dtype is torch.float16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("w8a8,static", "activations='static' needs the whole model or data"),
        ("w4a8,gptq", "rounding='gptq' needs"),
        (ShiftQuant(attention=True), "attention=True needs"),
        (ShiftQuant(keep=("head",)), "filter_fn= to choose layers"),
        ("w4b8", "w4b8"),
        (8, "expected words such as 'w4a8'"),
    ],
)
def test_what_needs_the_model_is_refused(words: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ShiftQuantConfig(words)


def test_other_layers_and_weights_are_refused() -> None:
    with pytest.raises(UsageError, match=r"is for nn\.Linear in floats, got ReLU"):
        quantize_(model(), ShiftQuantConfig(), filter_fn=lambda m, path: path == "1")
    broken = model()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="holds NaN or Inf"):
        quantize_(broken, ShiftQuantConfig())
