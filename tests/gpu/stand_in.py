"""A driver without a device: kernels are compiled for it, loaded nowhere, and started without effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch


class StandIn:
    """What Triton asks of a driver, answered as by one device.

    Attributes:
        started: name and grid of every kernel that was started.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.started: list[tuple[str, int]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (None, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
            unload_module=lambda module: None,
        )

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def start(grid: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            self.started.append((function, grid))

        return start

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def stand_in(capability: int = 90) -> Iterator[StandIn]:
    """Inside, tensors of the CPU count as those of a device of this capability; results are not written."""
    from triton.runtime import driver

    from normfuse.gpu import loaded, run

    device = StandIn(capability)
    kept = dict(loaded._kept)
    loaded._kept.clear()
    with (
        patch.object(run, "_on_gpu", lambda x: True),
        patch.object(driver, "_active", device),
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(torch.cuda, "device", lambda index: _Nothing()),
    ):
        try:
            yield device
        finally:
            loaded._kept.clear()
            loaded._kept.update(kept)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...
