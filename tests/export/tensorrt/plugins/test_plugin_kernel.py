"""What a plugin carries and how it is launched, with a driver that only writes down what it is asked."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from normfuse.errors import ExportError
from normfuse.export.tensorrt.plugins import kernel as kernel_module
from normfuse.export.tensorrt.plugins.kernel import Kernel
from normfuse.export.tensorrt.plugins.payload import Code, Payload

PORTABLE = (Code(80, False, 128, 0, 6, b".target sm_80"), Code(89, False, 128, 512, 6, b".target sm_89"))
EXACT = (Code(90, True, 256, 100_000, 7, b".target sm_90a"), Code(120, True, 256, 0, 6, b".target sm_120a"))


def _payload(*codes: Code, rows_each: int = 1, columns: int = 1) -> Payload:
    return Payload("norm", codes or (*PORTABLE, *EXACT), rows_each, columns, ("fp16", "fp32"), ("fp16",), (64,))


class Driver:
    """`cuda.bindings.driver` on a machine with one GPU of this capability."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUdevice_attribute:  # noqa: N801 - the binding's name
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = "major"
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = "minor"

    class CUfunction_attribute:  # noqa: N801 - the binding's name
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = "shared"

    def __init__(self, capability: int, context: int = 7, fails: str = "") -> None:
        self.capability, self.context, self.fails = capability, context, fails
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return (1,) if name == self.fails else (0, *self.answer(name, arguments))

        return call

    def answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        match name:
            case "cuCtxGetCurrent":
                return (self.context,)
            case "cuDevicePrimaryCtxRetain":
                return (70,)
            case "cuCtxGetDevice":
                return (3,)
            case "cuDeviceGetAttribute":
                return (self.capability // 10 if arguments[0] == "major" else self.capability % 10,)
            case "cuModuleLoadData" | "cuModuleGetFunction":
                return ("module", arguments[0]) if name == "cuModuleLoadData" else (("function", *arguments),)
            case "cuLaunchKernel":
                self.launched = _values(arguments[9], 6)
        return ()

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


def _values(places: int, count: int) -> list[int]:
    """What a driver reads through the array of addresses that it is given: 8 bytes each."""
    found = (ctypes.c_uint64 * count).from_address(places)
    return [ctypes.c_uint64.from_address(place).value for place in found]


@pytest.fixture(autouse=True)
def _no_loaded_modules() -> Iterator[None]:
    kernel_module._functions.clear()
    yield
    kernel_module._functions.clear()


def test_payload_survives_the_way_through_tensorrt() -> None:
    """Text comes back as int8 with one more zero byte."""
    payload = _payload(rows_each=4, columns=3)
    fields = {
        name: np.frombuffer(value.encode() + b"\0", np.int8).tobytes() if isinstance(value, str) else np.array(value, np.int32)
        for name, value in payload.fields().items()
    }
    assert Payload.read(fields) == payload
    assert Payload.read({k: v.encode() if isinstance(v, str) else v for k, v in payload.fields().items()}) == payload


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"ptx": b""}, "carries no ptx", id="empty"),
        pytest.param({"grid": None}, "carries no grid", id="missing"),
        pytest.param({"images": [80, 0, 128]}, "expected 5 each", id="short image"),
        pytest.param({"images": [80, 0, 128, 0, 6] * 5}, "4 images", id="more numbers than images"),
        pytest.param({"inputs": b"fp16,f8"}, "inputs fp16,f8", id="type"),
        pytest.param({"features": [64, 1]}, "of \\(64, 1\\) features", id="features"),
    ],
)
def test_damaged_payload_is_refused(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {k: v.encode() if isinstance(v, str) else v for k, v in _payload().fields().items()}
    fields = {k: v for k, v in (fields | change).items() if v is not None}
    with pytest.raises(ExportError, match=message):
        Payload.read(fields)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        pytest.param(80, 80, id="its own"),
        pytest.param(86, 80, id="an older one that runs on newer GPUs"),
        pytest.param(89, 89, id="its own, not the oldest"),
        pytest.param(90, 90, id="one for this architecture alone"),
        pytest.param(100, 89, id="not one for another architecture"),
        pytest.param(120, 120, id="the newest"),
        pytest.param(121, 89, id="newer than all"),
    ],
)
def test_image_fits_the_device(capability: int, expected: int) -> None:
    assert _payload().code(capability).capability == expected


@pytest.mark.parametrize(
    ("codes", "capability"),
    [pytest.param(PORTABLE, 75, id="older than all"), pytest.param(EXACT, 100, id="only for other architectures")],
)
def test_device_without_image_is_told_what_there_is(codes: tuple[Code, ...], capability: int) -> None:
    with pytest.raises(ExportError, match=f"carries PTX for sm_{codes[0].capability}.*the device is sm_{capability}"):
        _payload(*codes).code(capability)


@pytest.mark.parametrize(
    ("rows", "rows_each", "columns", "grid"),
    [
        pytest.param(5, 1, 1, 5, id="a program a row"),
        pytest.param(5, 4, 1, 2, id="several rows, the last program has fewer"),
        pytest.param(8, 4, 3, 6, id="columns"),
    ],
)
def test_launch_has_pointers_rows_and_zeros(rows: int, rows_each: int, columns: int, grid: int) -> None:
    driver = Driver(80)
    loaded = Kernel(_payload(rows_each=rows_each, columns=columns), driver)
    loaded.launch((0xFFFF_0000_1000, 0x2000, 0x3000), rows, 0x55)
    name, _, *numbers = driver.calls[-1]
    assert (name, numbers[:8], numbers[9]) == ("cuLaunchKernel", [grid, 1, 1, 128, 1, 1, 0, 0x55], 0)
    assert driver.launched == [0xFFFF_0000_1000, 0x2000, 0x3000, rows, 0, 0]


def test_launch_asks_for_nothing_else() -> None:
    """While a CUDA graph is captured, loading a module is an error."""
    driver = Driver(80)
    loaded = Kernel(_payload(), driver)
    before = len(driver.calls)
    for _ in range(2):
        loaded.launch((16, 32, 48), 9, 0)
    assert driver.names()[before:] == ["cuLaunchKernel"] * 2


def test_no_rows_launch_nothing() -> None:
    driver = Driver(80)
    Kernel(_payload(), driver).launch((0, 0, 0), 0, 0)
    assert "cuLaunchKernel" not in driver.names()


def test_address_between_two_loads_is_refused() -> None:
    """The GPU would end the context and everything in it."""
    driver = Driver(80)
    with pytest.raises(ExportError, match=r"its tensor 1 is at 0x2008, which is no multiple of 16 bytes"):
        Kernel(_payload(), driver).launch((0x1000, 0x2008, 0x3000), 1, 0)
    assert "cuLaunchKernel" not in driver.names()


def test_too_many_rows_are_refused() -> None:
    driver = Driver(80)
    with pytest.raises(ExportError, match="2147483648 rows"):
        Kernel(_payload(rows_each=64), driver).launch((16, 32, 48), 2**31, 0)
    assert "cuLaunchKernel" not in driver.names()


def test_equal_images_are_loaded_once_a_context() -> None:
    driver = Driver(80)
    for _ in range(3):
        Kernel(_payload(), driver)
    assert driver.names().count("cuModuleLoadData") == 1
    driver.context = 8
    Kernel(_payload(), driver)
    assert driver.names().count("cuModuleLoadData") == 2
    assert [call[1] for call in driver.calls if call[0] == "cuModuleLoadData"] == [b".target sm_80\0"] * 2


def test_large_shared_memory_is_asked_for() -> None:
    small, large = Driver(89), Driver(90)
    Kernel(_payload(), small)
    Kernel(_payload(), large)
    assert "cuFuncSetAttribute" not in small.names()
    assert [call[2:] for call in large.calls if call[0] == "cuFuncSetAttribute"] == [("shared", 100_000)]


def test_missing_context_becomes_that_of_the_first_device() -> None:
    driver = Driver(80, context=0)
    Kernel(_payload(), driver)
    assert ("cuDevicePrimaryCtxRetain", 0) in driver.calls
    assert ("cuCtxSetCurrent", 70) in driver.calls


@pytest.mark.parametrize("call", ["cuInit", "cuCtxGetDevice", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"])
def test_what_the_driver_refuses_is_said(call: str) -> None:
    driver = Driver(80, fails=call)
    with pytest.raises(ExportError, match=f"{call}.* failed"):
        Kernel(_payload(), driver).launch((16, 32, 48), 1, 0)


def test_function_with_too_few_parameters_is_refused() -> None:
    """Its launch would read behind the array of arguments."""
    with pytest.raises(ExportError, match="3 parameters for 3 tensors and the rows"):
        Kernel(_payload(Code(80, False, 128, 0, 3, b"x")), Driver(80))


def test_plugins_load_neither_pytorch_nor_triton() -> None:
    """The process that builds an engine, and a server that runs one, need only TensorRT."""
    heavy = ("torch", "triton", "onnx", "onnx_ir", "cuda")
    code = f"import sys, normfuse.export.tensorrt.plugins; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
