"""A carried kernel on a GPU, loaded and launched by the driver alone."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from normfuse.errors import ExportError
from normfuse.export.tensorrt.plugins.payload import Code, Payload

__all__ = ["Kernel"]

_ALIGNED = 16  # bytes that kernels read at a time; an address between two would end the whole CUDA context
_FREE_SHARED = 48 * 1024  # bytes; for more than that a function must be told


class Kernel:
    """A loaded kernel and the buffers of its arguments; one for each execution context.

    Args:
        payload: what to launch.
        driver: `cuda.bindings.driver`, or what has its functions. A CUDA context is current, or device 0's is made so, as CUDA's
            runtime does.

    Raises:
        ExportError: no image runs on the device, or the driver refuses one; the message holds its reason.
    """

    def __init__(self, payload: Payload, driver: Any) -> None:
        self.payload, self.driver = payload, driver
        context, capability = _device(driver)
        codes = [payload.code(capability)] + ([] if payload.few is None else [payload.code(capability, payload.few.rows)])
        pointers = len(payload.inputs) + len(payload.outputs)
        for code in codes:
            if code.parameters <= pointers:
                raise ExportError(
                    f"the plugin {payload.entry} has {code.parameters} parameters for {pointers} tensors and the rows"
                )
        # the launch for many rows, and that for few rows, which may be the same one
        self.many, self.few = ((code, _function(driver, context, payload.entry, code)) for code in (codes[0], codes[-1]))
        # 8 bytes a parameter: an int32 is the lower half of one, and scratch pointers stay zero
        count = max(code.parameters for code in codes)
        self.values = (ctypes.c_uint64 * count)()
        start = ctypes.addressof(self.values)
        self.places = (ctypes.c_uint64 * count)(*(start + 8 * i for i in range(count)))

    def launch(self, addresses: Sequence[int], rows: int, stream: int) -> None:
        """Put one launch on `stream`; nothing for no rows. Nothing else is asked of the driver: a graph may be being captured.

        Args:
            addresses: of the inputs and the outputs, in order.
            rows: all axes of the first input but the last.
            stream: a CUstream.
        """
        if rows == 0:
            return
        grid = self.payload.grid(rows)
        if rows >= 2**31 or grid >= 2**31:
            raise ExportError(f"the plugin {self.payload.entry}: {rows} rows in {grid} programs; a launch has less than 2^31")
        for i, value in enumerate((*addresses, rows)):
            self.values[i] = value
            if value % _ALIGNED and i < len(addresses):
                raise ExportError(
                    f"the plugin {self.payload.entry}: its tensor {i} is at {value:#x}, which is no multiple of {_ALIGNED} bytes"
                )
        code, function = self.few if self.payload.few is not None and rows <= self.payload.few.rows else self.many
        done = self.driver.cuLaunchKernel(
            function, grid, 1, 1, code.threads, 1, 1, code.shared, stream, ctypes.addressof(self.places), 0
        )
        _result(self.driver, "cuLaunchKernel", done)


def _result(driver: Any, name: str, done: tuple[Any, ...]) -> Any:
    """What a call of the driver returned."""
    if done[0] != driver.CUresult.CUDA_SUCCESS:
        raise ExportError(f"{name} of the GPU's driver failed: {done[0]}")
    return done[1] if len(done) > 1 else None


def _device(driver: Any) -> tuple[int, int]:
    """The current context's handle and the compute capability of its device."""
    _result(driver, "cuInit", driver.cuInit(0))
    context = _result(driver, "cuCtxGetCurrent", driver.cuCtxGetCurrent())
    if not int(context):
        context = _result(driver, "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(0))
        _result(driver, "cuCtxSetCurrent", driver.cuCtxSetCurrent(context))
    device = _result(driver, "cuCtxGetDevice", driver.cuCtxGetDevice())
    names = driver.CUdevice_attribute
    major, minor = (
        _result(driver, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute(name, device))
        for name in (names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    )
    return int(context), major * 10 + minor


# layers of one size share an image, and each loaded module would be compiled again: by context, function and PTX
_functions: dict[tuple[int, str, bytes], Any] = {}


def _function(driver: Any, context: int, entry: str, code: Code) -> Any:
    key = (context, entry, code.ptx)
    if key not in _functions:
        module = _result(
            driver, f"cuModuleLoadData(PTX of {entry}, sm_{code.capability})", driver.cuModuleLoadData(code.ptx + b"\0")
        )
        function = _result(driver, f"cuModuleGetFunction({entry})", driver.cuModuleGetFunction(module, entry.encode()))
        if code.shared > _FREE_SHARED:
            name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            done = driver.cuFuncSetAttribute(function, name, code.shared)
            _result(driver, f"cuFuncSetAttribute({entry}, {code.shared} bytes of shared memory)", done)
        _functions[key] = module, function
    return _functions[key][1]
