"""Is a layer faster in integers? Measured on this machine where the native kernels are, predicted elsewhere.

A machine that is busy gives times that are no property of it. Only a difference that is larger than the machine's own noise is
kept for the next time and keeps a layer in float; the rule is that of `normfuse bench`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.benchmark.comparison import Comparison, Verdict
from normfuse.benchmark.interleave import Measurement, Schedule
from normfuse.benchmark.machine import Machine, QuietClock, cpu_model
from normfuse.cache import measurement, remember
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.coded import Coded, CodedProduct
from normfuse.passes.quantize.layers.layer import Layer
from normfuse.passes.quantize.probe import accumulate
from normfuse.ranks import first_rank

__all__ = ["SLOWER", "Rounds", "Speed", "Timer", "compared", "decided", "rounds", "speeds"]

Timer = Callable[[Callable[[], Any], Callable[[], Any]], float]

SLOWER = 0.95
"""A layer whose ratio of times, float to integers, is below this is clearly slower in integers."""

_SECONDS = (0.04, 0.12)  # an undecided measurement goes on for longer
_TURN = 0.0005  # seconds of calls in a row, at least one
_FEWEST = 7  # rounds
_FOREIGN = 0.15  # share of a core that others may use
_TICKS = 0.02  # seconds: resolution of the operating system's accounting
_KEPT = "speed-2"  # folder of the cache; the first one held times that nothing had decided
_ROWS = 2048  # rows beyond this change no ratio
_RANK = 4

# The cost model: time in units of one float multiply-add, of a core with vectors of 8 floats and 8-bit products of pairs
# (AVX2, the least that the kernels are made for): integers take half of the time, a byte from memory takes as long as 8.
_INTEGER = 0.5
_BYTE = 8.0
_QUANTIZE = 12.0  # reading, scaling and writing one activation


@dataclass(frozen=True)
class Speed:
    """Time in float over time in integers; `measured` here, or predicted by the cost model.

    Attributes:
        decided: the ratio is surely above or surely below 1, and a measurement of another time would say the same.
    """

    ratio: float
    measured: bool
    decided: bool = True

    @property
    def slower(self) -> bool:
        """Surely and clearly slower in integers, on this machine."""
        return self.measured and self.decided and self.ratio < SLOWER


@dataclass(frozen=True)
class Rounds:
    """Seconds of a call in float, in float once more, and in integers, by round; `disturbed`: others used the CPU meanwhile."""

    seconds: tuple[tuple[float, float, float], ...]
    disturbed: bool


def speeds(graph: Graph, samples: Samples, coded: Sequence[Coded], timer: Timer | None = None) -> dict[Layer, Speed]:
    """How much faster each layer is, where the shape of what it reads is known; layers of one shape are timed once.

    Args:
        graph: the graph.
        samples: its samples; without any there is no shape.
        coded: the layers.
        timer: given (in integers, in float), returns the ratio of times, which is believed; None measures `rounds` if the native
            kernels are there, else the cost model predicts. What is decided is kept for this machine (`normfuse.cache`).
    """
    products = [c for c in coded if isinstance(c, CodedProduct)]
    shapes = _shapes(graph, samples, products)
    machine = _machine() if timer is None and native.available() else None
    known: dict[Any, Speed] = {}

    def measured() -> dict[int, Speed]:
        found: dict[int, Speed] = {}
        for i, c in enumerate(products):
            if c.layer not in shapes:
                continue
            key = _key(c, shapes[c.layer])
            if key not in known:
                shape = shapes[c.layer]
                if timer is not None:
                    known[key] = _timed(c, shape, lambda ints, floats: Speed(timer(ints, floats), True))
                elif machine is None:
                    known[key] = Speed(_predicted(c, shape), False)
                else:  # once on a machine: a model that is optimized again becomes the same
                    asked = {**machine, "layer": repr(key)}
                    ratio = measurement(_KEPT, asked)
                    known[key] = Speed(ratio, True) if isinstance(ratio, float) else _timed(c, shape, _measured)
                    if ratio is None and known[key].decided:
                        remember(_KEPT, asked, known[key].ratio)
            found[i] = known[key]
        return found

    return {products[i].layer: speed for i, speed in first_rank(measured).items()}


def compared(key: Any, integers: Callable[[], Any], floats: Callable[[], Any], timer: Timer | None = None) -> Speed | None:
    """How much faster something else than a layer is; None where there is nothing to measure it with.

    Args:
        key: what it is, of literals: a decision is kept for this machine.
        integers, floats: both forms.
        timer: as of `speeds`.
    """
    if timer is not None:
        return Speed(timer(integers, floats), True)
    if not native.available():
        return None
    asked = {**_machine(), "layer": repr(key)}
    ratio = measurement(_KEPT, asked)
    if isinstance(ratio, float):
        return Speed(ratio, True)
    with torch.inference_mode():
        speed = _measured(integers, floats)
    if ratio is None and speed.decided:
        remember(_KEPT, asked, speed.ratio)
    return speed


def _machine() -> dict[str, Any]:
    """What a ratio of times depends on besides the layer."""
    library = hashlib.sha256(native.path().read_bytes()).hexdigest()
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "library": library,
        "isa": native.isa(),
    }


def rounds(integers: Callable[[], Any], floats: Callable[[], Any], seconds: float) -> Rounds:
    """Times of both for about `seconds`, in turn, so that a busy machine disturbs both alike; the float form twice a round."""
    for call in (integers, floats):
        call()  # packs, allocates
    quiet, begin = QuietClock(), time.perf_counter()
    found: list[tuple[float, float, float]] = []
    while len(found) < _FEWEST or time.perf_counter() - begin < seconds:
        first, second = _turn(floats), _turn(integers)
        found.append((first, _turn(floats), second))
    wall = time.perf_counter() - begin
    return Rounds(tuple(found), quiet.foreign(0.0) > _FOREIGN * wall + _TICKS)


def _turn(call: Callable[[], Any]) -> float:
    taken: list[float] = []
    while sum(taken) < _TURN:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def decided(found: Rounds) -> Speed:
    """The speed of a layer by what was measured, and whether that is one: as `normfuse bench` decides for a model.

    Decided is a ratio whose 95 % interval excludes 1, also when it is widened by what the float form differs from itself.
    """
    schedule, names = Schedule(isolate=False), ("float", "float again", "integers")
    calls = tuple(zip(*found.seconds, strict=True))
    share = float(found.disturbed)
    measured = Measurement(names, found.seconds, calls, torch.get_num_threads(), (), share, _here(), schedule)
    comparison = Comparison.of(measured)
    return Speed(comparison.speedup.value, True, comparison.verdict(at_least=1.0) is not Verdict.UNDECIDED)


@functools.cache
def _here() -> Machine:
    return Machine.here()


def _measured(integers: Callable[[], Any], floats: Callable[[], Any]) -> Speed:
    found = Speed(1.0, True, decided=False)
    for seconds in _SECONDS:
        found = decided(rounds(integers, floats, seconds))
        if found.decided:
            break
    return found


def _timed(
    coded: CodedProduct, shape: tuple[int, ...], stopwatch: Callable[[Callable[[], Any], Callable[[], Any]], Speed]
) -> Speed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    floats = coded.layer.in_float()
    with torch.inference_mode():
        return stopwatch(lambda: coded(x), lambda: floats(x))


def _predicted(coded: CodedProduct, shape: tuple[int, ...]) -> float:
    layer = coded.layer
    read, k = math.prod(shape), layer.channels * layer.taps
    work, weights = layer.places(shape) * layer.outputs * k, layer.outputs * k
    in_float = max(work, 4 * _BYTE * weights)
    in_integers = max(_INTEGER * work, coded.bits / 8 * _BYTE * weights) + _QUANTIZE * read
    return in_float / in_integers


def _shapes(graph: Graph, samples: Samples, coded: Sequence[CodedProduct]) -> dict[Layer, tuple[int, ...]]:
    """The sizes to time each layer on, of what it reads in the first batch of the calibration data."""
    found = accumulate(graph, samples[:1], [(c.layer.x, _sizes) for c in coded], torch.maximum)
    shapes: dict[Layer, tuple[int, ...]] = {}
    for c, t in zip(coded, found, strict=bool(found)):
        sizes = c.layer.timed_on([int(n) for n in t.tolist() if n >= 0], _ROWS)
        if 0 not in sizes:
            shapes[c.layer] = tuple(sizes)
    return shapes


def _sizes(x: Tensor) -> Tensor:
    return torch.tensor([*x.shape, *[-1] * max(0, _RANK + 2 - x.ndim)], dtype=torch.float64)


def _key(coded: CodedProduct, shape: tuple[int, ...]) -> Any:
    layer, exponents = coded.layer, len(coded.channels_by_exponent)
    widths = (coded.bits, coded.activation_bits, exponents, coded.input_scale is None, *([coded.block] if coded.block else []))
    return layer.kind, shape, layer.outputs, layer.taps, *widths, layer.geometry, layer.epilogue
