"""Launches kernels on tensors: on a GPU through Triton's own compiler, on the CPU in Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.gpu.launch import DTYPES, Launch
from normfuse.gpu.source import arguments, function, interpreted, toolchain

__all__ = ["NAMES", "available", "run"]

#: Names in `DTYPES` by torch's element type.
NAMES = {getattr(torch, name): key for key, (name, _) in DTYPES.items()}
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
    """
    kernel = function(launch)
    given = arguments(launch, list(kernel.arg_names))
    x = _checked(launch, inputs)
    rows = x.numel() // x.shape[-1]
    outputs = tuple(x.new_empty((*x.shape[:-1], o.features), dtype=getattr(torch, DTYPES[o.dtype][0])) for o in launch.outputs)
    programs = launch.programs(rows)
    if max(rows, programs) > _LIMIT:
        raise UsageError(f"{launch.kernel}: {rows} rows in {programs} programs; a launch takes at most {_LIMIT} of both")
    if rows:
        values: dict[str, Any] = {i.name: inputs[i.name] for i in launch.inputs}
        values |= {o.name: t for o, t in zip(launch.outputs, outputs, strict=True)} | {"rows": rows}
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](
                **{n: values[n] for n in given}, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
            )
    return outputs


def _checked(launch: Launch, inputs: Mapping[str, Tensor]) -> Tensor:
    wanted = [i.name for i in launch.inputs]
    if set(inputs) != set(wanted):
        raise UsageError(f"{launch.kernel}: inputs {', '.join(inputs)}; expected {', '.join(wanted)}")
    x = inputs[wanted[0]]
    for operand in launch.inputs:
        value, dtype = inputs[operand.name], DTYPES[operand.dtype][0]
        if value.dtype is not getattr(torch, dtype):
            raise UsageError(f"{launch.kernel}: {operand.name} is {value.dtype}; expected torch.{dtype}")
        if value.device != x.device:
            raise UsageError(f"{launch.kernel}: {operand.name} is on {value.device} and {wanted[0]} on {x.device}")
        if not value.is_contiguous():
            raise UsageError(f"{launch.kernel}: {operand.name} is not contiguous; pass {operand.name}.contiguous()")
    if not x.ndim or not x.shape[-1]:
        raise UsageError(f"{launch.kernel}: {wanted[0]} {tuple(x.shape)}; expected at least one feature on the last axis")
    if not x.is_cuda and not (interpreted() and x.device.type == "cpu"):
        raise UsageError(
            f"{launch.kernel}: {wanted[0]} is on {x.device}; expected a CUDA device, or the CPU with TRITON_INTERPRET=1 set before "
            "Python starts"
        )
    return x


@functools.cache
def available() -> bool:
    """Kernels can be launched on this machine's GPU; where they cannot, the reason is logged once."""
    if importlib.util.find_spec("triton") is None:
        _log.info("triton is not installed: operators run as PyTorch computes them; pip install 'normfuse[gpu]'")
        return False
    try:
        toolchain().runtime.driver.active.get_current_target()
    except Exception as e:  # no driver, no C compiler, too old a version: all of them raise something else
        _log.warning("Triton does not work here, so operators run as PyTorch computes them: %s", e)
        return False
    return True
