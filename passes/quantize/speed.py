"""Is a layer faster in integers? Measured on this machine where the native kernels are, predicted elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfuse import native
from normfuse.benchmark.machine import cpu_model
from normfuse.benchmark.turns import in_turns
from normfuse.cache import measurement, remember
from normfuse.ir.graph import Graph
from normfuse.passes.quantize.coded import Coded
from normfuse.passes.quantize.probe import accumulate
from normfuse.passes.quantize.sites import Layer
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


def speeds(graph: Graph, coded: Sequence[Coded], timer: Timer | None = None) -> dict[Layer, Speed]:
    """How much faster each layer is, where the shape of what it reads is known; layers of one shape are timed once.

    Args:
        graph: the graph, with its samples; without any there is no shape.
        coded: the layers.
        timer: given (in integers, in float), returns the ratio of times; None times with `interleaved` if the native kernels
            are there, else the cost model predicts.
    """
    coded = [c for c in coded if c.layer.kind != "embedding"]
    shapes = _shapes(graph, coded)
    machine = _machine() if timer is None and native.available() else None
    timer = timer or (interleaved if native.available() else None)
    known: dict[Any, Speed] = {}

    def measured() -> dict[int, Speed]:
        found: dict[int, Speed] = {}
        for i, c in enumerate(coded):
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

    return {coded[i].layer: speed for i, speed in first_rank(measured).items()}


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


def _timed(coded: Coded, shape: tuple[int, ...], timer: Timer) -> Speed:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    floats = _float_form(coded)
    with torch.inference_mode():
        return Speed(timer(lambda: coded(x), lambda: floats(x)), True)


def _float_form(coded: Coded) -> Callable[[Tensor], Tensor]:
    layer = coded.layer
    weight = layer.weight.value.float().contiguous()
    bias = None if layer.bias is None else layer.bias.value.float()
    act = _ACTIVATIONS[layer.epilogue]
    if layer.kind == "linear":
        weight = weight.T.contiguous() if layer.transposed else weight
        return lambda x: act(F.linear(x, weight, bias))
    if layer.unit_axis:
        weight = weight.unsqueeze(2)
    where = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return lambda x: act(F.conv2d(layer.laid_out(x), weight, bias, *where))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def _predicted(coded: Coded, shape: tuple[int, ...]) -> float:
    layer = coded.layer
    read, k = 1, layer.channels * layer.taps
    for size in shape:
        read *= size
    rows = read // (layer.channels * layer.groups) if layer.kind == "linear" else _places(layer, shape)
    work, weights = rows * layer.outputs * k, layer.outputs * k
    in_float = max(work, 4 * _BYTE * weights)
    in_integers = max(_INTEGER * work, coded.bits / 8 * _BYTE * weights) + _QUANTIZE * read
    return in_float / in_integers


def _places(layer: Layer, shape: tuple[int, ...]) -> int:
    sizes = ([1] if layer.unit_axis else []) + list(shape[2:])
    count = shape[0]
    for n, k, s, p, d, more in zip(sizes, layer.kernel, layer.stride, layer.padding, layer.dilation, layer.more, strict=True):
        count *= (n + 2 * p + more - d * (k - 1) - 1) // s + 1
    return count


def _shapes(graph: Graph, coded: Sequence[Coded]) -> dict[Layer, tuple[int, ...]]:
    """The sizes that each layer reads in the first batch of the calibration data; linears with rows flattened and capped."""
    found = accumulate(graph, [(c.layer.x, _sizes) for c in coded], torch.maximum, batches=1)
    shapes: dict[Layer, tuple[int, ...]] = {}
    for c, t in zip(coded, found, strict=bool(found)):
        sizes = [int(n) for n in t.tolist() if n >= 0]
        if c.layer.kind == "linear":
            rows = 1
            for n in sizes[:-1]:
                rows *= n
            sizes = [min(rows, _ROWS), sizes[-1]]
        if 0 not in sizes:
            shapes[c.layer] = tuple(sizes)
    return shapes


def _sizes(x: Tensor) -> Tensor:
    return torch.tensor([*x.shape, *[-1] * max(0, _RANK + 2 - x.ndim)], dtype=torch.float64)


def _key(coded: Coded, shape: tuple[int, ...]) -> Any:
    layer = coded.layer
    where = (layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups, layer.more, layer.epilogue)
    groups = len(coded.channels_by_exponent)
    return (
        layer.kind,
        shape,
        layer.outputs,
        layer.taps,
        coded.bits,
        coded.activation_bits,
        groups,
        coded.input_scale is None,
        where,
    )
