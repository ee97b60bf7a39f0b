"""Widths layer by layer under a budget: the noise that each layer adds to the model's outputs, and a greedy search.

The sensitivity of a layer at b bits is the SQNR of the model's outputs with that layer alone quantized, weights and activations,
measured by running the model. Noise of different layers is taken to add up, which orders the steps; whether a budget of SQNR
holds is measured with all layers quantized together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normfuse.errors import UsageError
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Samples
from normfuse.numerics.compare import sqnr
from normfuse.passes.quantize.coded import Coded
from normfuse.passes.quantize.evaluation import Outputs
from normfuse.passes.quantize.layers.layer import Layer
from normfuse.passes.quantize.probe import progress
from normfuse.quant.spec import ShiftQuant

__all__ = ["Choice", "choose"]

log = logging.getLogger(__name__)

WIDTHS = (8, 6, 4, 3, 2)
_BATCHES = 2  # of each rank, for each measurement

Encode = Callable[[Layer, int], Coded]


@dataclass(frozen=True, eq=False)
class Choice:
    """What the search decided about layers that share one weight.

    Attributes:
        bits: of the weight; None to keep the layers in float.
        sensitivity: (bits, SQNR of the outputs in dB with these layers alone quantized), widest first.
    """

    bits: int | None
    sensitivity: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class _Unit:
    """Layers that share a weight, its forms and what they cost: by width, noise at the outputs and bytes."""

    layers: list[Layer]
    noise: dict[int, float]
    bytes: dict[int, int]
    float_bytes: int


def choose(
    graph: Graph, samples: Samples, units: Sequence[Sequence[Layer]], encode: Encode, spec: ShiftQuant, fixed: int, total: int
) -> list[Choice]:
    """A width for each unit that meets `spec.size_budget` and `spec.sqnr_budget`.

    Args:
        graph: in float.
        samples: what to measure on.
        units: layers that share a weight, together.
        encode: a layer's integers at a width.
        spec: with a budget.
        fixed: bytes of everything that is not in the units, in the quantized model.
        total: bytes of the float model.

    Raises:
        UsageError: no widths meet the budget, or there are no samples.
    """
    if not samples:
        raise UsageError("size_budget= and sqnr_budget= need data to measure on: pass example_inputs or calibration=")
    outputs = Outputs(graph, samples[:_BATCHES])
    found = [_unit(list(layers), encode, outputs, spec, label) for label, layers in _labelled(units)]
    steps = _steps(found)
    if spec.size_budget is not None:
        state = _small_enough(found, steps, spec.size_budget, fixed, total)
        if spec.sqnr_budget is not None and (reached := _measured(outputs, found, state, encode)) < spec.sqnr_budget:
            raise UsageError(
                f"size_budget={spec.size_budget:g} leaves {reached:.1f} dB, and sqnr_budget={spec.sqnr_budget:g} asks for more; "
                "relax one of them"
            )
    else:
        assert spec.sqnr_budget is not None
        state = _last_that_holds(steps, lambda s: _measured(outputs, found, s, encode) >= (spec.sqnr_budget or 0.0))
    return [
        Choice(bits, tuple((b, sqnr(outputs.signal, unit.noise[b])) for b in sorted(unit.noise, reverse=True)))
        for unit, bits in zip(found, state, strict=True)
    ]


def _small_enough(
    found: Sequence[_Unit], steps: Sequence[Sequence[int | None]], budget: float, fixed: int, total: int
) -> Sequence[int | None]:
    """The first step whose bytes are within the budget."""
    always = [not unit.noise for unit in found]  # no width fits: in float whatever the budget
    for step in steps:
        fits = all(b is not None or a for b, a in zip(step, always, strict=True))
        if fits and fixed + _bytes(found, step) <= budget * total:
            return step
    least = (fixed + _bytes(found, steps[-1])) / total
    raise UsageError(
        f"size_budget={budget:g}: with all widths at their least the model has {least:.3f} of its bytes "
        f"in float ({fixed} bytes are not in layers that can be quantized)"
    )


def _labelled(units: Sequence[Sequence[Layer]]) -> list[tuple[str, Sequence[Layer]]]:
    return [(f"sensitivity {i + 1} of {len(units)}", layers) for i, layers in enumerate(units)]


def _unit(layers: list[Layer], encode: Encode, outputs: Outputs, spec: ShiftQuant, label: str) -> _Unit:
    noise: dict[int, float] = {}
    size: dict[int, int] = {}
    widths = WIDTHS if layers[0].spec.weight_bits == spec.weight_bits else (layers[0].spec.weight_bits,)  # an override stands
    with progress(label, len(widths)) as advance:
        for bits in widths:
            try:
                coded = [encode(layer, bits) for layer in layers]
            except Refuse as refusal:  # the sums of this width do not fit
                log.info("%s stays wider than %d bits: %s", layers[0].path, bits, refusal.reason)
                continue
            noise[bits], size[bits] = outputs.noise(coded), coded[0].bytes
            advance()
    weight = layers[0].weight
    return _Unit(layers, noise, size, weight.numel * weight.dtype.itemsize)


def _steps(units: Sequence[_Unit]) -> list[tuple[int | None, ...]]:
    """States from all float, over all at their widest, to all at their narrowest: each step adds least noise for its bytes."""
    widest = [max(u.noise, default=None) for u in units]
    state: list[int | None] = [None] * len(units)
    steps = [tuple(state)]

    def added(i: int) -> float:
        bits = widest[i]
        assert bits is not None
        return units[i].noise[bits]

    for i in sorted((i for i, b in enumerate(widest) if b is not None), key=added):
        state[i] = widest[i]
        steps.append(tuple(state))
    while True:
        options = []
        for i, unit in enumerate(units):
            now = state[i]
            if now is None:
                continue
            for bits in unit.noise:
                saved = unit.bytes[now] - unit.bytes[bits]
                if bits < now and saved > 0:
                    options.append(((unit.noise[bits] - unit.noise[now]) / saved, i, bits))
        if not options:
            return steps
        _, i, bits = min(options)
        state[i] = bits
        steps.append(tuple(state))


def _bytes(units: Sequence[_Unit], state: Sequence[int | None]) -> int:
    return sum(u.float_bytes if b is None else u.bytes[b] for u, b in zip(units, state, strict=True))


def _measured(outputs: Outputs, units: Sequence[_Unit], state: Sequence[int | None], encode: Encode) -> float:
    coded = [encode(layer, b) for u, b in zip(units, state, strict=True) if b is not None for layer in u.layers]
    order = {n: i for i, n in enumerate(outputs.nodes)}
    return outputs.sqnr(sorted(coded, key=lambda c: order[c.layer.node]))


def _last_that_holds(
    steps: Sequence[tuple[int | None, ...]], holds: Callable[[tuple[int | None, ...]], bool]
) -> tuple[int | None, ...]:
    """By bisection: the first step, all in float, holds any budget."""
    low, high = 0, len(steps)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(steps[middle]) else (low, middle)
    return steps[low]
