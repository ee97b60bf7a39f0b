"""Whole quantized models in each form: what the file holds, what it is refused for, and that it runs everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from normfuse import native
from normfuse.errors import UsageError
from normfuse.export.onnx.compare import sqnr
from normfuse.export.onnx.domains import domains
from normfuse.export.onnx.inspect import provenance
from tests.export.quantized_models import exported, outputs, quantized

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", [pytest.param(n, id=n) for n in ("vision", "text", "convs")])
def test_native_and_integer_agree_with_the_module(name: str, tmp_path: Path) -> None:
    model, x = quantized(name)
    want = [model(x)]
    for form in ("native", "integer"):
        options = {"attention": "native"} if form == "native" and name != "convs" else {}
        file = exported(model, None, tmp_path, form=form, **options)
        assert file.form == provenance(file.path)["normfuse.form"] == form
        assert ("normfuse" in domains(file.path)) == (form == "native")
        assert sqnr(want, outputs(file, x, kernels=False)) > 35
        assert 0 < file.weight_bytes < file.bytes
        assert str(file).count(form) >= 1


def test_neighbours_are_fused(tmp_path: Path) -> None:
    """Norms write codes, the first linear of the MLP too, and residuals are added where the products are."""
    model, _ = quantized("vision")
    ops = exported(model, None, tmp_path, form="native", attention="native", verify=False).ops
    assert ops["normfuse.NormQuantize"] == 2
    assert ops["normfuse.ShiftQuantMatMulQuantize"] == 1
    assert ops["normfuse.ShiftQuantMatMul"] == 2
    assert ops["normfuse.Attention"] == 1
    assert "Add" not in ops
    assert "Sum" not in ops


def test_auto_follows_target_and_scales(tmp_path: Path) -> None:
    dynamic, _ = quantized("convs")
    static, _ = quantized("convs", activations="static", groups=1)
    assert exported(dynamic, None, tmp_path, target="portable", verify=False).form == "integer"
    file = exported(static, None, tmp_path, target="tensorrt")
    assert file.form == "qdq"
    assert not {n.domain for n in onnx.load(file.path).graph.node} - {""}
    wanted = "native" if native.available() else "integer"
    assert exported(dynamic, None, tmp_path, verify=False).form == wanted


def test_refusals_name_the_way_out(tmp_path: Path) -> None:
    model, _ = quantized("convs")
    for options, words in (
        ({"form": "qdq"}, "activations='static'"),
        ({"form": "native", "target": "tensorrt"}, "form='qdq' or form='weight_only'"),
        ({"form": "native", "opset": 17}, "opset 18"),
        ({"form": "native", "int4_initializers": True}, "packs its weights"),
        ({"form": "integer", "int4_initializers": True, "opset": 20}, "INT4 needs opset 21"),
        ({"form": "shift"}, "unknown form"),
    ):
        with pytest.raises(UsageError, match=words):
            exported(model, None, tmp_path, **options)
    wide, _ = quantized("convs", activations="static", weight_bits=8, groups=4)
    with pytest.raises(UsageError, match=r"weight_bits \+ groups <= 9.*groups=1"):
        exported(wide, None, tmp_path, form="qdq", target="tensorrt")
    with pytest.raises(UsageError, match="no quantized layers"):
        exported(nn.Linear(3, 4).eval(), (torch.randn(2, 3),), tmp_path, form="integer")
    assert not list(tmp_path.glob("*.onnx"))
