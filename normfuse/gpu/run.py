"""Launches kernels on tensors: on a GPU through Triton's own compiler, on the CPU in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.gpu.launch import DTYPES, Launch
from normfuse.gpu.loaded import launched
from normfuse.gpu.source import OPTIONS, arguments, function, interpreted, toolchain

__all__ = ["NAMES", "OLDEST_DEVICE", "available", "run"]

_DTYPES = {key: getattr(torch, name) for key, (name, _) in DTYPES.items()}
#: Names in `DTYPES` by torch's element type.
NAMES = {dtype: key for key, dtype in _DTYPES.items()}
#: The first compute capability with the products of 8-bit integers and the asynchronous copies that the kernels are written for.
OLDEST_DEVICE = (8, 0)
_LIMIT = 2**31 - 1

_log = logging.getLogger(__name__)


def run(launch: Launch, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Launch one kernel.

    Args:
        launch: what to launch.
        inputs: contiguous tensors by the names in `launch.inputs`, all on one device; the first one has the rows.

    Returns:
        New tensors in the order of `launch.outputs`, of the shape of the first input except for the last axis.

    Raises:
        MissingExtra: triton is not installed.
        UsageError: inputs are missing, or their dtype, device or layout is not what the kernel reads.
        CannotCompile: the kernel cannot be compiled for this device.
    """
    x = _checked(launch, inputs)
    rows = x.numel() // x.shape[-1]
    outputs = tuple(x.new_empty((*x.shape[:-1], o.features), dtype=_DTYPES[o.dtype]) for o in launch.outputs)
    programs = launch.programs(rows)
    if max(rows, programs) > _LIMIT:
        raise UsageError(f"{launch.kernel}: {rows} rows in {programs} programs; a launch takes at most {_LIMIT} of both")
    if rows:
        given: tuple[Tensor | int, ...] = (*(inputs[i.name] for i in launch.inputs), *outputs, rows)
        if interpreted():
            kernel = function(launch)
            named = dict(zip(arguments(launch, list(kernel.arg_names)), given, strict=True))
            kernel[(programs,)](**named, **launch.constants, num_warps=launch.warps, num_stages=launch.stages, **OPTIONS)
        else:
            launched(launch, x.device, given, programs)
    return outputs


def _checked(launch: Launch, inputs: Mapping[str, Tensor]) -> Tensor:
    first = launch.inputs[0].name
    if len(inputs) != len(launch.inputs) or any(i.name not in inputs for i in launch.inputs):
        raise UsageError(f"{launch.kernel}: inputs {', '.join(inputs)}; expected {', '.join(i.name for i in launch.inputs)}")
    x = inputs[first]
    for operand in launch.inputs:
        value = inputs[operand.name]
        if value.dtype is not _DTYPES[operand.dtype]:
            raise UsageError(f"{launch.kernel}: {operand.name} is {value.dtype}; expected {_DTYPES[operand.dtype]}")
        if value.device != x.device:
            raise UsageError(f"{launch.kernel}: {operand.name} is on {value.device} and {first} on {x.device}")
        if not value.is_contiguous():
            raise UsageError(f"{launch.kernel}: {operand.name} is not contiguous; pass {operand.name}.contiguous()")
    if not x.ndim or not x.shape[-1]:
        raise UsageError(f"{launch.kernel}: {first} {tuple(x.shape)}; expected at least one feature on the last axis")
    if not _on_gpu(x) and not (interpreted() and x.device.type == "cpu"):
        raise UsageError(
            f"{launch.kernel}: {first} is on {x.device}; expected a CUDA device, or the CPU with TRITON_INTERPRET=1 set before "
            "Python starts"
        )
    return x


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def available(device: torch.device | None = None) -> bool:
    """Kernels can be launched on this GPU, the current one by default; where they cannot, the reason is logged once."""
    return _triton_works() and _new_enough(torch.cuda.current_device() if device is None or device.index is None else device.index)


@functools.cache
def _triton_works() -> bool:
    if importlib.util.find_spec("triton") is None:
        _log.info("triton is not installed: operators run as PyTorch computes them; pip install 'normfuse[gpu]'")
        return False
    try:
        toolchain().runtime.driver.active.get_current_target()
    except Exception as e:  # no driver, no C compiler, too old a version: all of them raise something else
        _log.warning("Triton does not work here, so operators run as PyTorch computes them: %s", e)
        return False
    return True


@functools.cache
def _new_enough(index: int) -> bool:
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST_DEVICE:
        _log.warning(
            "GPU %d has compute capability %d.%d, kernels need %d.%d: operators run as PyTorch computes them",
            index, *found, *OLDEST_DEVICE,
        )  # fmt: skip
    return found >= OLDEST_DEVICE
