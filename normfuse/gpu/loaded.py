"""Kernels that Triton has compiled and loaded, kept by launch and device.

Triton finds a kernel by all of its arguments on every call, which takes a processor longer than a small layer takes a GPU. Here it
is found by the launch, which says all of that, and by which addresses are multiples of 16.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import NormfuseError
from normfuse.gpu.launch import DTYPES, Launch
from normfuse.gpu.source import OPTIONS, arguments, function, suited

__all__ = ["CannotCompile", "launched", "prepare"]

_ALIGNED = 16

_Key = tuple[Launch, int | None, int | tuple[bool, ...]]
_Start = Callable[[int, Sequence[Tensor | int]], None]
_kept: dict[_Key, _Start] = {}
_one_at_a_time = threading.Lock()
_nothing = contextlib.nullcontext()


class CannotCompile(NormfuseError):
    """A kernel cannot be compiled for a device, or needs more than it has."""


def launched(launch: Launch, device: torch.device, given: Sequence[Tensor | int], programs: int) -> None:
    """Start a kernel on the current stream of the device.

    Args:
        given: inputs, outputs and the number of rows, in the order of the parameters.
        programs: size of the grid.

    Raises:
        CannotCompile: the kernel cannot be compiled for this device.
    """
    addresses = [t.data_ptr() for t in given if isinstance(t, Tensor)]
    key = (
        launch,
        device.index,
        functools.reduce(operator.or_, addresses) % _ALIGNED and tuple(a % _ALIGNED == 0 for a in addresses),
    )
    start = _kept.get(key)
    if start is None:
        with _one_at_a_time:
            start = _kept.get(key) or _loaded(launch, device, given)
            _kept[key] = start
    start(programs, given)


def prepare(launch: Launch, device: torch.device) -> None:
    """Compile a kernel for a device, as `launched` would for addresses that are multiples of 16, and start nothing: Triton finds it
    on the disk from then on.

    Raises:
        CannotCompile: the kernel cannot be compiled for this device.
    """
    dtypes = [o.dtype for o in launch.inputs] + [o.dtype for o in launch.outputs]
    _loaded(launch, device, (*(torch.empty(0, dtype=getattr(torch, DTYPES[d][0]), device=device) for d in dtypes), 1))


def _loaded(launch: Launch, device: torch.device, given: Sequence[Tensor | int]) -> _Start:
    """Compile and load a kernel; what comes back starts it."""
    from triton import knobs
    from triton.runtime import driver

    with torch.cuda.device(device):
        launch = suited(launch, int(driver.active.get_current_target().arch))
    kernel = function(launch)
    names = list(kernel.arg_names)
    values: list[Any] = [launch.constants.get(n) for n in names]
    places = [names.index(n) for n in arguments(launch, names)]
    named = dict(zip((names[i] for i in places), given, strict=True)) | dict(launch.constants)
    with torch.cuda.device(device):
        try:
            found = kernel.run(**named, grid=(1,), warmup=True, num_warps=launch.warps, num_stages=launch.stages, **OPTIONS)
            ready = found.result() if hasattr(found, "result") else found
            begin, code, packed = ready.run, ready.function, ready.packed_metadata
        except Exception as e:  # whatever a compiler may raise
            raise CannotCompile(f"{launch.kernel} on {device}: {type(e).__name__}: {str(e).strip()[-600:]}") from e
        index = driver.active.get_current_device()

    def start(programs: int, given: Sequence[Tensor | int]) -> None:
        all_of_them = list(values)
        for place, value in zip(places, given, strict=True):
            all_of_them[place] = value
        stream = driver.active.get_current_stream(index)
        entering, leaving = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
        metadata = None if entering is None else ready.launch_metadata((programs, 1, 1), stream, *all_of_them)
        with _nothing if torch.cuda.current_device() == index else torch.cuda.device(index):
            begin(programs, 1, 1, stream, code, packed, metadata, entering, leaving, *all_of_them)

    return start


def _hook(chain: Any) -> Any:
    """A profiler's hook; None for a chain of none, for which metadata would be made on each call."""
    return chain if getattr(chain, "calls", chain) else None
