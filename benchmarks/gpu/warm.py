"""Compiles every kernel that the other parts need, on all processors: the time of a device is not to be spent on waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.asked import Asked
from benchmarks.gpu.clock import DEVICE, said
from normfuse.gpu.compile import compiled
from normfuse.gpu.launch import Launch
from normfuse.gpu.loaded import prepare

__all__ = ["measure", "share"]

_Job = tuple[str, Callable[[], Any]]


def measure(asked: Asked, *arguments: str, processes: int | None = None) -> list[dict[str, Any]]:
    """One row: kernels that were compiled, processes, seconds, and what failed.

    Args:
        arguments: of the command that compiles one share, before its number and theirs.
    """
    count = processes or max(1, min(12, (os.cpu_count() or 2) - 1))
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.gpu.first_light", *arguments]
    there = Path(__file__).parents[2]
    started = [
        subprocess.Popen([*command, "--share", f"{i}/{count}"], stdout=subprocess.PIPE, text=True, cwd=there) for i in range(count)
    ]
    lines = [line for one in started for line in one.communicate()[0].splitlines()]
    failed = [line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")]
    failed += [f"process {i} ended with {one.returncode}" for i, one in enumerate(started) if one.returncode]
    done = sum(int(line.removeprefix("compiled: ")) for line in lines if line.startswith("compiled: "))
    row = {"compiled": done, "processes": count, "seconds": time.perf_counter() - start, "failed": failed}
    asked.keep(row)
    print(f"{done} kernels in {row['seconds']:.0f} s, {count} processes", *failed, sep="\n", flush=True)
    return [row]


def share(part: str, *, quick: bool) -> None:
    """Compile share i of n ("i/n"), and print what happened for `measure`."""
    index, count = map(int, part.split("/"))
    done = 0
    for i, (name, job) in enumerate(_jobs(quick)):
        if i % count != index:
            continue
        try:
            job()
            done += 1
        except Exception as e:  # the part that needs it will say so too
            print(f"failed: {name}: {said(e)}", flush=True)
    print(f"compiled: {done}", flush=True)


def _jobs(quick: bool) -> Iterator[_Job]:
    from benchmarks.gpu import carried, checks, products

    major, minor = torch.cuda.get_device_capability()
    device = torch.device(DEVICE)
    found: dict[Launch, str] = {}
    for case in checks.cases(DEVICE, quick):
        found.setdefault(case.launch(), f"{case.kernel}, {case.label}")
    for size in products.SIZES:
        found |= {launch: f"{launch.kernel}, {size}" for launch in products.launches(*size) if launch not in found}
    ahead = list(carried.launches(few=quick))
    found |= {launch: name for name, launch in ahead if launch not in found}
    for launch, name in found.items():
        yield name, lambda launch=launch: prepare(launch, device)  # type: ignore[misc]
    for name, launch in ahead:
        for capability in carried.capabilities(10 * major + minor):
            yield f"{name}, sm_{capability}", lambda launch=launch, c=capability: compiled(launch, c)  # type: ignore[misc]
