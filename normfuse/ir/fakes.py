"""Fake tensors of a captured graph, computed anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher

__all__ = ["on_fakes"]


@contextmanager
def on_fakes(mode: Any) -> Iterator[None]:
    """Inside, operators give shapes and dtypes alone, and a size that the graph leaves free stays free.

    The dispatcher of Python, as `torch.export` has it: the kernels of PyTorch in C++ compute with the sizes of the example.

    Args:
        mode: the `FakeTensorMode` of the graph. Outside of here it would note every question ("contiguous?") and its answer on
            the example as a condition, and whoever uses the graph next would find a number where a free size was.
    """
    env = mode.shape_env
    with mode, torch.no_grad(), enable_python_dispatcher(), nullcontext() if env is None else env.suppress_guards():
        yield
