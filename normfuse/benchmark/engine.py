"""One thing to be timed, and the loop that times it."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Engine", "Runner", "Turn", "take_turn", "warm_up"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Engine:
    """A name and how to open it.

    Attributes:
        name: shown in tables, e.g. `onnxruntime`.
        open: `open(threads)` loads the model, fixes its number of threads and gives back a call without arguments
            that runs it once. Must be picklable to be measured in a process of its own. A call with a method `seconds`
            is timed by that: it runs once too, and gives the time by the clock of the device.
    """

    name: str
    open: Callable[[int], Call]


@dataclass(frozen=True)
class Turn:
    """Calls made one after the other while nobody else was measured.

    Attributes:
        seconds: wall time of each call, or the device's own.
        cpu: CPU seconds that the process of the engine used.
    """

    seconds: tuple[float, ...]
    cpu: float


class Runner(Protocol):
    """An opened engine, wherever it lives."""

    def warm_up(self, seconds: float) -> float: ...

    def take_turn(self, seconds: float) -> Turn: ...

    def close(self) -> None: ...


def warm_up(call: Call, seconds: float) -> float:
    """Call at least twice and for `seconds`; the time of the last call, in seconds."""
    end = time.perf_counter() + seconds
    call()
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        if now >= end:
            return now - start


def take_turn(call: Call, seconds: float) -> Turn:
    """Call for `seconds`, at least once; garbage collection waits until the turn is over."""
    times: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    device: Callable[[], float] | None = getattr(call, "seconds", None)
    cpu = time.process_time()
    end = time.perf_counter() + seconds
    try:
        while True:
            start = time.perf_counter()
            took = call() if device is None else device()
            now = time.perf_counter()
            times.append(now - start if device is None else took)
            if now >= end:
                break
    finally:
        if collecting:
            gc.enable()
    cpu = time.process_time() - cpu
    # the first call after somebody else's turn finds cold caches and sleeping threads
    return Turn(tuple(times[1:] if len(times) > 2 else times), cpu)


class Local:
    """An engine in this process."""

    def __init__(self, engine: Engine, threads: int) -> None:
        self._call = engine.open(threads)

    def warm_up(self, seconds: float) -> float:
        return warm_up(self._call, seconds)

    def take_turn(self, seconds: float) -> Turn:
        return take_turn(self._call, seconds)

    def close(self) -> None:
        del self._call
