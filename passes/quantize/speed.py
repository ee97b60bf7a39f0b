"""Is a layer faster in integers? Measured on this machine where the native kernels are, predicted elsewhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.benchmark.machine import cpu_model
from normfuse.benchmark.turns import in_turns
from normfuse.cache import measurement, remember
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.coded import Coded, CodedProduct
from normfuse.passes.quantize.layers.layer import Layer
from normfuse.passes.quantize.probe import accumulate
from normfuse.ranks import first_rank

__all__ = ["SLOWER", "Speed", "Timer", "interleaved", "speeds"]

Timer = Callable[[Callable[[], Any], Callable[[], Any]], float]

SLOWER = 0.95
"""A layer whose ratio of times, float to integers, is below this is clearly slower in integers."""

_SECONDS = 0.02  # for each of the two
_FEWEST = 3  # runs of each: a single one may be the one that a busy machine held up
_ROWS = 2048  # rows beyond this change no ratio
_RANK = 4

# The cost model: time in units of one float multiply-add, of a core with vectors of 8 floats and 8-bit products of pairs
# (AVX2, the least that the kernels are made for): integers take half of the time, a byte from memory takes as long as 8.
_INTEGER = 0.5
_BYTE = 8.0
_QUANTIZE = 12.0  # reading, scaling and writing one activation


@dataclass(frozen=True)
class Speed:
    """Time in float over time in integers; `measured` here, or predicted by the cost model."""

    ratio: float
    measured: bool


def speeds(graph: Graph, samples: Samples, coded: Sequence[Coded], timer: Timer | None = None) -> dict[Layer, Speed]:
    """How much faster each layer is, where the shape of what it reads is known; layers of one shape are timed once.

    Args:
        graph: the graph.
        samples: its samples; without any there is no shape.
        coded: the layers.
        timer: given (in integers, in float), returns the ratio of times; None times with `interleaved` if the native kernels
            are there, else the cost model predicts.
    """
    products = [c for c in coded if isinstance(c, CodedProduct)]
    shapes = _shapes(graph, samples, products)
    machine = _machine() if timer is None and native.available() else None
    timer = timer or (interleaved if native.available() else None)
    known: dict[Any, Speed] = {}

    def measured() -> dict[int, Speed]:
        found: dict[int, Speed] = {}
        for i, c in enumerate(products):
            if c.layer not in shapes:
                continue
            key = _key(c, shapes[c.layer])
            if key not in known:
                shape = shapes[c.layer]
                if timer is None:
                    known[key] = Speed(_predicted(c, shape), False)
                elif machine is None:
                    known[key] = _timed(c, shape, timer)
                else:  # once on a machine: a model that is optimized again becomes the same
                    asked = {**machine, "layer": repr(key)}
                    ratio = measurement("speed", asked)
                    known[key] = Speed(ratio, True) if isinstance(ratio, float) else _timed(c, shape, timer)
                    if ratio is None:
                        remember("speed", asked, known[key].ratio)
            found[i] = known[key]
        return found

    return {products[i].layer: speed for i, speed in first_rank(measured).items()}


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


def interleaved(integers: Callable[[], Any], floats: Callable[[], Any]) -> float:
    """Shortest of many runs of each, in turn, so that a busy machine disturbs both alike; a slow verdict is looked at longer."""
    for call in (integers, floats):
        call()  # packs, allocates
    best_integers = best_floats = float("inf")
    spent = 0.0
    for runs, (a, b) in enumerate(in_turns(integers, floats), 1):
        best_integers, best_floats = min(best_integers, a), min(best_floats, b)
        spent += a + b
        slow = best_floats < SLOWER * best_integers and spent < 6 * _SECONDS
        if runs >= _FEWEST and spent >= 2 * _SECONDS and not slow:
            break
    return best_floats / best_integers


def _timed(coded: CodedProduct, shape: tuple[int, ...], timer: Timer) -> Speed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    floats = coded.layer.in_float()
    with torch.inference_mode():
        return Speed(timer(lambda: coded(x), lambda: floats(x)), True)


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
    widths = (coded.bits, coded.activation_bits, exponents, coded.input_scale is None)
    return layer.kind, shape, layer.outputs, layer.taps, *widths, layer.geometry, layer.epilogue
