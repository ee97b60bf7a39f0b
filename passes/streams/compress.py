"""A mean-free stream has one coordinate too many: leave it out, and RMSNorm becomes CRMSNorm.

    x̂ = D x,   x = E x̂,   W x = (W E) x̂,   D RMSNorm(x) = x̂ / √((Σ x̂² + (Σ x̂)²) / d + ε)

D drops coordinate k, E puts −Σ x̂ back. Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers,
arXiv 2305.14858, section 3.3; generalized to any coordinate and any graph.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import default_eps
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Affine, LayerNorm, Op, RmsNorm
from normfuse.passes.affine.weightless import absorbed, fold
from normfuse.passes.streams.residual import Residual, gain, residual, resized
from normfuse.passes.streams.streams import writes

__all__ = ["Compress"]

RULE = "stream_without_one_coordinate"

aten = torch.ops.aten

_ALIGNED = 8  # features that the matrix units of GPUs take at once in half precision
_HALF = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Compress(Pass):
    """Pre-RMSNorm → Pre-CRMSNorm: W x = (W E) x̂ for a mean-free stream x, exactly.

    Run it behind `mean_free`, `affine` and `realise`, in the same call: it accepts only weights whose mean is zero up to
    rounding in float64. A γ that is still in a norm goes into the readers first; a tied head gets a matrix of its own.

    Args:
        index: the coordinate to leave out, from -d to d - 1; None takes the one with the smallest norm of the readers'
            columns, because W E subtracts that column from all others.
        same_width: keep the width d: the coordinate is zeroed in the writers, and the readers get W E with a zero column.

    Raises:
        UsageError: `index` is outside of the width of a stream (when the pass runs).
    """

    index: int | None = None
    same_width: bool = False
    name = "compress"
    leaves_affines = False
    tells = True
    writes = "crms_norm"

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        seen: set[fx.Node] = set()
        for norm in graph:
            op = graph.view(norm, 1)
            if norm in seen or not norm.users or not isinstance(op, (LayerNorm, RmsNorm)):
                continue
            if isinstance(op, LayerNorm):
                work.refuse(RULE, norm, _layer_norm())
                continue
            stream = residual(graph, norm)
            norms = [g.norm for g in stream.norms]
            seen.update(norms)
            try:
                index = self._index(graph, stream)
                if work.permits(RULE, norms[0]):
                    sites = [graph.site(RULE, n) for n in norms]
                    note = self._compressed(graph, stream, index)
                    work.applied += [dataclasses.replace(site, note=note) for site in sites]
            except Refuse as refusal:
                for n in norms:
                    work.refuse(RULE, n, refusal)

    def _index(self, graph: Graph, stream: Residual) -> int | None:
        """The coordinate that was asked for, of a stream that can lose one.

        Raises:
            Refuse: it cannot.
        """
        if stream.problem is not None:
            raise stream.problem
        for g in stream.norms:
            if not g.bare:
                absorbed(graph, g, untie=True)
        return self._given(stream)

    def _compressed(self, graph: Graph, stream: Residual, index: int | None) -> str:
        """Leave a coordinate out; what was done to the stream."""
        twice = _stored_twice(graph, stream)
        seed: fx.Node | None = None
        for norm in [g.norm for g in stream.norms]:
            g = gain(graph, norm)
            seed = norm if g.bare else fold(graph, g, absorbed(graph, g, untie=True))
        assert seed is not None
        stream = residual(graph, seed)
        if stream.problem is not None:
            raise stream.problem
        if index is None:
            index = _smallest(graph, stream)
        _Rewrite(graph, stream, index, self.same_width).run()
        return self._note(stream.width, index) + (f"; {twice} bytes more for weights that are shared" if twice else "")

    def _note(self, d: int, k: int) -> str:
        if self.same_width:
            return f"coordinate {k} of {d} is zero"
        text = f"coordinate {k} of {d} left out, width {d} → {d - 1}"
        if (d - 1) % _ALIGNED:
            text += f"; {d - 1} is no multiple of {_ALIGNED}, products lose their alignment (same_width=True keeps it)"
        return text

    def _given(self, stream: Residual) -> int | None:
        if self.index is None:
            return None
        if not -stream.width <= self.index < stream.width:
            raise UsageError(f"Compress(index={self.index}): the stream has {stream.width} features")
        return self.index % stream.width


def _layer_norm() -> Refuse:
    return Refuse(
        "it is a LayerNorm: the stream that it reads has a mean", remedy="run mean_free first; its report says what holds it"
    )


def _smallest(graph: Graph, stream: Residual) -> int:
    """The coordinate whose columns of the readers have the smallest norm together."""
    total = torch.zeros(stream.width, dtype=torch.float64)
    for node, (name, dim) in stream.readers.items():
        weight: Tensor = getattr(graph.view(node, 2), name).value
        total += weight.square().movedim(dim, 0).flatten(1).sum(1).cpu()
    return int(total.argmin())


def _stored_twice(graph: Graph, stream: Residual) -> int:
    """Bytes of the readers' weights that somebody else reads too, who keeps the original."""
    shared: dict[int, Constant] = {}
    for node, (name, _) in stream.readers.items():
        c: Constant = getattr(graph.view(node, 2), name)
        if any(n not in stream.readers for n in graph.readers_of(c)):
            shared[id(c)] = c
    return sum(c.numel * c.dtype.itemsize for c in shared.values())


class _Rewrite:
    """D goes into what writes a stream and E into what reads it.

    Args:
        graph: the graph.
        stream: a closed stream without a problem, whose norms have no γ and β.
        index: coordinate to leave out, 0 … d − 1.
        same_width: zero the coordinate instead.
    """

    def __init__(self, graph: Graph, stream: Residual, index: int, same_width: bool) -> None:
        self.graph, self.stream, self.k, self.same = graph, stream, index, same_width
        self.d = stream.width
        self._made: dict[tuple[int, str, int], tuple[Constant, Constant]] = {}

    def run(self) -> None:
        """Rewrite in execution order, so that every value has its new shape when it is read."""
        stream = self.stream
        norms, writers, cuts, through = ({g.norm for g in stream.norms}, *map(set, (stream.writers, stream.cuts, stream.through)))
        for node in self.graph:
            if node in stream.readers or node in writers:
                self._weights(node, node in writers)
            elif node in norms:
                self._norm(node)
            elif node in cuts:
                self._cut(node)
            elif self.graph.constant(node) is not None and node in stream.axis:
                self._table(node)
            elif node in through or (not self.same and self._splits(node)):
                self._passed(node)

    # -- D and E on constants --

    def _dropped(self, c: Constant, dim: int) -> Constant:
        """D c along `dim`; the same constant for the same question, so that a shared weight stays one."""
        k, d = self.k, self.d

        def without(v: Tensor) -> Tensor:
            return torch.cat([v.narrow(dim, 0, k), v.narrow(dim, k + 1, d - k - 1)], dim)

        def zeroed(v: Tensor) -> Tensor:
            return v * torch.tensor([float(i != k) for i in range(d)], dtype=v.dtype, device=v.device).reshape(
                [-1 if i == dim % v.ndim else 1 for i in range(v.ndim)]
            )

        return self._once(c, "D", dim, zeroed if self.same else without)

    def _restored(self, c: Constant, dim: int) -> Constant:
        """c E along `dim`: the column of the coordinate is subtracted from all others."""
        k, d = self.k, self.d

        def differences(v: Tensor) -> Tensor:
            column = v.narrow(dim, k, 1)
            if self.same:
                return v - column
            return torch.cat([v.narrow(dim, 0, k), v.narrow(dim, k + 1, d - k - 1)], dim) - column

        return self._once(c, "E", dim, differences)

    def _once(self, c: Constant, role: str, dim: int, function: Callable[[Tensor], Tensor]) -> Constant:
        key = (id(c), role, dim)
        if key not in self._made:
            self._made[key] = (c, Constant.apply(function, c))  # c is kept: an id is only good while its object lives
        return self._made[key][1]

    # -- nodes --

    def _weights(self, node: fx.Node, writer: bool) -> None:
        op = self.graph.view(node, 2)
        assert isinstance(op, Op)
        changed: dict[str, Constant] = {}
        dims = writes(op, self.stream.axis[node]) if writer else None
        for name, dim in (dims or {}).items():
            changed[name] = self._dropped(getattr(op, name), dim)
        if node in self.stream.readers:
            name, dim = self.stream.readers[node]
            changed[name] = self._restored(changed.get(name, getattr(op, name)), dim)
        self.graph.replace(node, dataclasses.replace(op, node=None, **changed))
        self.graph.fx.erase_node(node)

    def _table(self, node: fx.Node) -> None:
        c = self.graph.constant(node)
        assert c is not None
        new = self._dropped(c, c.ndim + self.stream.axis[node])
        for user in list(node.users):
            if user in self.stream.axis:
                user.replace_input_with(node, self.graph.emit_constant(new, user))

    def _passed(self, node: fx.Node) -> None:
        op = self.graph.view(node, 2)
        if isinstance(op, Affine):
            t = op.t
            self.graph.replace(node, Affine(op.x, op.s, t if t.numel == 1 else self._dropped(t, t.ndim + self.stream.axis[node])))
            return
        if node.target is aten.view.default:  # a view demands a layout that a dropped coordinate may not give
            node.target = aten.reshape.default
        if not self.same:
            node.args = resized(node, self.stream.axis.get(node, -1), self.d)
            self.graph.refresh(node)

    def _splits(self, node: fx.Node) -> bool:
        """Is it a split of the stream, whose pieces belong to it?"""
        source = node.args[0] if node.args else None
        return source in self.stream.axis and any(u.target is operator.getitem and u in self.stream.axis for u in node.users)

    def _cut(self, node: fx.Node) -> None:
        """D behind a value that no weight writes."""
        users, axis, after = list(node.users), self.stream.axis[node], node.next
        val = node.meta["val"]
        call = self.graph.call
        if self.same:
            mask = torch.tensor([float(i != self.k) for i in range(self.d)], dtype=torch.float64).reshape(-1, *[1] * (-axis - 1))
            kept = self.graph.emit_constant(Constant.of(mask).cast(val.dtype).named("kept_coordinates"), after)
            new = call(aten.mul.Tensor, (node, kept), after, node)
        elif self.k == self.d - 1:
            new = call(aten.slice.Tensor, (node, val.ndim + axis, 0, self.d - 1), after, node)
        elif self.k == 0:
            new = call(aten.slice.Tensor, (node, val.ndim + axis, 1, self.d), after, node)
        else:
            parts = [
                call(aten.slice.Tensor, (node, val.ndim + axis, a, b), after, node) for a, b in ((0, self.k), (self.k + 1, self.d))
            ]
            new = call(aten.cat.default, (parts, val.ndim + axis), after, node)
        for user in users:
            user.replace_input_with(node, new)

    def _norm(self, node: fx.Node) -> None:
        """x̂ / √((Σ x̂² + (Σ x̂)²) / d + ε); a coordinate that is zero adds nothing to either sum"""
        op = self.graph.view(node, 2)
        assert isinstance(op, RmsNorm)
        x: Any = op.x.node
        dtype: torch.dtype = x.meta["val"].dtype
        eps = default_eps(dtype) if op.eps is None else op.eps

        def call(target: Any, *args: Any) -> fx.Node:
            return self.graph.call(target, args, node, node)

        wide = call(aten.to.dtype, x, torch.float32) if dtype in _HALF else x  # sums of squares do not fit into half precision
        squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, wide, wide), [-1], True)
        total = call(aten.sum.dim_IntList, wide, [-1], True)
        power = call(aten.add.Tensor, squares, call(aten.mul.Tensor, total, total))
        mean = call(aten.add.Tensor, call(aten.mul.Tensor, power, 1.0 / self.d), eps)
        new = call(aten.mul.Tensor, wide, call(aten.rsqrt.default, mean))
        node.replace_all_uses_with(new if wide is x else call(aten.to.dtype, new, dtype))
        self.graph.fx.erase_node(node)
