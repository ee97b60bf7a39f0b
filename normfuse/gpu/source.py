"""From a launch to the function and the constants that Triton is given."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from normfuse.errors import UsageError
from normfuse.extras import need
from normfuse.gpu.blocks import TENSOR_MEMORY_FROM
from normfuse.gpu.launch import Launch

__all__ = ["OLDEST", "OPTIONS", "arguments", "function", "interpreted", "source_hash", "suited", "toolchain"]

#: The first triton whose knobs, cache and PTX options are those used here; it came with torch 2.9.
OLDEST = (3, 5)
#: Of every compilation. Triton's default for the fusion of products and sums changes in 3.10.
OPTIONS = {"enable_fp_fusion": True}
# Compute capabilities, times ten, whose tensor cores keep sums in a memory of their own, and the first triton that has int8 there.
_TENSOR_MEMORY, _TENSOR_MEMORY_SINCE = range(100, 120), (3, 8)
_FOLDER = Path(__file__).parent / "kernels"


def toolchain() -> ModuleType:
    """The module triton.

    Raises:
        MissingExtra: it is not installed.
        UsageError: it is older than `OLDEST`.
    """
    triton = need("triton", extra="gpu")
    if _version(triton) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise UsageError(f"triton {triton.__version__} is too old; expected {wanted} or later: pip install 'triton>={wanted}'")
    return triton


def _version(triton: ModuleType) -> tuple[int, ...]:
    return tuple(int(p) for p in triton.__version__.split(".")[:2])


def suited(launch: Launch, capability: int) -> Launch:
    """The launch as it is compiled for a compute capability, times ten: with "SEPARATE" sums where they are in tensor memory.

    Grid and operands stay the same: one launch stands for a layer on every device.
    """
    there = capability in _TENSOR_MEMORY and _version(toolchain()) >= _TENSOR_MEMORY_SINCE
    if not there or "SEPARATE" not in launch.constants or int(launch.constants["BLOCK"] or 0) < TENSOR_MEMORY_FROM:
        return launch  # in registers, several sums would not fit
    return replace(launch, constants={**launch.constants, "SEPARATE": True})


def interpreted() -> bool:
    """Kernels run on the CPU, in Triton's interpreter: TRITON_INTERPRET=1 was set."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _named(kernel: str) -> Any:
    toolchain()
    module, _, name = kernel.partition(".")
    if not (_FOLDER / f"{module}.py").is_file():
        raise UsageError(f"{kernel}: there is no file {module}.py in normfuse/gpu/kernels")
    found = getattr(importlib.import_module(f"normfuse.gpu.kernels.{module}"), name, None)
    if found is None or not hasattr(found, "arg_names"):
        raise UsageError(f"{kernel}: normfuse/gpu/kernels/{module}.py has no kernel {name!r}")
    return found


def function(launch: Launch) -> Any:
    """The `@triton.jit` function that `launch.kernel` names.

    Raises:
        MissingExtra: triton is not installed.
        UsageError: there is no such kernel.
    """
    return _named(launch.kernel)  # remembered: an operator asks each time that it is called


def arguments(launch: Launch, names: list[str]) -> tuple[str, ...]:
    """What a caller passes, in the order of the parameters: inputs, outputs, "rows".

    Raises:
        UsageError: the description and the kernel do not have the same parameters.
    """
    given = (*(i.name for i in launch.inputs), *(o.name for o in launch.outputs), "rows")
    if sorted([*given, *launch.constants]) != sorted(names) or [n for n in names if n in given] != list(given):
        raise UsageError(
            f"{launch.kernel} has the parameters {', '.join(names)}; the launch gives {', '.join(given)} and the constants "
            f"{', '.join(launch.constants)}"
        )
    return given


def source_hash() -> str:
    """SHA-256 of the text of every kernel: they share functions, and a change of one may change another."""
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
