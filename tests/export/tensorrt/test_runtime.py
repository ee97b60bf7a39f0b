"""Opening an engine: what is wrong with a file is said without a GPU; running one needs a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from normfuse.errors import ExportError, UsageError

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

from normfuse.export.tensorrt import runtime  # noqa: E402 (after the skip)
from normfuse.export.tensorrt.runtime import Session, open_engine  # noqa: E402

with_gpu = torch.cuda.is_available()


@pytest.fixture(scope="module")
def plan() -> bytes:
    """An engine of relu(x), x of shape (1 to 4, 3)."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (-1, 3))
    y = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 3), (2, 3), (4, 3))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda plan: b"", id="empty"),
        pytest.param(lambda plan: b"ab", id="short"),
        pytest.param(lambda plan: b"x" * 1000, id="garbage"),
        pytest.param(lambda plan: plan[: len(plan) // 2], id="cut-off"),
        pytest.param(lambda plan: b"PK" + plan[2:], id="another-kind"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, plan: bytes, broken: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(broken(plan))
    with pytest.raises(ExportError, match=r"m\.engine: it is no engine of tensorrt_rtx, or it is damaged: build it again"):
        open_engine(path, trt)


@pytest.mark.skipif(with_gpu, reason="there is a GPU")
def test_without_a_gpu_the_reason_is_that(tmp_path: Path, plan: bytes) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(plan)
    with pytest.raises(ExportError, match=r"m\.engine: tensorrt_rtx found no GPU: .*cudaError 35"):
        open_engine(path, trt)


def test_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_engine(tmp_path / "m.engine", trt)


class Said:
    """A runtime that finds something wrong with every engine."""

    class ILogger:
        ERROR = 1

        def __init__(self) -> None: ...

    EngineValidity = trt.EngineValidity
    EngineInvalidityDiagnostics = trt.EngineInvalidityDiagnostics
    __name__, __version__ = "tensorrt_rtx", "9.9"

    def __init__(self, bits: int) -> None:
        class Runtime:
            def __init__(self, logger: Any) -> None: ...

            def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
                return trt.EngineValidity.INVALID, bits

        self.Runtime = Runtime


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("VERSION_MISMATCH", "another version built it, and tensorrt_rtx here is 9.9", id="version"),
        pytest.param("UNSUPPORTED_CC", "it was not built for this GPU", id="device"),
        pytest.param("OLD_CUDA_DRIVER", "the driver of this machine is too old for tensorrt_rtx 9.9", id="driver"),
        pytest.param("INSUFFICIENT_GPU_MEMORY", "has too little memory", id="memory"),
    ],
)
def test_what_the_runtime_finds_is_said(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(b"plan")
    bits = int(getattr(trt.EngineInvalidityDiagnostics, name))
    with pytest.raises(ExportError, match=message):
        open_engine(path, Said(bits))


class Context:
    """Computes relu(x) on the addresses that it was given, for up to four rows."""

    def __init__(self) -> None:
        self.rows, self.at = 0, dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.rows = shape[0]
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.rows, 3)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        x, y = ((ctypes.c_float * (3 * self.rows)).from_address(self.at[n]) for n in ("x", "y"))
        for i, value in enumerate(x):
            y[i] = max(value, 0.0)
        return stream == 7


class Standing:
    """A loaded engine that stands in for one, on the CPU."""

    num_io_tensors = 2

    def __init__(self) -> None:
        self.context = Context()

    def get_tensor_name(self, i: int) -> str:
        return "xy"[i]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return trt.float32

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        return [trt.Dims((1, 3)), trt.Dims((2, 3)), trt.Dims((4, 3))]

    def create_runtime_config(self) -> Any:
        cache = SimpleNamespace(deserialize=lambda blob: blob == b"compiled", serialize=lambda: b"compiled")
        return SimpleNamespace(create_runtime_cache=lambda: cache, set_runtime_cache=lambda c: c is cache)

    def create_execution_context(self, config: Any) -> Any:
        return self.context


def test_session_binds_runs_and_keeps_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(runtime, "_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.engine"
    path.write_bytes(b"plan")
    logger = SimpleNamespace(errors=["out of luck"])
    for _ in range(2):  # with and without a cache
        session = Session(path, trt, None, Standing(), logger)
        assert (session.inputs, session.outputs) == (("x",), ("y",))
        x = torch.randn(3, 3, dtype=torch.float64)
        for inputs in ([x], {"x": x.numpy()}):
            y = session.run(inputs)["y"]
            assert torch.equal(y, x.float().relu())
        (kept,) = (tmp_path / "cache").rglob("*.cache")
        assert kept.read_bytes() == b"compiled"
    with pytest.raises(UsageError, match=r"m\.engine: x has shape \(5, 3\); the engine takes \(1, 3\) to \(4, 3\)"):
        session.run({"x": torch.randn(5, 3)})
    with pytest.raises(UsageError, match=r"takes 1 inputs \(x\), got 2"):
        session.run([x, x])
    with pytest.raises(UsageError, match=r"takes 1 inputs \(x\), got 1"):
        session.run({"z": x})
    session.bind([x])
    stream.cuda_stream = 8
    with pytest.raises(ExportError, match=r"m\.engine could not be run: out of luck"):
        session.launch()


@pytest.mark.skipif(not with_gpu, reason="needs an NVIDIA GPU")
def test_engine_runs(tmp_path: Path, plan: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.engine"
    path.write_bytes(plan)
    session = open_engine(path, trt)
    x = torch.randn(3, 3)
    for inputs in (x, x.cuda()):
        y = session.run([inputs])["y"]
        assert torch.equal(y.cpu(), x.relu())
    assert list((tmp_path / "cache").rglob("*.cache"))
    with pytest.raises(UsageError, match=r"x has shape \(5, 3\); the engine takes \(1, 3\) to \(4, 3\)"):
        session.run({"x": torch.randn(5, 3)})
    with pytest.raises(UsageError, match=r"takes 1 inputs \(x\), got 2"):
        session.run([x, x])
