"""Two calls of this process timed in turns, so that a busy machine disturbs both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["in_turns", "timed"]

Call = Callable[[], Any]


def in_turns(a: Call, b: Call, *, runs: int = 1) -> Iterator[tuple[float, float]]:
    """For ever: the seconds that `runs` calls of each take, one behind the other. Who is first alternates: neither profits from
    always being second."""
    while True:
        yield timed(a, runs), timed(b, runs)
        second = timed(b, runs)
        yield timed(a, runs), second


def timed(call: Call, runs: int = 1) -> float:
    """Seconds that so many calls take."""
    start = time.perf_counter()
    for _ in range(runs):
        call()
    return time.perf_counter() - start
