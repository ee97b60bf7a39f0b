"""Rotary embeddings in front of a cached attention, recognised by what they compute.

Whatever stands between a projection and the attention is *run*: on features of which only the first ones of all pairs are 1 it
tells its tables, and on random ones it has to be the rotation by these. So every spelling is taken (halves, interleaved pairs,
a part of the features, scaled frequencies), and everything else stays arithmetic on positions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.export.decoder.operator import cached_attention, positions, rotated

__all__ = ["rotate_in_attention"]

_AT_A_TIME = 4096  # positions; all heads of a layer are run on them
_MOVES = frozenset((
    "add", "alias", "cat", "chunk", "clone", "contiguous", "expand", "flatten", "getitem", "mul", "neg", "reshape", "select",
    "slice", "split", "split_with_sizes", "squeeze", "stack", "sub", "to", "_to_copy", "unbind", "unsqueeze", "view",
))  # fmt: skip


@dataclass(frozen=True)
class _Rotation:
    """A value, what it was before its rotation, and the tables [positions, pairs]."""

    source: fx.Node
    cosines: Tensor
    sines: Tensor
    interleaved: bool

    def fits(self, form: Callable[[int, int], bool]) -> bool:
        return form(self.cosines.shape[1], self.source.meta["val"].shape[3])

    def same(self, other: _Rotation) -> bool:
        equal = self.cosines.shape == other.cosines.shape and self.interleaved == other.interleaved
        return equal and torch.equal(self.cosines, other.cosines) and torch.equal(self.sines, other.sines)


def rotate_in_attention(gm: fx.GraphModule, rows: int, fits: Callable[[int, int], bool] = lambda pairs, width: True) -> int:
    """Let attention rotate its queries and keys itself, by tables of `rows` positions; the number of layers that now do.

    Layers whose queries and keys are not rotated, or in a way that is no rotation by relative positions, stay as they are; so
    do those whose number of pairs and width of a head do not fit the form of attention.
    """
    kept: list[tuple[_Rotation, fx.Node, fx.Node]] = []
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is not cached_attention._opoverload or node.args[6] is not None:
            continue
        query, key = (_rotation(gm, value, rows) for value in node.args[:2])
        if query is None or key is None or not query.same(key) or not _relative(query) or not query.fits(fits):
            continue
        tables = next(((c, s) for known, c, s in kept if known.same(query)), None)
        if tables is None:
            tables = _tables(gm, query, len(kept))
            kept.append((query, *tables))
        node.args = (query.source, key.source, *node.args[2:6], *tables, *node.args[8:11], query.interleaved, *node.args[12:])
        count += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return count


def _tables(gm: fx.GraphModule, rotation: _Rotation, number: int) -> tuple[fx.Node, fx.Node]:
    first = next(iter(gm.graph.nodes))
    nodes = []
    for name, table in (("cosines", rotation.cosines), ("sines", rotation.sines)):
        gm.register_buffer(f"{name}_{number}", table)
        with gm.graph.inserting_before(first):
            nodes.append(gm.graph.get_attr(f"{name}_{number}"))
        nodes[-1].meta["val"] = table
    return nodes[0], nodes[1]


def _rotation(gm: fx.GraphModule, value: Any, rows: int) -> _Rotation | None:
    """How `value` [batch, heads, new, width] is rotated; None if it is not."""
    source = _source(value)
    if source is None:
        return None
    _, heads, _, width = source.meta["val"].shape
    if not isinstance(heads, int) or not isinstance(width, int) or width % 2:
        return None
    run = _Run(gm, source, value)
    dtype = source.meta["val"].dtype
    whole = run(torch.ones(1, heads, min(rows, _AT_A_TIME), width, dtype=dtype))
    turned = (whole[0, 0] != 1).any(0).nonzero()
    if not turned.numel():
        return None
    pairs = int(turned.max()) // 2 + 1
    random = torch.randn(1, heads, min(rows, 64), width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = run(random)
    for interleaved in (False, True):
        cosines, sines = _read(run, (heads, width), pairs, interleaved, rows, dtype)
        first = slice(0, random.shape[2])
        if torch.allclose(rotated(random, cosines[first], sines[first], interleaved), expected, rtol=1e-5, atol=1e-5):
            return _Rotation(source, cosines, sines, interleaved)
    return None


def _read(run: _Run, sizes: tuple[int, int], pairs: int, interleaved: bool, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions: what becomes of pairs (1, 0)."""
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    parts = []
    for start in range(0, rows, _AT_A_TIME):
        x = torch.zeros(1, sizes[0], min(rows - start, _AT_A_TIME), sizes[1], dtype=dtype)
        x[..., first] = 1
        parts.append(run(x, start)[0, 0])
    y = torch.cat(parts)
    return y[:, first].contiguous(), y[:, second].contiguous()


def _relative(rotation: _Rotation) -> bool:
    """Position p + d is position p turned on by what d is: then a row may start anywhere."""
    at = torch.complex(rotation.cosines.double(), rotation.sines.double())
    if len(at) < 2:
        return False
    step = at[1] / at[0]
    places = torch.arange(0, len(at), max(1, len(at) // 64))
    wanted = at[0] * torch.polar(torch.ones_like(step.real), step.angle()) ** places[:, None]
    return bool(torch.allclose(at[places], wanted, atol=1e-2 * float(at[0].abs().max()), rtol=0))


def _source(value: Any) -> fx.Node | None:
    """What `value` [batch, heads, new, width] is made of, besides positions and constants: the first value of its shape."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor) or value.meta["val"].ndim != 4:
        return None
    between, sources = _behind(value, None)
    nodes: list[fx.Node] = [n for n in value.graph.nodes if n in between or n in sources]
    for node in nodes:
        if node is not value and _alike(node, value) and not _behind(value, node)[1]:
            return node
    return None


def _behind(value: fx.Node, stop: fx.Node | None) -> tuple[set[fx.Node], set[fx.Node]]:
    """The moves and sums that `value` is made by, down to `stop`, and the other values that go into them."""
    between: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node is stop or node in between or node in sources or _of_positions(node):
            continue
        if node.op == "call_function" and _kind(node) in _MOVES:
            between.add(node)
            todo += [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, tuple, list))]
        else:
            sources.add(node)
    return between, sources


def _alike(node: fx.Node, value: fx.Node) -> bool:
    a, b = node.meta.get("val"), value.meta["val"]
    return isinstance(a, Tensor) and a.ndim == 4 and a.dtype == b.dtype and (a.shape[1], a.shape[3]) == (b.shape[1], b.shape[3])


def _kind(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""


def _of_positions(node: fx.Node) -> bool:
    """Made of the positions, sizes and constants alone."""
    todo, seen = [node], set()
    while todo:
        n = todo.pop()
        if n in seen or n.op == "get_attr" or n.target is positions._opoverload:
            continue
        if not isinstance(n.meta.get("val"), (Tensor, tuple, list)):
            continue
        if n.op != "call_function":
            return False
        seen.add(n)
        todo += n.all_input_nodes
    return True


class _Run:
    """What a graph makes of a value at consecutive positions."""

    def __init__(self, gm: fx.GraphModule, source: fx.Node, value: fx.Node) -> None:
        self.gm, self.source, self.value = gm, source, value
        needed, todo = set(), [value]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                todo += [] if node is source or node.target is positions._opoverload else node.all_input_nodes
        self.order = [n for n in gm.graph.nodes if n in needed]

    def __call__(self, x: Tensor, start: int = 0) -> Tensor:
        """`x` [1, heads, positions, width] in the place of the source; the first position is `start`."""
        known: dict[fx.Node, Any] = {}
        for node in self.order:
            known[node] = self._value(node, x, start, known)
        out: Tensor = known[self.value]
        return out

    def _value(self, node: fx.Node, x: Tensor, start: int, known: dict[fx.Node, Any]) -> Any:
        if node is self.source:
            return x
        if node.op == "get_attr":
            held: Any = self.gm
            for part in str(node.target).split("."):
                held = getattr(held, part)
            return held.detach() if isinstance(held, Tensor) else held
        if node.target is positions._opoverload:
            return torch.arange(start, start + x.shape[2])[None]
        if node.op == "placeholder":  # asked for its sizes alone
            return torch.empty(1, x.shape[2], 0, 1, device="meta") if node.meta["val"].ndim == 4 else torch.empty(1, x.shape[2])
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
