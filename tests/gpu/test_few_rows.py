"""Plugins that see few rows and many: two launches of one kernel, chosen by the rows, in Python and in C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normfuse.errors import ExportError
from normfuse.export.tensorrt.plugins import kernel as kernels
from normfuse.export.tensorrt.plugins.kernel import Kernel
from normfuse.export.tensorrt.plugins.payload import TEXTS, Code, Few, Payload
from normfuse.gpu.blocks import FEW_ROWS
from tests.gpu.rehearsal import Driver

NATIVE = Path(__file__).resolve().parents[2] / "native" / "tensorrt"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
MANY, SMALL = Code(80, False, 128, 0, 5, b".target sm_80 // many"), Code(80, False, 32, 0, 6, b".target sm_80 // few")
PAYLOAD = Payload("norm", (MANY,), 128, 2, ("fp16",), ("fp16",), (64,), Few(4, (SMALL,), 1, 3))


def _fields(payload: Payload) -> dict[str, Any]:
    return {k: v.encode() if isinstance(v, str) else v for k, v in payload.fields().items()}


def test_a_payload_with_two_launches_survives() -> None:
    assert Payload.read(_fields(PAYLOAD)) == PAYLOAD


@pytest.mark.parametrize(
    "grid",
    [
        pytest.param([128, 2, 4], id="cut"),
        pytest.param([128, 2, 4, 1, 3, 2], id="no image for many rows"),
        pytest.param([128, 2, 0, 1, 3, 1], id="no rows"),
        pytest.param([0, 2], id="programs without rows"),
    ],
)
def test_a_damaged_grid_is_refused(grid: list[int]) -> None:
    with pytest.raises(ExportError, match="the plugin norm: 2 images"):
        Payload.read(_fields(PAYLOAD) | {"grid": grid})


@pytest.mark.parametrize(("rows", "threads", "grid"), [(1, 32, 3), (4, 32, 12), (5, 128, 2), (300, 128, 6)])
def test_the_launch_is_chosen_by_the_rows(rows: int, threads: int, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_functions", {})
    asked: list[tuple[Any, ...]] = []

    class Noted(Driver):
        def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:  # noqa: N802
            asked.append(arguments)
            return (0,)

    Kernel(PAYLOAD, Noted(80)).launch((16, 32), rows, 0)
    ((_, programs, _, _, size, *_),) = asked
    assert (programs, size) == (grid, threads)


@pytest.mark.checkout
@pytest.mark.skipif(not NATIVE.is_dir(), reason="no repository around the tests")
@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="a C++ compiler and Linux's loader")
def test_the_library_chooses_too(tmp_path: Path) -> None:
    compiler = (str(COMPILER), "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror")
    fake = [str(NATIVE / "tests/fake_cuda.cpp"), "-o", str(tmp_path / "libcuda.so.1"), "-ldl"]
    subprocess.run([*compiler, "-shared", "-fPIC", *fake], check=True)
    sources = [str(NATIVE / name) for name in ("payload.cpp", "driver.cpp", "tests/launch.cpp")]
    subprocess.run([*compiler, *sources, "-o", str(tmp_path / "launch"), "-ldl"], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_CAPABILITY": "90"}
    done = subprocess.run([str(tmp_path / "launch"), "few"], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("load")] == ["load PTX90a", "load FEW90a"]
    launches = [line.partition(" stream")[0] for line in lines if line.startswith("launch")]
    assert launches == ["launch 0xaa grid 20 1 1 block 32 1 1 shared 0", "launch 0xaa grid 12 1 1 block 256 1 1 shared 100000"]


def test_a_layer_with_a_varying_number_of_rows_carries_both() -> None:
    ir = pytest.importorskip("onnx_ir")
    pytest.importorskip("triton")
    from normfuse.export.tensorrt.plugins.placing import place

    def placed(first: Any) -> Payload:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([first, 64]))
        w = ir.Value(name="w", const_value=ir.tensor(np.ones((2048, 64), np.float16), name="w"))
        w.dtype, w.shape = ir.DataType.FLOAT16, ir.Shape([2048, 64])
        node = ir.node("RmsNormLinear", [x, w], {"eps": 1e-5}, domain="normfuse", name="n")
        node.outputs[0].dtype, node.outputs[0].name = ir.DataType.FLOAT16, "y"
        graph = ir.Graph([x], list(node.outputs), nodes=[node], initializers=[w], opset_imports={"": 21, "normfuse": 1}, name="g")
        model = ir.Model(graph, ir_version=10)
        assert place(model, ["rms_norm_linear"], dtype="fp16", capabilities=[80], sizes={"batch": 1}) == {"RmsNormLinear": 1}
        found = {name: a.value for name, a in next(iter(model.graph)).attributes.items()}
        return Payload.read({k: v.encode() if k in TEXTS else v for k, v in found.items()})

    both, one = placed("batch"), placed(8)
    assert one.few is None
    assert both.few is not None
    assert both.few.rows == FEW_ROWS
    assert both.few.rows_each < both.rows_each
    assert one.codes == both.few.codes
