"""Files state the oldest ONNX Runtime that they need, and are written for the one that is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import UsageError
from normfuse.export import to_onnx
from normfuse.export.onnx.inspect import provenance
from normfuse.export.onnx.oldest import needs
from normfuse.export.runtimes import format_of, newest_opset, parse_runtime, reads
from normfuse.export.targets import MAX_OPSET, MIN_OPSET
from tests.cli_runner import runner

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 8)).eval()


def _quantized(**spec: Any) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(4, 32)
    spec = {"prefer": "size"} | spec
    return normfuse.optimize(_net(), (x,), quantize=normfuse.ShiftQuant(**spec), calibration=[(x,)]), x


@pytest.mark.parametrize("opset", range(MIN_OPSET, MAX_OPSET + 1))
def test_the_format_is_as_old_as_the_opset(opset: int, tmp_path: Path) -> None:
    result = to_onnx(_net(), tmp_path / "m.onnx", opset=opset, example_inputs=(torch.randn(4, 32),), progress=False)
    model = onnx.load(result.path)
    (version,) = [row[1] for row in onnx.helper.VERSION_TABLE if row[2] == opset][:1]
    assert model.ir_version == format_of(opset) == version
    assert result.runtime == provenance(model)["normfuse.runtime"]
    assert f"ONNX Runtime {result.runtime} or newer" in str(result)


@pytest.mark.parametrize(
    ("runtime", "opset", "form"),
    [("1.17", 20, "native"), ("1.20", 21, "integer"), ("1.22", 22, "native"), ("1.23.2", 22, "integer")],
)
def test_a_file_for_a_runtime(runtime: str, opset: int, form: str, tmp_path: Path) -> None:
    """1.23 reads opset 23 and has no QuantizeLinear of it: what quantizes is written in opset 22."""
    model, _ = _quantized(weight_bits=4)
    result = to_onnx(model, tmp_path / "m.onnx", runtime=runtime, form=form, progress=False)
    assert result.opset == opset
    assert parse_runtime(result.runtime) <= parse_runtime(runtime)


def test_without_one_the_file_says_what_it_needs(tmp_path: Path) -> None:
    x = torch.randn(4, 32)
    assert to_onnx(_net(), tmp_path / "f.onnx", example_inputs=(x,), progress=False).runtime == "1.23"
    model, _ = _quantized()
    assert to_onnx(model, tmp_path / "q.onnx", form="integer", progress=False).runtime == "1.24"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": "1.16"}, "1.17 and newer"),
        ({"runtime": "new"}, "expected a release"),
        ({"runtime": "\uff11.20"}, "expected a release"),  # digits, and none that a release is written in
        ({"runtime": "1.20", "opset": 22}, "opset 22: ONNX Runtime 1.20 reads opsets up to 21"),
        ({"runtime": "1.23", "opset": 23, "form": "integer"}, "needs ONNX Runtime 1.24, for QuantizeLinear of opset 23"),
    ],
)
def test_what_a_runtime_does_not_read_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    model, _ = _quantized()
    with pytest.raises(UsageError, match=words):
        to_onnx(model, tmp_path / "m.onnx", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_kernels_that_came_later_count(tmp_path: Path) -> None:
    for source, release in (("c = Max (a, b)", (1, 24)), ("c = Add (a, b)", (1, 21)), ("c = Clip (a, b)", (1, 17))):
        text = f'<ir_version: 8, opset_import: ["" : 17]> g (uint8[2] a, uint8[2] b) => (uint8[2] c) {{ {source} }}'
        assert max(needs(ir.from_onnx_text(text)))[0] == release


def test_releases() -> None:
    assert [newest_opset(parse_runtime(v)) for v in ("1.17.3", "1.18", "1.20", "1.21", "1.22", "1.23", "1.32", "2.0")] == [
        20, 21, 21, 22, 22, 23, 23, 23,
    ]  # fmt: skip
    assert reads(17, 8) == reads(20, 9) == (1, 17)
    assert reads(17, 10) == (1, 18)


def test_the_installed_runtime_is_no_worse_than_the_table() -> None:
    """Opset 23 in version 11 is what the newest release of the table reads."""
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    newest = newest_opset(parse_runtime(ort.__version__))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", newest)], ir_version=format_of(newest))
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("form", [None, "native", "integer"])
def test_how_to_run_it_is_code_that_runs(form: str | None, tmp_path: Path) -> None:
    if form is None:
        x = torch.randn(2, 32)
        options: dict[str, Any] = {"example_inputs": (x,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        result = to_onnx(_net(), tmp_path / "m.onnx", progress=False, **options)
    else:
        result = to_onnx(_quantized()[0], tmp_path / "m.onnx", form=form, progress=False)
    code = dataclasses.replace(result, path=Path("m.onnx")).how_to_run
    assert max(map(len, code.splitlines())) <= 76  # the command line shows it four letters to the right
    code = result.how_to_run
    assert ("register_custom_ops_library" in code) == (form == "native" and normfuse.native.available())
    assert ("batch: any size" in code) == (form is None)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["outputs"][0].shape[-1] == 8


_MODELS = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
"""


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with runner("models", _MODELS, tmp_path, monkeypatch, capsys) as cli:
        export = ("export", "models:mlp", "--shape", "2x8", "-o")
        code, out, err = cli(*export, "m.onnx", "--runtime", "1.20", "--attention", "decomposed")
        assert code == 0, err
        assert "needs      ONNX Runtime 1.18 or newer" in out
        assert "run it:" in out
        assert onnx.load("m.onnx").opset_import[0].version == 21
        assert cli(*export, "n.onnx", "--runtime", "1.2")[0] == 2
        assert cli(*export, "m.engine", "--tune")[0] == 2
