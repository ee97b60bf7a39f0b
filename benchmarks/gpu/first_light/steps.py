"""What is done on a device, in which order, and how long each step may take."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.asked import Asked

__all__ = ["STEPS", "Job", "Missing", "Step", "named"]

_ROOT = Path(__file__).parents[3]


class Missing(Exception):
    """Something that a step needs is not on this machine."""


@dataclass(frozen=True)
class Job:
    """What a step is given.

    Attributes:
        asked: how long, how much, and where its rows go.
        again: arguments with which this program is called in the same way.
    """

    asked: Asked
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Attributes:
    name: of the step.
    limit: seconds, the start of its process included.
    do: gives a sentence about what is wrong, empty where nothing is; raises `Missing`.
    """

    name: str
    limit: float
    do: Callable[[Job], str]


def named(name: str) -> Step:
    """The step of that name.

    Raises:
        KeyError: there is none.
    """
    return {step.name: step for step in STEPS}[name]


def _device(job: Job) -> str:
    """What there is; raises `UsageError` where there is no GPU."""
    from normfuse.gpu.device import find_gpu

    gpu = find_gpu()
    print(gpu)
    row: dict[str, Any] = {"device": gpu.to_dict(), "processors": os.cpu_count()}
    for name, command in (("nvidia-smi", ["nvidia-smi"]), ("topology", ["nvidia-smi", "topo", "-m"])):
        try:
            row[name] = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout[-6000:]
        except (OSError, subprocess.TimeoutExpired) as e:
            row[name] = str(e)
    job.asked.keep(row)
    return ""


def _warm(job: Job) -> str:
    from benchmarks.gpu import warm

    (row,) = warm.measure(job.asked, *job.again)
    return f"{len(row['failed'])} kernels were not compiled" if row["failed"] else ""


def _checks(family: str) -> Callable[[Job], str]:
    def do(job: Job) -> str:
        from benchmarks.gpu import checks
        from benchmarks.gpu.clock import DEVICE

        wrong = 0
        for row in checks.each(DEVICE, quick=job.asked.quick, families=(family,)):
            job.asked.keep(row)
            wrong += bool(row["failed"])
            if row["failed"]:
                print(f"{row['kernel']}, {row['dtype']}, {row['failed']}", flush=True)
        return f"{wrong} cases are wrong" if wrong else ""

    return do


def _products(few: bool) -> Callable[[Job], str]:
    def do(job: Job) -> str:
        from benchmarks.gpu import products

        products.measure(job.asked, [size for size in products.SIZES if (size[0] <= 16) == few])
        return ""

    return do


def _torchao(job: Job) -> str:
    from benchmarks.gpu import products

    if importlib.util.find_spec("torchao") is None:
        raise Missing("torchao is not installed")
    products.measure(job.asked, products.SIZES, beside="torchao")
    return ""


def _carried(job: Job) -> str:
    from benchmarks.gpu import carried

    wrong = [row for row in carried.measure(job.asked) if row["failed"]]
    return f"{len(wrong)} images are wrong" if wrong else ""


def _operators(job: Job) -> str:
    """The tests of the operators that need a device."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_operators.py", "-q", "-rf", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed|error|skipped)", line)), "")
    job.asked.keep({"summary": summary, "code": done.returncode, "failed": failed})
    print(done.stdout[-3000:], done.stderr[-1000:])
    return "" if done.returncode == 0 else summary or f"pytest ended with {done.returncode}"


def _norms(job: Job) -> str:
    from benchmarks.gpu import norms

    norms.measure(job.asked)
    return ""


def _memory(job: Job) -> str:
    """The kernels of `carried` under compute-sanitizer: reads and writes beside their tensors."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise Missing("compute-sanitizer is not installed")
    checked = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [*checked, sys.executable, "-m", "benchmarks.gpu.first_light", *job.again, "--step", "carried"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=False)
    summary = next((line for line in reversed(done.stdout.splitlines()) if "ERROR SUMMARY" in line), "no summary").strip("= ")
    job.asked.keep({"summary": summary, "code": done.returncode, "printed": done.stdout[-4000:]})
    print(done.stdout[-3000:], done.stderr[-1000:])
    return "" if done.returncode == 0 else f"{summary}; exit code {done.returncode}"


def _models(job: Job) -> str:
    from benchmarks.gpu import models

    rows = models.measure(job.asked)
    return "; ".join(f"{row['name']}: {row['failed']['all']}" for row in rows if "all" in row["failed"])


#: In order: what other steps rest on, then what is least known, then what takes longest.
STEPS = (
    Step("device", 30, _device),
    Step("warm", 90, _warm),
    Step("checks: products", 60, _checks("products")),
    Step("checks: rows", 40, _checks("rows")),
    Step("checks: norms", 60, _checks("norms")),
    Step("checks: norm + linear", 40, _checks("norm + linear")),
    Step("products: few rows", 75, _products(few=True)),
    Step("products: many rows", 75, _products(few=False)),
    Step("carried", 60, _carried),
    Step("operators", 60, _operators),
    Step("norms", 90, _norms),
    Step("memory", 100, _memory),
    Step("models", 150, _models),
    Step("products: torchao", 150, _torchao),
)
