"""What a call of a GPU kernel costs the processor, without a GPU: python -m benchmarks.gpu.host

Kernels are compiled for an H100 and started on a driver that does nothing (`tests/gpu/stand_in.py`): checks, outputs and the way
to the driver are timed, the driver is not.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from typing import Any

import torch

from normfuse.gpu.norm import plan_norm
from normfuse.gpu.run import run
from normfuse.gpu.source import arguments, function
from tests.gpu.stand_in import stand_in

__all__ = ["main"]

_CALLS, _REPEATS = 2000, 9


def _microseconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Median and fastest of the repeats."""
    times = sorted(1e6 * t / _CALLS for t in timeit.repeat(call, number=_CALLS, repeat=_REPEATS))
    return times[len(times) // 2], times[0]


def main() -> int:
    x, gain = torch.randn(8, 768).half(), torch.ones(768).half()

    def ours() -> Any:
        return run(plan_norm("rms", 768, "fp16", gain="fp16", shift=None, residual=False, eps=1e-5), {"x": x, "gain": gain})

    launch = plan_norm("rms", 768, "fp16", gain="fp16", shift=None, residual=False, eps=1e-5)
    kernel = function(launch)
    names, y = arguments(launch, list(kernel.arg_names)), torch.empty_like(x)

    def triton() -> None:
        given = dict(zip(names, (x, gain, y, 8), strict=True))
        kernel[(4,)](**given, **launch.constants, num_warps=launch.warps, num_stages=launch.stages)

    print("| a call of RMSNorm, 8 rows of 768 | median µs | fastest µs |\n|---|---|---|")
    with stand_in():
        for name, call in (("normfuse, checks and output included", ours), ("Triton's own launch alone", triton)):
            call()
            median, fastest = _microseconds(call)
            print(f"| {name} | {median:.1f} | {fastest:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
