"""All ranks of `torch.distributed`: what each finds in its own data, and failures of one that all have to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from normfuse.errors import UsageError

__all__ = ["everywhere", "first_rank", "several_ranks"]

T = TypeVar("T")


def several_ranks() -> bool:
    """Is there a default process group of more than one rank?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everywhere(compute: Callable[[], T]) -> list[T]:
    """The results of all ranks, in their order. A failure on one rank is an error on all, so that none waits for ever."""
    if not several_ranks():
        return [compute()]
    value: T | None = None
    error: Exception | None = None
    try:
        value = compute()
    except Exception as e:
        error = e
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (value, None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(gathered):
        if message is not None:
            raise UsageError(f"rank {rank}: {message}")
    return [value for value, _ in gathered]


def first_rank(compute: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks: for measurements of time, which differ."""
    return everywhere(compute)[0]
