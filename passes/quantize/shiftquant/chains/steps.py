"""The steps of a chain: what each reads, and what it becomes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.shiftquant.chains.functions import Bounds
from normfuse.passes.quantize.shiftquant.chains.moves import Taken
from normfuse.passes.quantize.shiftquant.chains.ranges import Range, single
from normfuse.passes.quantize.shiftquant.chains.weights import CodedConv
from normfuse.quant.packing import pack_rows

__all__ = ["Add", "AvgPool", "Cat", "Conv", "Gate", "MaxPool", "Mean", "Step", "Take", "Upsample", "Writer"]

ops = torch.ops.normfuse
aten = torch.ops.aten

_ONES = 2  # bits of a weight that is 1


class Writer(Protocol):
    """What a step needs to be written."""

    graph: Graph

    def range(self, node: fx.Node) -> Range:
        """What a code of the value of `node` is worth."""

    def codes(self, node: fx.Node, step: Step) -> fx.Node:
        """Its codes, for this step to read."""

    def coded(self, step: Conv) -> CodedConv:
        """The weights of a convolution."""


@dataclass(frozen=True, eq=False)
class Step(ABC):
    """One operator on codes.

    Attributes:
        node: the operator in float.
        path: its module path.
        tail: the node whose value it writes: `node`, or the last of the operators that went into it.
        bounds: of the values that are written.
        function: the operator that a table of 256 codes stands for, behind the bounds; None for none.
        taken: all operators that it stands for.
    """

    node: fx.Node
    path: str
    tail: fx.Node
    bounds: Bounds = field(default=Bounds(), kw_only=True)
    function: fx.Node | None = field(default=None, kw_only=True)
    taken: tuple[fx.Node, ...] = field(kw_only=True)

    #: Does it write codes? Else floats.
    writes = True
    #: May bounds, or a function, go into it?
    bounded = False
    functional = False

    @property
    @abstractmethod
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose codes it reads."""

    @property
    def alike(self) -> tuple[fx.Node, ...]:
        """Nodes whose codes are worth the same."""
        return ()

    @abstractmethod
    def emit(self, at: Writer) -> fx.Node:
        """Its node, in front of `tail`."""

    def call(self, at: Writer, target: Any, *args: Any) -> fx.Node:
        return at.graph.call(target, args, self.tail, self.node)

    def limits(self, at: Writer) -> tuple[int, int]:
        """The least and the largest code."""
        return at.range(self.tail).limits(self.bounds)


@dataclass(frozen=True, eq=False)
class Conv(Step):
    """A convolution, with its bias, bounds or a function, and a residual.

    Attributes:
        layer: in float.
        residual: a node whose value is added before the bounds.
    """

    layer: Conv2d
    residual: fx.Node | None = field(default=None, kw_only=True)

    bounded = functional = True

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.layer.x,) if self.residual is None else (self.layer.x, self.residual)

    @property
    def depthwise(self) -> bool:
        return self.layer.groups > 1 and self.layer.groups == self.layer.outputs == self.layer.channels * self.layer.groups

    def emit(self, at: Writer) -> fx.Node:
        coded, geometry = at.coded(self), self.layer.at
        x = at.codes(self.layer.x, self)
        residual = None if self.residual is None else at.codes(self.residual, self)
        constants = [None if c is None else at.graph.emit_constant(c, self.tail) for c in coded.constants()]
        weight, shifts, scale, bias, table = constants
        top, left = geometry.padding
        below, right = geometry.more
        return self.call(
            at, ops.codes_conv2d.default, x, weight, shifts, scale, bias, residual, table, coded.bits, list(geometry.kernel),
            list(geometry.stride), [top, left, top + below, left + right], list(geometry.dilation), geometry.groups,
            at.range(self.layer.x).zero, *coded.limits, coded.residual_scale, coded.function, coded.gain, coded.offset,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Add(Step):
    """a + b."""

    a: fx.Node
    b: fx.Node

    bounded = True

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return self.a, self.b

    def emit(self, at: Writer) -> fx.Node:
        out, a, b = at.range(self.tail), at.range(self.a), at.range(self.b)
        by, too = a.scale / out.scale, b.scale / out.scale
        bias = single(out.zero - a.zero * single(by) - b.zero * single(too))
        codes = at.codes(self.a, self), at.codes(self.b, self)
        return self.call(at, ops.codes_add.default, *codes, single(by), single(too), bias, *self.limits(at))


@dataclass(frozen=True, eq=False)
class Gate(Step):
    """x[b, c] · g[b, c]: squeeze-and-excite.

    Attributes:
        x: what is gated.
        gate: floats [batch, channels, 1, 1].
    """

    x: fx.Node
    gate: fx.Node

    bounded = True

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x,)

    def emit(self, at: Writer) -> fx.Node:
        out, x = at.range(self.tail), at.range(self.x)
        arguments = (single(x.scale / out.scale), x.zero, float(out.zero), *self.limits(at))
        return self.call(at, ops.codes_gate.default, at.codes(self.x, self), self.gate, *arguments)


@dataclass(frozen=True, eq=False)
class MaxPool(Step):
    """The largest of each window."""

    x: fx.Node
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x,)

    @property
    def alike(self) -> tuple[fx.Node, ...]:
        return self.x, self.tail

    def emit(self, at: Writer) -> fx.Node:
        window = (list(self.kernel), list(self.stride), list(self.padding))
        return self.call(at, ops.codes_max_pool2d.default, at.codes(self.x, self), *window)


@dataclass(frozen=True, eq=False)
class AvgPool(Step):
    """The sum of each window over a divisor: a depthwise convolution of ones.

    Attributes:
        padding: (top, left, bottom, right), of zeros.
    """

    x: fx.Node
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    divisor: int

    bounded = True

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x,)

    def emit(self, at: Writer) -> fx.Node:
        reads, writes = at.range(self.x), at.range(self.tail)
        channels, taps = int(self.x.meta["val"].shape[1]), self.kernel[0] * self.kernel[1]
        scale = torch.full((channels,), reads.scale / (writes.scale * self.divisor))
        ones = {
            "codes": pack_rows(torch.ones(channels, taps, dtype=torch.int8), _ONES), "scale": scale,
            "shifts": torch.zeros(channels, dtype=torch.uint8), "bias": torch.full((channels,), float(writes.zero)),
        }  # fmt: skip
        made = {k: at.graph.emit_constant(Constant.of(t, f"{self.path or 'pool'}.{k}"), self.tail) for k, t in ones.items()}
        return self.call(
            at, ops.codes_conv2d.default, at.codes(self.x, self), made["codes"], made["shifts"], made["scale"], made["bias"], None,
            None, _ONES, list(self.kernel), list(self.stride), list(self.padding), [1, 1], channels, reads.zero, *self.limits(at),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Take(Step):
    """Some channels, or a shuffle of them."""

    taking: Taken

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.taking.x,)

    @property
    def alike(self) -> tuple[fx.Node, ...]:
        return self.taking.x, self.tail

    def emit(self, at: Writer) -> fx.Node:
        taking = self.taking
        return self.call(at, ops.codes_take.default, at.codes(taking.x, self), taking.first, taking.count, taking.groups)


@dataclass(frozen=True, eq=False)
class Upsample(Step):
    """Every pixel several times."""

    x: fx.Node
    times: tuple[int, int]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x,)

    @property
    def alike(self) -> tuple[fx.Node, ...]:
        return self.x, self.tail

    def emit(self, at: Writer) -> fx.Node:
        return self.call(at, ops.codes_upsample.default, at.codes(self.x, self), list(self.times))


@dataclass(frozen=True, eq=False)
class Cat(Step):
    """Channels behind each other."""

    xs: tuple[fx.Node, ...]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return self.xs

    @property
    def alike(self) -> tuple[fx.Node, ...]:
        return *self.xs, self.tail

    def emit(self, at: Writer) -> fx.Node:
        return self.call(at, aten.cat.default, [at.codes(x, self) for x in self.xs], 3)


@dataclass(frozen=True, eq=False)
class Mean(Step):
    """The mean over the pixels, in floats.

    Attributes:
        flat: without the axes of the pixels.
    """

    x: fx.Node
    flat: bool

    writes = False

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x,)

    def emit(self, at: Writer) -> fx.Node:
        x = at.range(self.x)
        mean = self.call(at, ops.codes_mean.default, at.codes(self.x, self), single(x.scale), x.zero)
        return self.call(at, aten.flatten.using_ints, mean, 1) if self.flat else mean


def with_function(step: Step, node: fx.Node, limits: Bounds | None) -> Step:
    """The step with the operator behind it taken in."""
    taken = (*step.taken, node)
    if limits is None:
        return dataclasses.replace(step, function=node, tail=node, taken=taken)
    return dataclasses.replace(step, bounds=limits, tail=node, taken=taken)
