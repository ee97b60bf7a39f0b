"""How the cached attention of an ONNX graph is written: as one op of ONNX Runtime or of ours, or in standard ops.

What all layers share follows from the mask alone and is computed once a graph. `seqlens_k` is the slot of each row's newest
token, `total` the number of slots that the mask speaks of. A row padded on the left gets its padding hidden by a bias; a row
padded on the right is shorter than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from normfuse.errors import UsageError
from normfuse.export.decoder.operator import cached_attention, cross_attention, newest, positions, unpadded
from normfuse.export.onnx.build import Build, dims
from normfuse.export.onnx.own_nodes import native_node
from normfuse.export.onnx.writer.markers import markers_of
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN

__all__ = ["FORMS", "DecoderAttention", "heads_joined", "heads_parted", "lower_cache", "rotates", "translations"]

#: `native`: normfuse's CachedAttention; `gqa`: GroupQueryAttention of ONNX Runtime; `portable`: standard ops.
DecoderAttention = Literal["gqa", "portable", "native"]
FORMS: tuple[str, ...] = get_args(DecoderAttention)
_HIDDEN = -1e9
_LAST = np.iinfo(np.int64).max
_ATTENTION, _POSITIONS, _NEWEST, _UNPADDED = "cached_attention", "positions", "newest", "unpadded"


def translations() -> dict[Any, Any]:
    """For the exporter: each operator becomes one node, which `lower_cache` takes, or `lower_cross`."""
    return markers_of([made._opoverload for made in (cached_attention, cross_attention, newest, positions, unpadded)])


def rotates(form: str, pairs: int, width: int) -> bool:
    """An attention in `form` can rotate `pairs` pairs of each head of `width` features itself."""
    return form != "gqa" or (width % 16 == 0 and pairs % 8 == 0 and 2 * pairs <= width)


@dataclass(frozen=True)
class _Site:
    """A node that stands for the attention of a layer."""

    node: Any

    @property
    def inputs(self) -> dict[str, Any]:
        names = ("query", "key", "value", "past_key", "past_value", "attention_mask", "cosines", "sines", "distances")
        return dict(zip(names, (*self.node.inputs, None, None, None), strict=False))

    def fact(self, name: str) -> Any:
        return self.node.attributes[name].value

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of queries, of keys and values, and the width of one."""
        query, key = dims(self.node.inputs[0]), dims(self.node.inputs[3])
        assert query is not None
        assert key is not None
        return int(query[1] or 0), int(key[1] or 0), int(key[3] or 0)

    def joined(self, at: Build) -> list[Any]:
        """Query, key and value with their heads side by side, [batch, new, heads x width]."""
        heads, kv, width = self.heads
        return [heads_joined(at, self.inputs[n], count * width) for n, count in (("query", heads), ("key", kv), ("value", kv))]


def lower_cache(model: Any, form: str, *, left: bool = True) -> None:
    """Write every cached attention of `model` in `form`.

    Args:
        left: rows may be padded on the left; without, they are taken to be padded on the right or not at all.

    Raises:
        UsageError: there is no such form.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form of a cached attention {form!r}: expected {' or '.join(FORMS)}")
    nodes = [n for n in model.graph if n.domain == MARKER_DOMAIN and n.op_type in (_ATTENTION, _POSITIONS, _NEWEST, _UNPADDED)]
    sites = [n for n in nodes if n.op_type == _ATTENTION]
    if not sites:
        return
    for node in nodes:
        if node.op_type == _UNPADDED:
            _replace(model, node, [_all_valid(model, node)])
    nodes = [n for n in nodes if n.op_type != _UNPADDED]
    shared = _Shared(model, nodes[0], left, _Site(sites[0]).inputs["attention_mask"])
    for node in nodes:
        if node.op_type == _POSITIONS:
            _replace(model, node, [shared.at(node).positions()])
        elif node.op_type == _NEWEST:
            _replace(model, node, [shared.at(node).newest_of(node)])
        elif form == "gqa":
            _group_query(model, _Site(node), shared.at(node))
        elif form == "native":
            _cached(model, _Site(node), shared.at(node))
        else:
            _standard(model, _Site(node), shared.at(node))
    if form == "gqa":
        model.opset_imports["com.microsoft"] = 1


class _Shared:
    """What follows from the mask, each built once, where it is asked for first."""

    def __init__(self, model: Any, first: Any, left: bool, mask: Any) -> None:
        self.model, self.allow_left, self.mask = model, left, mask
        self.ids = next(v for v in model.graph.inputs if v.name == "input_ids")
        self.build = Build(model, first, {})
        self.known: dict[str, Any] = {}

    def at(self, node: Any) -> _Shared:
        self.build = Build(self.model, node, self.build.shared)
        return self

    def _once(self, name: str, make: Any) -> Any:
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]

    def ints(self, *values: int) -> Any:
        return self.build.const(np.array(values, np.int64))

    def new(self) -> Any:
        """[1]: new tokens."""
        return self._once("new", lambda: self.build.op("Shape", self.ids, start=1, end=2, dtype=self.build.ir.DataType.INT64))

    def width(self) -> Any:
        """[1]: slots that the mask speaks of."""
        return self._once("width", lambda: self.build.op("Shape", self.mask, start=1, end=2, dtype=self.build.ir.DataType.INT64))

    def before(self) -> Any:
        """[1]: slots of the mask before the new ones."""
        return self._once("before", lambda: self.build.op("Sub", self.width(), self.new()))

    def left(self) -> Any:
        """[batch, 1]: the row is padded on the left."""
        op, ints = self.build.op, self.ints
        return self._once("left", lambda: op("Equal", op("Slice", self.mask, ints(0), ints(1), ints(1)), ints(0)))

    def newest(self) -> Any:
        """[batch, 1]: slot of the newest token."""
        op, ints = self.build.op, self.ints

        def make() -> Any:
            valid = op("ReduceSum", self.mask, ints(1), keepdims=1)
            valid = op("Where", self.left(), self.width(), valid) if self.allow_left else valid
            return op("Sub", valid, ints(1))

        return self._once("newest", make)

    def newest_of(self, node: Any) -> Any:
        """[batch, 1, width]: features of each row's newest token; a prompt that is padded on the right ends before its row does."""
        op, ints, hidden = self.build.op, self.ints, node.inputs[0]
        at = op("Max", op("Sub", self.newest(), self.before()), ints(0))
        found = op("GatherND", hidden, at, batch_dims=1, dtype=hidden.dtype)
        return op("Unsqueeze", found, ints(1), dtype=hidden.dtype, shape=dims(node.outputs[0]))

    def seqlens(self) -> Any:
        """[batch], int32: slot of the newest token."""
        op, kinds = self.build.op, self.build.ir.DataType
        made = lambda: op("Cast", op("Squeeze", self.newest(), self.ints(1)), to=int(kinds.INT32), dtype=kinds.INT32)  # noqa: E731
        return self._once("seqlens", made)

    def total(self) -> Any:
        """[], int32: slots that the mask speaks of."""
        op, kinds = self.build.op, self.build.ir.DataType
        made = lambda: op("Cast", op("Squeeze", self.width(), self.ints(0)), to=int(kinds.INT32), dtype=kinds.INT32)  # noqa: E731
        return self._once("total", made)

    def added(self, distances: Any, dtype: Any) -> Any:
        """[batch, heads, new, total]: what a table says of the distances of tokens."""
        op, ints = self.build.op, self.ints

        def make() -> Any:
            zero, one = (self.build.const(np.asarray(v, np.int64)) for v in (0, 1))
            at = op("Range", zero, op("Squeeze", self.width(), ints(0)), one)
            back = op("Sub", op("Unsqueeze", self.slots(), ints(2)), at)
            last = int((dims(distances) or (0, 1))[1] or 1) - 1
            found = op("Gather", distances, op("Min", op("Max", back, ints(0)), ints(last)), axis=1, dtype=dtype)
            return op("Transpose", found, perm=[1, 0, 2, 3], dtype=dtype)

        return self._once(f"added {distances.name}", make)

    def bias(self, dtype: Any, distances: Any = None) -> Any:
        """[batch, 1 or heads, new, total]: added to scores, hides padding on the left; None where there is nothing to add."""
        hidden = self.hides(dtype)
        if distances is None or hidden is None:
            return hidden if distances is None else self.added(distances, dtype)
        both = self.added(distances, dtype), hidden
        return self._once(f"bias {distances.name}", lambda: self.build.op("Add", *both, dtype=dtype))

    def hides(self, dtype: Any) -> Any:
        """[batch, 1, new, total]: added to scores, hides padding on the left; None where there is none."""
        if not self.allow_left:
            return None
        op, build = self.build.op, self.build

        def make() -> Any:
            hidden = op("And", self.left(), op("Equal", self.mask, self.ints(0)))
            low, zero = (build.const(np.asarray(v, dtype.numpy())) for v in (_HIDDEN, 0.0))
            values = op("Where", hidden, low, zero, dtype=dtype)
            shape = op("Concat", op("Shape", self.mask, start=0, end=1), self.ints(1), self.new(), self.width(), axis=0)
            return op("Expand", op("Unsqueeze", values, self.ints(1, 2), dtype=dtype), shape, dtype=dtype)

        return self._once("hides", make)

    def positions(self) -> Any:
        """[batch, new]: place of each new token among the valid ones of its row."""
        op, ints = self.build.op, self.ints

        def make() -> Any:
            seen = op("CumSum", self.mask, self.build.const(np.asarray(1, np.int64)))
            newest = op("Slice", seen, op("Neg", self.new()), ints(_LAST), ints(1))
            kind = self.build.ir.DataType.INT64
            return op("Max", op("Sub", newest, ints(1)), ints(0), dtype=kind, shape=dims(self.ids))

        return self._once("positions", make)

    def slots(self) -> Any:
        """[batch, new]: slot of each new token."""
        op, ints = self.build.op, self.ints

        def make() -> Any:
            valid = op("ReduceSum", op("Slice", self.mask, ints(0), self.before(), ints(1)), ints(1), keepdims=1)
            start = op("Where", self.left(), self.before(), valid) if self.allow_left else valid
            zero, one = (self.build.const(np.asarray(v, np.int64)) for v in (0, 1))
            return op("Add", start, op("Range", zero, op("Squeeze", self.new(), ints(0)), one))

        return self._once("slots", make)

    def seen(self, window: int, dtype: Any) -> Any:
        """[batch, 1, new, total]: added to scores; hides what a new token does not see."""
        op, ints = self.build.op, self.ints

        def make() -> Any:
            zero, one = (self.build.const(np.asarray(v, np.int64)) for v in (0, 1))
            at = op("Range", zero, op("Squeeze", self.width(), ints(0)), one)
            slots = op("Unsqueeze", self.slots(), ints(2))
            hidden = op("Greater", at, slots)
            if window:
                hidden = op("Or", hidden, op("LessOrEqual", at, op("Sub", slots, ints(window))))
            if self.allow_left:
                padded = op("And", self.left(), op("Equal", self.mask, ints(0)))
                hidden = op("Or", hidden, op("Unsqueeze", padded, ints(1)))
            low, none = (self.build.const(np.asarray(v, dtype.numpy())) for v in (_HIDDEN, 0.0))
            return op("Unsqueeze", op("Where", hidden, low, none, dtype=dtype), ints(1), dtype=dtype)

        return self._once(f"seen {window}", make)


def _group_query(model: Any, site: _Site, shared: _Shared) -> None:
    at, inputs, (heads, kv, _) = shared.build, site.inputs, site.heads
    query, key, value = site.joined(at)
    given = [query, key, value, inputs["past_key"], inputs["past_value"], shared.seqlens(), shared.total()]
    given += [inputs["cosines"], inputs["sines"], None, shared.bias(query.dtype, inputs["distances"])]
    while given[-1] is None:
        given.pop()
    facts: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv, "scale": float(site.fact("scale"))}
    if inputs["cosines"] is not None:
        facts |= {"do_rotary": 1, "rotary_interleaved": int(site.fact("interleaved"))}
    if site.fact("window"):
        facts["local_window_size"] = int(site.fact("window"))
    if site.fact("softcap"):
        facts["softcap"] = float(site.fact("softcap"))
    node = at.ir.node("GroupQueryAttention", given, facts, domain="com.microsoft", num_outputs=3)
    node.metadata_props.update(site.node.metadata_props)
    model.graph.insert_before(site.node, [node])
    _take_outputs(model, site, at, node.outputs)


def _cached(model: Any, site: _Site, shared: _Shared) -> None:
    at, inputs, parts = shared.build, site.inputs, site.joined(shared.build)
    whole = _cut_out_of(parts)
    if whole is not None:
        parts = [whole] * 3
    given = [*parts, inputs["past_key"], inputs["past_value"], shared.mask, inputs["cosines"], inputs["sines"]]
    facts = {name: site.fact(name) for name in ("scale", "window", "softcap")} | {"interleaved": int(site.fact("interleaved"))}
    made = native_node(at, "CachedAttention", given, facts | {"packed": int(whole is not None)}, count=3)
    _take_outputs(model, site, at, made)


def _cut_out_of(values: Sequence[Any]) -> Any:
    """The value whose last axis is cut into `values`, in this order and into nothing else; None if there is no such value."""
    node = values[0].producer()
    if node is None or node.op_type != "Split" or node.domain or list(node.outputs) != list(values):
        return None
    sizes = dims(node.inputs[0])
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    return node.inputs[0] if sizes is not None and axis in (-1, len(sizes) - 1) else None


def _take_outputs(model: Any, site: _Site, at: Build, outputs: Sequence[Any]) -> None:
    """What was attended, [batch, new, heads x width], and the presents, in the place of the site's outputs."""
    heads, _, width = site.heads
    for made, old in zip(outputs, site.node.outputs, strict=True):
        made.dtype, made.shape = site.inputs["query"].dtype, old.shape
    apart = heads_parted(at, site.node.outputs[0], outputs[0], heads * width)
    _replace(model, site.node, [apart, *outputs[1:]])


def heads_parted(at: Build, old: Any, made: Any, features: int) -> Any:
    """`made` [batch, new, heads x width] in the shape of `old`; what joins the heads again takes it as it is."""
    out = dims(old)
    assert out is not None
    made.shape = at.ir.Shape((*out[:2], features))
    for user, _ in list(old.uses()):
        after = dims(user.outputs[0])
        if user.op_type == "Reshape" and not user.domain and after is not None and len(after) == 3 and after[2] == features:
            user.outputs[0].replace_all_uses_with(made)
    return at.op("Reshape", made, at.const(np.array([0, 0, *out[2:]], np.int64)), dtype=made.dtype, shape=out)


def _all_valid(model: Any, node: Any) -> Any:
    """[batch, past + new] ones, where [1] says how many slots of the past are filled."""
    at = Build(model, node, {})
    length, ids = node.inputs[0], node.inputs[1]
    kinds = at.ir.DataType
    total = at.op("Add", at.op("Cast", length, to=int(kinds.INT64), dtype=kinds.INT64), at.op("Shape", ids, start=1, end=2))
    shape = at.op("Concat", at.op("Shape", ids, start=0, end=1), total, axis=0)
    one = at.ir.tensor(np.ones(1, np.int64))
    return at.op("ConstantOfShape", shape, value=one, dtype=kinds.INT64, shape=dims(node.outputs[0]))


def _standard(model: Any, site: _Site, shared: _Shared) -> None:
    at, inputs, (heads, kv, width) = shared.build, site.inputs, site.heads
    op, dtype, out = at.op, inputs["query"].dtype, site.node.outputs
    query, key = (_turned(shared, site, inputs[name]) for name in ("query", "key"))
    presents = [_written(shared, inputs[past], new) for past, new in (("past_key", key), ("past_value", inputs["value"]))]
    for made, old in zip(presents, out[1:], strict=True):
        made.shape = old.shape
    keys, values = (op("Slice", p, shared.ints(0), shared.width(), shared.ints(2), dtype=dtype) for p in presents)
    rows = op("Reshape", query, shared.ints(0, kv, -1, width), dtype=dtype)  # the heads of a group share keys and values
    scaled = op("Mul", rows, at.const(np.asarray(site.fact("scale"), dtype.numpy())), dtype=dtype)
    scores = op("MatMul", scaled, op("Transpose", keys, perm=[0, 1, 3, 2], dtype=dtype), dtype=dtype)
    if site.fact("softcap"):
        cap = at.const(np.asarray(site.fact("softcap"), dtype.numpy()))
        scores = op("Mul", op("Tanh", op("Div", scores, cap, dtype=dtype), dtype=dtype), cap, dtype=dtype)
    heads_apart = op("Concat", op("Shape", shared.mask, start=0, end=1), shared.ints(heads), shared.new(), shared.width(), axis=0)
    scores = op("Reshape", scores, heads_apart, dtype=dtype)
    if inputs["distances"] is not None:
        scores = op("Add", scores, shared.added(inputs["distances"], dtype), dtype=dtype)
    weights = op("Softmax", op("Add", scores, shared.seen(int(site.fact("window")), dtype), dtype=dtype), axis=-1, dtype=dtype)
    in_groups = op("Concat", op("Shape", shared.mask, start=0, end=1), shared.ints(kv, -1), shared.width(), axis=0)
    attended = op("MatMul", op("Reshape", weights, in_groups, dtype=dtype), values, dtype=dtype)
    by_head = op("Concat", op("Shape", shared.mask, start=0, end=1), shared.ints(heads), shared.new(), shared.ints(width), axis=0)
    y = op("Transpose", op("Reshape", attended, by_head, dtype=dtype), perm=[0, 2, 1, 3], dtype=dtype, shape=dims(out[0]))
    _replace(model, site.node, [y, *presents])


def _turned(shared: _Shared, site: _Site, x: Any) -> Any:
    """Queries or keys rotated at their slots."""
    cosines, sines = site.inputs["cosines"], site.inputs["sines"]
    if cosines is None:
        return x
    op, ints, dtype = shared.build.op, shared.ints, x.dtype
    pairs, width = int((dims(cosines) or (0, 0))[1] or 0), site.heads[2]
    cos, sin = (op("Unsqueeze", op("Gather", t, shared.slots(), dtype=dtype), ints(1), dtype=dtype) for t in (cosines, sines))

    def cut(value: Any, first: int, last: int, step: int = 1) -> Any:
        return op("Slice", value, ints(first), ints(last), ints(3), ints(step), dtype=dtype)

    interleaved = bool(site.fact("interleaved"))
    a, b = (cut(x, 0, 2 * pairs, 2), cut(x, 1, 2 * pairs, 2)) if interleaved else (cut(x, 0, pairs), cut(x, pairs, 2 * pairs))
    first = op("Sub", op("Mul", a, cos, dtype=dtype), op("Mul", b, sin, dtype=dtype), dtype=dtype)
    second = op("Add", op("Mul", a, sin, dtype=dtype), op("Mul", b, cos, dtype=dtype), dtype=dtype)
    if interleaved:
        both = [op("Unsqueeze", part, ints(4), dtype=dtype) for part in (first, second)]
        joined = op("Reshape", op("Concat", *both, axis=4, dtype=dtype), ints(0, 0, 0, 2 * pairs), dtype=dtype)
    else:
        joined = op("Concat", first, second, axis=3, dtype=dtype)
    rest = [] if 2 * pairs == width else [cut(x, 2 * pairs, width)]
    return op("Concat", joined, *rest, axis=3, dtype=dtype) if rest else joined


def _written(shared: _Shared, past: Any, new: Any) -> Any:
    """`past` with room for all slots, and `new` in its slots."""
    op, ints, dtype = shared.build.op, shared.ints, past.dtype
    sizes = dims(past)
    assert sizes is not None
    kv, width = int(sizes[1] or 0), int(sizes[3] or 0)
    room = shared.build.op("Shape", past, start=2, end=3)
    missing = op("Max", op("Sub", shared.width(), room), ints(0))
    shape = op("Concat", op("Shape", past, start=0, end=1), ints(kv), missing, ints(width), axis=0)
    zeros = op("ConstantOfShape", shape, value=shared.build.ir.tensor(np.zeros(1, dtype.numpy())), dtype=dtype)
    whole = op("Concat", past, zeros, axis=2, dtype=dtype)
    index = op("Expand", op("Unsqueeze", shared.slots(), ints(1, 3)), op("Shape", new))
    return op("ScatterElements", whole, index, new, axis=2, dtype=dtype)


def heads_joined(at: Build, value: Any, width: int) -> Any:
    """[batch, heads, new, width] as [batch, new, heads x width]; a projection that was taken apart is taken whole."""
    node = value.producer()
    sizes = dims(value)
    assert sizes is not None
    if node is not None and node.op_type == "Transpose" and not node.domain and list(node.attributes["perm"].value) == [0, 2, 1, 3]:
        apart = node.inputs[0]
        before = apart.producer()
        if before is not None and before.op_type == "Reshape" and not before.domain:
            whole = dims(before.inputs[0])
            if whole is not None and len(whole) == 3 and whole[2] == width:
                return before.inputs[0]
    else:
        apart = at.op("Transpose", value, perm=[0, 2, 1, 3], dtype=value.dtype)
    shape = at.const(np.array([0, 0, width], np.int64))
    return at.op("Reshape", apart, shape, dtype=value.dtype, shape=(sizes[0], sizes[2], width))


def _replace(model: Any, node: Any, values: list[Any]) -> None:
    for old, value in zip(node.outputs, values, strict=True):
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
