"""Everything that `benchmarks/gpu` asks of a device, answered without one: kernels are compiled and started on `stand_in`, and
graphs, clocks and the plugins' driver do nothing. Sizes are small. No number that comes out means anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tests.gpu.stand_in import stand_in

__all__ = ["rehearsal"]


@contextmanager
def rehearsal(capability: int = 90) -> Iterator[None]:
    """Inside, the CPU counts as a GPU of this capability for `benchmarks.gpu`."""
    from benchmarks.gpu import carried, checks, clock, models, norms, products, warm
    from benchmarks.gpu.first_light.page import REHEARSED
    from normfuse.gpu import device

    gpu = device.Gpu(REHEARSED, f"{capability // 10}.{capability % 10}", 0, "none", "none")
    with ExitStack() as stack:
        stack.enter_context(stand_in(capability))

        def put(where: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(where, name, value))

        for part in (carried, checks, clock, models, norms, products, warm):
            put(part, "DEVICE", "cpu")
        put(device, "find_gpu", lambda: gpu)
        put(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=4 << 10))
        put(torch.cuda, "get_device_capability", lambda index=0: divmod(capability, 10))
        put(torch.cuda, "synchronize", lambda: None)
        put(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x55))
        put(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # what no kernel writes is the same each time
        put(torch, "compile", lambda function, dynamic=None: function)
        put(clock, "DeviceCall", _Call)
        put(clock, "as_graph", _graph)
        put(carried, "as_graph", _graph)
        put(carried, "need", lambda module, extra: Driver(capability))
        put(clock, "_COPIED", 1 << 16)
        put(clock, "_FEWEST", 2)
        put(norms, "SHAPES", ((3, 64), (4, 64), (5, 64), (6, 64)))
        put(products, "SIZES", ((1, 256, 128), (100, 128, 192)))
        put(models, "_models", lambda quick: [("small", _small, ("fp16",)), ("broken", _broken, ("fp16",))])
        yield


class _Call:
    """`DeviceCall`, timed by the clock of the processor."""

    def __init__(self, launch: Callable[[], Any]) -> None:
        self.launch = launch

    def __call__(self) -> None:
        self.launch()

    def seconds(self) -> float:
        start = time.perf_counter()
        self.launch()
        return time.perf_counter() - start


def _graph(name: str, call: Callable[[], Any]) -> Callable[[], None]:
    def replay() -> None:
        call()

    return replay


class Driver:
    """`cuda.bindings.driver`, as far as the plugins use it.

    Attributes:
        launched: functions that were started.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launched: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            match name:
                case "cuCtxGetCurrent" | "cuCtxGetDevice":
                    return 0, 1
                case "cuDeviceGetAttribute":
                    return 0, self.capability // 10 if arguments[0] == "major" else self.capability % 10
                case "cuModuleLoadData" | "cuModuleGetFunction":
                    return 0, (name, arguments[-1])
                case "cuLaunchKernel":
                    self.launched.append(arguments[0])
            return (0,)

        return call


def _small() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU())
    return layers, (torch.randn(3, 16),)


def _broken() -> tuple[nn.Module, tuple[Any, ...]]:
    raise RuntimeError("no memory")
