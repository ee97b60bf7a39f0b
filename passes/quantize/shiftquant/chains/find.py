"""Which operators of a float graph can read and write codes, and which of them go together."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir import views
from normfuse.ir.graph import Graph, Refuse
from normfuse.passes.quantize.layers.conv2d import read_conv2d
from normfuse.passes.quantize.shiftquant.chains.functions import bounds, is_function
from normfuse.passes.quantize.shiftquant.chains.moves import read_taken, read_times
from normfuse.passes.quantize.shiftquant.chains.steps import (
    Add,
    AvgPool,
    Cat,
    Conv,
    Gate,
    MaxPool,
    Mean,
    Step,
    Take,
    Upsample,
    with_function,
)
from normfuse.quant.spec import ShiftQuant

__all__ = ["Chain", "Found", "find_chains"]

aten = torch.ops.aten

_FEWEST = 2  # convolutions of a chain: codes that nobody hands on gain nothing


@dataclass(frozen=True, eq=False)
class Chain:
    """Steps that hand codes to each other, in the order of the graph."""

    steps: tuple[Step, ...]

    @property
    def convolutions(self) -> tuple[Conv, ...]:
        return tuple(s for s in self.steps if isinstance(s, Conv))

    @property
    def path(self) -> str:
        """Where it starts."""
        return self.convolutions[0].path

    @property
    def ends(self) -> tuple[Step, ...]:
        """The steps whose values leave the codes."""
        inside = {n for s in self.steps for n in s.taken}
        return tuple(s for s in self.steps if not s.writes or any(u not in inside for u in s.tail.users))


@dataclass(frozen=True)
class Found:
    """What was found: the chains, and the convolutions that are in none, with the reason."""

    chains: tuple[Chain, ...]
    refused: tuple[tuple[fx.Node, Refuse], ...]


def find_chains(graph: Graph, spec: ShiftQuant) -> Found:
    """The chains of a graph in float."""
    return _Finder(graph, spec).run()


class _Finder:
    """One walk over a graph."""

    def __init__(self, graph: Graph, spec: ShiftQuant) -> None:
        self.graph, self.spec = graph, spec
        self.steps: dict[fx.Node, Step] = {}  # by tail, in the order of the graph
        self.taken: set[fx.Node] = set()
        self.refused: list[tuple[fx.Node, Refuse]] = []

    def run(self) -> Found:
        for node in self.graph:
            if node.op != "call_function" or node in self.taken:
                continue
            step = self._read(node)
            if step is not None:
                self._put(step)
        order = {n: i for i, n in enumerate(self.graph.fx.nodes)}
        steps = sorted(self.steps.values(), key=lambda s: order[s.tail])
        chains = []
        for group in _connected(steps):
            chain = Chain(tuple(group))
            if len(chain.convolutions) >= _FEWEST:
                chains.append(chain)
                continue
            for conv in chain.convolutions:
                self.refused.append((conv.node, Refuse("alone: what stands before and behind it is in float")))
        return Found(tuple(chains), tuple(self.refused))

    def _put(self, step: Step) -> None:
        """With the functions of one value behind it, as far as they have no other reader."""
        while not step.function and len(step.tail.users) == 1:
            (user,) = step.tail.users
            limits = bounds(user)
            # one pair of bounds: a second one would have to be cut to the first
            fits = step.bounded and step.bounds.none if limits is not None else step.functional and is_function(user)
            if not fits:
                break
            step = with_function(step, user, limits)
        self.steps[step.tail] = step
        self.taken.update(step.taken)

    def _read(self, node: fx.Node) -> Step | None:
        if node.target in _CONVOLUTIONS:
            try:
                return self._conv(node)
            except Refuse as refusal:
                self.refused.append((node, refusal))
                return None
        target: Any = node.target
        read = _READ.get(target)
        return read(self, node) if read is not None and _is_image(node) else None

    def _conv(self, node: fx.Node) -> Conv:
        graph, path = self.graph, self.graph.path(node)
        op = graph.view(node, 2)
        if not isinstance(op, views.Conv):
            raise Refuse("its weight is computed when the model runs")
        spec = self.spec.at(path)
        if (pattern := self.spec.kept(path)) is not None:
            raise Refuse(f"kept in float by keep={pattern!r}")
        if spec.activations != "static":
            raise Refuse("codes need static scales, and its activations are dynamic")
        layer = read_conv2d(node, op, path, spec)
        layer.check()
        if layer.unit_axis or not _is_image(node) or not _is_image(layer.x):
            raise Refuse("codes are those of images in float32, [batch, channels, height, width]")
        if tuple(node.meta["val"].shape[2:]) == (1, 1):
            raise Refuse("its image is one pixel: codes would cost more than they gain")
        return Conv(node, path, node, layer, taken=(node,))

    def _known(self, node: object) -> bool:
        """Does a step write it as codes?"""
        return isinstance(node, fx.Node) and node in self.steps and self.steps[node].writes

    # -- other operators ---------------------------------------------------------------------------------------------------

    def _add(self, node: fx.Node) -> Step | None:
        op = self.graph.view(node, 1)
        if not isinstance(op, views.Add) or not all(isinstance(v, views.Value) for v in (op.x, op.y)):
            return None
        a, b = node.args[0], node.args[1]
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not (self._known(a) or self._known(b)):
            return None
        if not all(_is_image(n) and _same_shape(n, node) for n in (a, b)):
            return None
        for conv, residual in ((a, b), (b, a)):
            step = self.steps.get(conv)
            if isinstance(step, Conv) and self._takes(step, residual):
                del self.steps[conv]
                return dataclasses.replace(step, residual=residual, tail=node, taken=(*step.taken, node))
        return Add(node, self.graph.path(node), node, a, b, taken=(node,))

    def _takes(self, step: Conv, residual: fx.Node) -> bool:
        """May the sum be taken behind the product, before anything else?"""
        plain = step.bounds.none and step.function is None and step.residual is None and not step.depthwise
        return plain and len(step.tail.users) == 1 and residual is not step.tail and self._known(residual)

    def _mul(self, node: fx.Node) -> Step | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        for x, gate in (node.args, node.args[::-1]):
            if not (self._known(x) and isinstance(x, fx.Node) and isinstance(gate, fx.Node) and _is_image(gate)):
                continue
            sizes, gated = gate.meta["val"].shape, x.meta["val"].shape
            if tuple(sizes[2:]) == (1, 1) and tuple(sizes[:2]) == tuple(gated[:2]) and not self._known(gate):
                return Gate(node, self.graph.path(node), node, x, gate, taken=(node,))
        return None

    def _max_pool(self, node: fx.Node) -> Step | None:
        op = self.graph.view(node, 1)
        if not isinstance(op, views.MaxPool) or not self._known(node.args[0]) or _pair(op.dilation) != (1, 1):
            return None
        window = _window(node, op)
        return None if window is None else MaxPool(node, self.graph.path(node), node, _read_by(node), *window, taken=(node,))

    def _avg_pool(self, node: fx.Node) -> Step | None:
        op = self.graph.view(node, 1)
        if not isinstance(op, views.AvgPool) or not self._known(node.args[0]):
            return None
        window, x = _window(node, op), _read_by(node)
        padded = any(_pair(op.padding))
        # windows over the border would have divisors of their own
        if window is None or (padded and not op.count_include_pad) or window[2][2:] != window[2][:2]:
            return None
        kernel = window[0]
        if not isinstance(x.meta["val"].shape[1], int) or x.meta["val"].shape[1] == 1:
            return None
        divisor = op.divisor or kernel[0] * kernel[1]
        return AvgPool(node, self.graph.path(node), node, x, *window, divisor, taken=(node,))

    def _cat(self, node: fx.Node) -> Step | None:
        op = self.graph.view(node, 1)
        if not isinstance(op, views.Cat) or op.dim not in (1, -3):
            return None
        xs = tuple(n for n in node.args[0] if isinstance(n, fx.Node))  # type: ignore[union-attr]
        if len(xs) != len(op.xs) or not any(self._known(x) for x in xs) or not all(_is_image(x) for x in xs):
            return None
        return Cat(node, self.graph.path(node), node, xs, taken=(node,))

    def _take(self, node: fx.Node) -> Step | None:
        taking = read_taken(node, self._known)
        return None if taking is None else Take(node, self.graph.path(node), node, taking, taken=taking.through)

    def _upsample(self, node: fx.Node) -> Step | None:
        times = read_times(node) if self._known(node.args[0]) else None
        return None if times is None else Upsample(node, self.graph.path(node), node, _read_by(node), times, taken=(node,))

    def _mean(self, node: fx.Node) -> Step | None:
        op, x = self.graph.view(node, 1), node.args[0]
        if not self._known(x) or not isinstance(x, fx.Node):
            return None
        if isinstance(op, views.GlobalAvgPool):
            flat, whole = False, _pair(op.size) == (1, 1)
        else:
            whole = isinstance(op, views.Mean) and op.dtype is None and sorted(d % 4 for d in _listed(op.dim)) == [2, 3]
            flat = isinstance(op, views.Mean) and not op.keepdim
        return Mean(node, self.graph.path(node), node, x, flat, taken=(node,)) if whole else None


_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_READ = {
    aten.add.Tensor: _Finder._add,
    aten.mul.Tensor: _Finder._mul,
    aten.max_pool2d.default: _Finder._max_pool,
    aten.cat.default: _Finder._cat,
    aten.adaptive_avg_pool2d.default: _Finder._mean,
    aten.mean.dim: _Finder._mean,
    aten.avg_pool2d.default: _Finder._avg_pool,
    aten.upsample_nearest2d.vec: _Finder._upsample,
    aten._upsample_nearest_exact2d.vec: _Finder._upsample,
    **dict.fromkeys(
        (
            operator.getitem, aten.slice.Tensor, aten.narrow.default, aten.channel_shuffle.default, aten.view.default,
            aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
        ),
        _Finder._take,
    ),
}  # fmt: skip


def _connected(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that are connected by codes, each group in the order of the graph."""
    from networkx.utils import UnionFind

    by_tail = {s.tail: s for s in steps}
    joined = UnionFind(steps)
    for step in steps:
        joined.union(step, *(by_tail[n] for n in step.reads if n in by_tail and by_tail[n].writes))
    groups: dict[Step, list[Step]] = {}
    for step in steps:
        groups.setdefault(joined[step], []).append(step)
    yield from groups.values()


def _is_image(node: fx.Node) -> bool:
    """float32 of rank 4, or a mean of one."""
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dtype is torch.float32 and (val.ndim == 4 or node.target is aten.mean.dim)


def _read_by(node: fx.Node) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x


def _window(
    node: fx.Node, op: views.MaxPool | views.AvgPool
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]] | None:
    """Kernel, stride, and padding (top, left, bottom, right) of a pool; None where `ceil_mode` pads by sizes that are not known."""
    kernel, (top, left) = _pair(op.kernel), _pair(op.padding)
    stride = _pair(op.stride) if op.stride else kernel
    ends = [top, left]
    if op.ceil_mode:
        for axis, begin in enumerate((top, left)):
            size, out = _read_by(node).meta["val"].shape[2 + axis], node.meta["val"].shape[2 + axis]
            if not isinstance(size, int) or not isinstance(out, int):
                return None
            ends[axis] = max(0, (out - 1) * stride[axis] + kernel[axis] - size - begin)
    return kernel, stride, (top, left, ends[0], ends[1])


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return tuple(a.meta["val"].shape) == tuple(b.meta["val"].shape)


def _pair(value: Any) -> tuple[int, int]:
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    given = given * 2 if len(given) == 1 else given
    return int(given[0]), int(given[1])


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
