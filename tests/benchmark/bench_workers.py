"""Engines that tests open in other processes; without torch, so that such a process starts quickly."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from normfuse.benchmark import Engine


def open_and_note(folder: str, name: str, threads: int) -> Callable[[], None]:
    print("engines may print")  # noqa: T201
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    facts = {"threads": threads, "omp": os.environ["OMP_NUM_THREADS"], "cpus": cpus}
    Path(folder, f"{name}-{os.getpid()}.json").write_text(json.dumps(facts), encoding="utf-8")
    return lambda: None


def open_dying(threads: int) -> Callable[[], None]:
    return partial(os._exit, 7)


def open_failing(threads: int) -> Callable[[], None]:
    raise ValueError("the file is broken")


def open_without_torch(inner: Engine, threads: int) -> Callable[[], Any]:
    call = inner.open(threads)
    assert "torch" not in sys.modules, "the process of ONNX Runtime has loaded torch"
    return call
