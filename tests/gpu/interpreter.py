"""Kernels on the CPU, in Triton's interpreter.

The interpreter has to be chosen before a kernel is defined, and a process that runs it cannot compile, so that it has a process of
its own: one for all cases of a test file, because a process costs seconds and a case milliseconds.

The interpreter cuts float32 to bfloat16 where hardware rounds: what it stores as bfloat16 may be one unit in the last place off.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "interpret"]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        function: "module:name" of a planning function whose `Launch` is run on `inputs`, or, where there are none, of a function
            that is called and gives tensors ("module:OPERATOR.on_gpu").
        args, kwargs: of that function; numbers, strings, None, lists, tensors.
        inputs: tensors by name.
        capability: the compute capability that a `Launch` is suited to, times ten; 0 for none.
    """

    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] | None = None
    capability: int = 0


def interpret(cases: Mapping[str, Case], folder: Path) -> dict[str, tuple[Tensor, ...]]:
    """What each case gives, by the same keys; files go to `folder`."""
    torch.save({key: asdict(case) for key, case in cases.items()}, folder / "cases.pt")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore::RuntimeWarning", __file__, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, tuple[Tensor, ...]] = torch.load(folder / "results.pt")
    return results


def _main(source: str, target: str) -> None:
    from normfuse.gpu.run import run
    from normfuse.gpu.source import suited
    from normfuse.ops import operator

    vars(operator)["available"] = lambda device: True  # the interpreter is the GPU here
    results = {}
    for key, case in torch.load(source).items():
        module, _, name = case["function"].partition(":")
        found = attrgetter(name)(importlib.import_module(module))(*case["args"], **case["kwargs"])
        if case["inputs"] is not None:
            found = run(suited(found, case["capability"]), case["inputs"])
        results[key] = (found,) if isinstance(found, Tensor) else tuple(found)
    torch.save(results, target)


if __name__ == "__main__":
    _main(*sys.argv[1:])
