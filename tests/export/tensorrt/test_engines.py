"""Engines by the real builder: the signature, the layers, the files beside them, and the ways in which a build can fail."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normfuse
from normfuse.errors import ExportError, MissingExtra, UsageError
from normfuse.export.tensorrt import build_onnx, builder
from normfuse.export.tensorrt.engine import log_path, manifest_path, read_manifest
from normfuse.export.tensorrt.inspect import header, inspect_engine
from normfuse.export.tensorrt.support import supported

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
onnx = pytest.importorskip("onnx")
SHAPES = {"x": ((1, 8), (4, 8), (16, 8))}


def _file(folder: Path, nodes: list[Any], *, weights: dict[str, Any] | None = None, domain: str = "", kind: int = 1) -> Path:
    h = onnx.helper
    initializers = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()]
    x, y = (h.make_tensor_value_info(name, kind, ["batch", 8]) for name in ("x", "y"))
    imports = [h.make_opsetid("", 21), *([h.make_opsetid(domain, 1)] if domain else [])]
    model = h.make_model(h.make_graph(nodes, "g", [x], [y], initializers), opset_imports=imports)
    model.ir_version = 10
    path = folder / "given.onnx"
    onnx.save(model, path)
    return path


def _linear(folder: Path) -> Path:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="/head/fc/MatMul")
    return _file(folder, [node], weights={"w": np.eye(8, dtype=np.float32)})


def _fake(folder: Path, code: str) -> Path:
    """A folder with a module `tensorrt_rtx` that does something else."""
    module = folder / "fake" / "tensorrt_rtx"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(code)
    return module.parent


class Small(nn.Module):
    """Conv, BatchNorm, LayerNorm, a linear layer: what the passes fold, in one batch axis that varies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.bn.running_mean.normal_()  # type: ignore[union-attr]
            self.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            self.norm.weight.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.norm(torch.relu(self.bn(self.conv(x))).mean((2, 3))))
        return y


@pytest.fixture(scope="module")
def fast() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    shapes = ({0: torch.export.Dim("batch", min=1, max=32)},)
    return normfuse.optimize(Small().eval(), (torch.randn(2, 3, 17, 17),), dynamic_shapes=shapes)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_engine_of_a_module(fast: torch.fx.GraphModule, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "small.engine"
    engine = normfuse.export.to_tensorrt(fast, path, dtype=dtype)
    assert path.stat().st_size == engine.bytes
    assert engine.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(t.name, t.dtype, t.shape) for t in engine.inputs] == [("x", "float32", (-1, 3, 17, 17))]
    assert [(t.dtype, t.shape) for t in engine.outputs] == [("float32", (-1, 5))]
    assert engine.profiles == {"x": {"min": [1, 3, 17, 17], "opt": [2, 3, 17, 17], "max": [32, 3, 17, 17]}}
    assert engine.weight_bytes is not None
    assert engine.weight_bytes > 0
    assert engine.layers
    assert engine.error is not None
    half = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16"}[dtype]
    assert any(half in layer.constants for layer in engine.layers), engine.layers
    assert ("affine", 2) in engine.passes  # the BatchNorm, and the gain and shift of the LayerNorm
    assert max(map(len, str(engine).splitlines())) <= 80 + len(str(tmp_path))
    manifest = json.loads(manifest_path(path).read_text())
    assert manifest["sha256"] == engine.sha256
    assert manifest["kinds"] == engine.kinds
    assert "Total Weights Memory" in log_path(path).read_text()
    assert read_manifest(path) == dataclasses.replace(engine, seconds={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.engine", "small.engine.json", "small.engine.log"]


def test_the_same_model_gives_the_same_bytes(fast: torch.fx.GraphModule, tmp_path: Path) -> None:
    first, second = (normfuse.export.to_tensorrt(fast, tmp_path / name, verify=False) for name in ("a.engine", "b.engine"))
    assert first.sha256 == second.sha256


def test_low_inputs_and_outputs(fast: torch.fx.GraphModule, tmp_path: Path) -> None:
    engine = normfuse.export.to_tensorrt(fast, tmp_path / "low.engine", dtype="fp16", io_dtype="low")
    assert {t.dtype for t in (*engine.inputs, *engine.outputs)} == {"float16"}
    assert engine.error is not None
    assert 0 < engine.error.max_rel < 2e-2


def test_capabilities_and_shapes(tmp_path: Path) -> None:
    engine = build_onnx(_linear(tmp_path), tmp_path / "a.engine", shapes=SHAPES, capabilities=("8.6", "8.9"))
    assert engine.capabilities == ("8.6", "8.9")
    assert engine.profiles["x"]["max"] == [16, 8]


def test_inputs_are_not_changed(fast: torch.fx.GraphModule, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in fast.state_dict().items()}
    normfuse.export.to_tensorrt(fast, tmp_path / "a.engine", dtype="fp16", verify=False)
    assert all(torch.equal(v, before[k]) for k, v in fast.state_dict().items())


def test_unknown_op_is_named_by_its_module(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"], name="/blocks/3/odd/Frobnicate", domain="com.strange")
    file = _file(tmp_path, [node], domain="com.strange")
    with pytest.raises(ExportError, match=r"Frobnicate at blocks\.3\.odd .*Plugin not found.*target 'tensorrt'"):
        build_onnx(file, tmp_path / "a.engine", shapes=SHAPES)
    assert not list(tmp_path.glob("a.engine*"))
    found = supported(file)
    assert [(n.op, n.taken) for n in found.nodes] == [("Frobnicate", False)]
    assert "blocks.3.odd" in str(found)


def test_zero_point_is_named_with_a_remedy(tmp_path: Path) -> None:
    h = onnx.helper
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="/blocks/0/fc1/QuantizeLinear"),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="/blocks/0/fc1/DequantizeLinear"),
    ]
    file = _file(tmp_path, nodes, weights={"s": np.float32(0.1), "z": np.uint8(3)})
    with pytest.raises(ExportError, match=r"at blocks\.0\.fc1 .*zero point.*activations='static'"):
        build_onnx(file, tmp_path / "a.engine", shapes=SHAPES)


def test_what_the_parser_takes(tmp_path: Path) -> None:
    found = supported(_linear(tmp_path))
    assert [(n.name, n.op, n.taken) for n in found.nodes] == [("/head/fc/MatMul", "MatMul", True)]
    assert not found.refused


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        pytest.param({}, UsageError, r"no sizes for input x \[batch, 8\]", id="missing-profile"),
        pytest.param({"shapes": {"x": ((4, 8), (1, 8), (16, 8))}}, UsageError, "min <= opt <= max", id="wrong-profile"),
        pytest.param({"shapes": {"z": (1, 8)}}, UsageError, "no input 'z'", id="wrong-name"),
        pytest.param({"shapes": SHAPES, "capabilities": ("9.0",)}, UsageError, "builds for 7.5, 8.0", id="capability"),
        pytest.param({"shapes": SHAPES, "capabilities": ("sm_90",)}, UsageError, "numbers like 8.6", id="no-capability"),
        pytest.param({"shapes": SHAPES, "dtype": "fp8"}, UsageError, "unknown dtype 'fp8'", id="dtype"),
        pytest.param({"shapes": SHAPES, "io_dtype": "fp8"}, UsageError, "unknown io_dtype", id="io-dtype"),
        pytest.param({"shapes": SHAPES, "flavour": "tensorflow"}, UsageError, "unknown flavour", id="flavour"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build_onnx(_linear(tmp_path), tmp_path / "a.engine", **arguments)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".normfuse-", "a.engine"))] == []


def test_missing_tensorrt_names_the_pip_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'normfuse\[tensorrt\]'"):
        build_onnx(_linear(tmp_path), tmp_path / "a.engine", shapes=SHAPES)


def test_no_file_and_no_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        build_onnx(tmp_path / "none.onnx", tmp_path / "a.engine")
    (tmp_path / "text.onnx").write_text("this is no model")
    with pytest.raises(UsageError, match="is not an ONNX model"):
        build_onnx(tmp_path / "text.onnx", tmp_path / "a.engine")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    file = _linear(tmp_path)
    manifest = tmp_path / "a.engine.json"
    manifest.write_text("mine")
    with pytest.raises(UsageError, match=r"a\.engine\.json exists already"):
        build_onnx(file, tmp_path / "a.engine", shapes=SHAPES)
    assert manifest.read_text() == "mine"
    build_onnx(file, tmp_path / "a.engine", shapes=SHAPES, force=True)
    assert json.loads(manifest.read_text())["file"] == "a.engine"


def test_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write everywhere
    with pytest.raises(UsageError, match="is not writable"):
        build_onnx(_linear(tmp_path), tmp_path / "a.engine", shapes=SHAPES)


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files, in a process of its own, is what a full disk looks like to whoever writes."""
    file = _linear(tmp_path)
    code = (
        "import resource, sys; from normfuse.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
        f"sys.exit(main(['export', {str(file)!r}, '-o', {str(tmp_path / 'a.engine')!r}, '--shapes', 'x=1x8:4x8:16x8']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given.onnx"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) != (8192, 8192)


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    slow = _fake(tmp_path, "import time; time.sleep(100)")
    path = os.pathsep.join((str(slow), _environment()["PYTHONPATH"]))
    command = [sys.executable, "-m", "normfuse", "export", str(_linear(tmp_path)), "-o", str(folder / "a.engine")]
    command += ["--shapes", "x=1x8:4x8:16x8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    try:
        for _ in range(600):
            if list(folder.iterdir()):  # the build has its temporary folder: it is under way
                break
            time.sleep(0.1)
        else:
            pytest.fail("no build began within a minute")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "interrupted; nothing was written" in said
    assert not list(folder.iterdir())


def test_builder_that_dies_is_contained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an abort in native code does: the process goes, the message names the signal, nothing is written."""
    monkeypatch.syspath_prepend(str(_fake(tmp_path, "import os; print('terminate called', flush=True); os.abort()")))
    with pytest.raises(ExportError, match=r"ended by SIGABRT during 'build'.*terminate called.*Nothing was written"):
        build_onnx(_linear(tmp_path), tmp_path / "a.engine", shapes=SHAPES)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".normfuse-", "a.engine"))] == []


def test_tensorrt_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise ImportError('libcudart.so.13: cannot open shared object file')"
    monkeypatch.syspath_prepend(str(_fake(tmp_path, code)))
    with pytest.raises(ExportError, match=r"tensorrt_rtx is installed but does not load: libcudart\.so\.13"):
        build_onnx(_linear(tmp_path), tmp_path / "a.engine", shapes=SHAPES)


def test_inspect(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    engine = build_onnx(_linear(tmp_path), path, shapes=SHAPES)
    found = inspect_engine(path)
    assert found.engine is not None
    assert found.engine.sha256 == engine.sha256
    assert found.header.version == engine.version
    assert "head.fc: MatMul" in str(found)
    manifest_path(path).unlink()
    assert inspect_engine(path).engine is None
    assert "no manifest" in str(inspect_engine(path))


def test_engines_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    build_onnx(_linear(tmp_path), path, shapes=SHAPES)
    whole = path.read_bytes()
    path.write_bytes(whole[:4000])
    with pytest.raises(UsageError, match=rf"cut off: 4000 of {len(whole)} bytes"):
        inspect_engine(path)
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(UsageError, match="not the engine that its manifest describes"):
        inspect_engine(path)
    path.write_bytes(b"hello, I am no engine at all, but I am long enough")
    with pytest.raises(UsageError, match="is no TensorRT engine"):
        inspect_engine(path)
    manifest_path(path).write_text("{}")
    path.write_bytes(whole)
    with pytest.raises(UsageError, match="is no manifest of an engine"):
        inspect_engine(path)


def test_engine_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    build_onnx(_linear(tmp_path), path, shapes=SHAPES)
    manifest_path(path).unlink()
    data = bytearray(path.read_bytes())
    data[24] += 1
    path.write_bytes(data)
    assert header(path).version == "2.7.1.116"
    assert "built with tensorrt_rtx 2.7.1.116 and runs with that version only" in " ".join(str(inspect_engine(path)).split())


def test_module_path() -> None:
    assert builder.module_path("/blocks/3/attn/qkv/MatMul") == "blocks.3.attn.qkv"
    assert builder.module_path("/MatMul") == ""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
