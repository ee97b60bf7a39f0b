"""Quantized files: OpenVINO multiplies integers, and computes what the module does."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.export.onnx.compare import sqnr
from tests.export.openvino.openvino_models import MODELS, STATIC, outputs, written

pytest.importorskip("openvino", reason="OpenVINO is not installed")
pytest.importorskip("onnxscript")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_every_product_is_in_integers(name, tmp_path):
    model, inputs = MODELS[name]()
    fast = normfuse.optimize(model, inputs, quantize=STATIC, calibration=[inputs])
    made = written(fast, tmp_path)
    assert made.form == "qdq"
    assert made.ran is not None
    products, integers = made.ran.products
    assert products == integers
    assert f"{products} of them in integers" in str(made)
    (y,) = outputs(made.path, **dict(zip(made.inputs, inputs, strict=True))).values()
    assert (
        sqnr([fast(*inputs).detach()], [y]) > 30
    )  # a float on a tie gets the neighbouring code: the proof knows by how much that moves it
    assert sqnr([model(*inputs).detach()], [y]) > 20


def test_scales_found_at_run_time_keep_activations_in_float(tmp_path):
    x = torch.randn(4, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 16)).eval()
    fast = normfuse.optimize(model, (x,), quantize=normfuse.ShiftQuant(prefer="size", rounding="nearest"))
    made = written(fast, tmp_path)
    assert made.form == "weight_only"
    assert any("activations stay floats" in note for note in made.notes)
    assert made.weight_bytes < 64 * 64 * 4 / 2
    assert sqnr([fast(x).detach()], [outputs(made.path, input=x)["output"]]) > 20


def test_a_form_that_openvino_does_not_take_is_refused(tmp_path):
    x = torch.randn(4, 16)
    fast = normfuse.optimize(nn.Linear(16, 16).eval(), (x,), quantize=normfuse.ShiftQuant(prefer="size", rounding="nearest"))
    with pytest.raises(normfuse.UsageError, match="'openvino' does not take it; use form='qdq' or form='weight_only'"):
        written(fast, tmp_path, form="native")
    with pytest.raises(normfuse.UsageError, match=r"needs static scales.*use form='weight_only'"):
        written(fast, tmp_path, form="qdq")
    assert not list(tmp_path.iterdir())
