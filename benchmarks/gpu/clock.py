"""Device time of short kernels: cold caches, CUDA graphs, contenders interleaved.

Each contender works through many copies of its inputs one after the other, together several times larger than the L2 cache, so
that every read comes from memory, as it does between the layers of a large model. The copies are one CUDA graph, whose time is
divided by their number: no launch of the host is in it, and the resolution of events does not matter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse.benchmark.statistics import median_interval
from normfuse.gpu.device import DeviceCall, as_graph

__all__ = ["DEVICE", "Call", "Timing", "bandwidth", "cached", "compare", "copies", "said"]

DEVICE = "cuda"

_FLUSH = 4  # times the size of the L2 cache
_FEWEST, _MOST_COPIES, _MOST_ROUNDS = 10, 256, 400
_COPIED = 1 << 29  # bytes, for the bandwidth

Call = Callable[[int], Any]  # works on copy number i


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, the median over rounds and its 95 % interval.

    `speedup` is the time of the first contender over that of this one: low, median, high; None where the first one failed.
    """

    name: str
    median: float
    low: float
    high: float
    speedup: tuple[float, float, float] | None
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def copies(size: int) -> int:
    """How many copies of inputs of `size` bytes are more than the cache holds."""
    return max(2, min(_MOST_COPIES, -(-_FLUSH * _cache() // max(1, size))))


def cached(size: int, count: int) -> bool:
    """May `count` copies of `size` bytes be read from the cache? Less than twice its size may in part."""
    return size * count < 2 * _cache()


def _cache() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))


def compare(calls: Mapping[str, Call], count: int, seconds: float) -> tuple[list[Timing], dict[str, str]]:
    """Time the contenders against each other.

    Args:
        calls: by name; the first one is what the others are compared with.
        count: number of copies, see `copies`.
        seconds: for all of them together; at least ten rounds are made.

    Returns:
        Their timings, and by name why one could not run.
    """
    ready: dict[str, DeviceCall] = {}
    failed: dict[str, str] = {}
    for name, call in calls.items():

        def all_copies(call: Call = call) -> list[Any]:
            return [call(i) for i in range(count)]

        launch: Callable[[], Any] = all_copies
        why = ""
        try:
            launch = as_graph(name, all_copies)
        except Exception as e:  # models that wait for the device are timed with their launches
            why = said(e)
        try:
            one = DeviceCall(launch)
            one()
        except Exception as e:  # one that this GPU or this torch cannot run is left out, with its reason
            failed[name] = said(e)
            continue
        ready[name] = one
        if why:
            failed[f"{name} as a graph"] = why
    samples: dict[str, list[float]] = {name: [] for name in ready}
    order, rng, end = list(ready), random.Random(0), time.perf_counter() + seconds
    while order and len(samples[order[0]]) < _MOST_ROUNDS:
        if len(samples[order[0]]) >= _FEWEST and time.perf_counter() > end:
            break
        for name in rng.sample(order, len(order)):
            samples[name].append(1e6 * ready[name].seconds() / count)
    return [_timing(name, own, samples.get(next(iter(calls)))) for name, own in samples.items()], failed


def said(e: Exception) -> str:
    """An error in one short line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def _timing(name: str, own: list[float], base: list[float] | None) -> Timing:
    found = median_interval(own, confidence=0.95, seed=0)
    speedup = None
    if base is not None:
        ratio = median_interval([a / b for a, b in zip(base, own, strict=True)], confidence=0.95, seed=0)
        speedup = (ratio.low, ratio.value, ratio.high)
    return Timing(name, found.value, found.low, found.high, speedup, len(own))


def bandwidth(seconds: float) -> float:
    """Bytes a second of a copy that the cache does not hold: what a memory-bound kernel can reach."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=DEVICE)
    target: Tensor = torch.empty_like(source)
    (found,), failed = compare({"copy": lambda i: target.copy_(source)}, 1, seconds)
    assert not failed
    return 2 * source.numel() / (found.median / 1e6)
