"""How the attention to an encoder's states is written, and what is computed in the first step only.

It is the last thing that becomes of a graph. Where keys and values come from the states or from an earlier step, both are a
branch: what makes them of the states is moved into one, so that later steps neither run it nor copy what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from normfuse.export.decoder.forms import heads_joined, heads_parted
from normfuse.export.onnx.build import Build, dims
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN

__all__ = ["lower_cross"]

_CROSS = "cross_attention"
_HIDDEN = -1e9


def lower_cross(model: Any, form: str) -> int:
    """Write every attention to an encoder's states in a finished graph: `gqa` (ops of ONNX Runtime) or `portable`; their number."""
    nodes = [n for n in model.graph if n.domain == MARKER_DOMAIN and n.op_type == _CROSS]
    shared: dict[Any, Any] = {}
    for number, node in enumerate(nodes):
        _write(Build(model, node, shared), node, form, number)
        model.graph.remove(node, safe=True)
    if nodes and form == "gqa":
        model.opset_imports["com.microsoft"] = 1
    return len(nodes)


def _write(at: Build, node: Any, form: str, number: int) -> None:
    query, key, value, past_key, past_value, use_past, mask = (*node.inputs, None, None, None, None)[:7]
    attend = _Attention(at, query, node.inputs[-1] if mask is not None else None, node.attributes["scale"].value, form)
    fresh = attend(key, value)
    if use_past is None:
        made = [fresh, key, value]
    else:
        empty = [
            at.op("Slice", p, *(at.const(np.array([i], np.int64)) for i in (0, 0, 2)), dtype=p.dtype)
            for p in (past_key, past_value)
        ]
        taken = _branch(at, [attend(past_key, past_value), *empty], f"cross_{number}_taken")
        # what the keys and values are made by goes along
        first = _branch(at, [fresh, key, value], f"cross_{number}_first")
        choice = at.ir.node("If", [use_past], {"then_branch": taken, "else_branch": first}, num_outputs=3)
        choice.name = f"cross_{number}"
        names = (f"cross_{number}_attended", *(kept.name for kept in node.outputs[1:]))  # outputs of the graph keep theirs
        for output, like, name in zip(choice.outputs, (fresh, *node.outputs[1:]), names, strict=True):
            output.name, output.dtype, output.shape = name, query.dtype, like.shape
        at.graph.insert_before(node, [choice])
        made = list(choice.outputs)
    made[0] = heads_parted(at, node.outputs[0], made[0], attend.heads * attend.width)
    for old, new in zip(node.outputs, made, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)


class _Attention:
    """[batch, new, heads x width]: one query with several keys and values."""

    def __init__(self, at: Build, query: Any, mask: Any, scale: float, form: str) -> None:
        sizes = dims(query)
        assert sizes is not None
        self.at, self.mask, self.scale, self.form = at, mask, scale, form
        self.heads, self.width = int(sizes[1] or 0), int(sizes[3] or 0)
        self.dtype = query.dtype
        self.query = heads_joined(at, query, self.heads * self.width) if form == "gqa" else self._scaled(query)

    def _scaled(self, query: Any) -> Any:
        return self.at.op("Mul", query, self.at.const(np.asarray(self.scale, self.dtype.numpy())), dtype=self.dtype)

    def __call__(self, key: Any, value: Any) -> Any:
        return self._in_one(key, value) if self.form == "gqa" else self._apart(key, value)

    def _in_one(self, key: Any, value: Any) -> Any:
        facts: dict[str, Any] = {"num_heads": self.heads, "scale": float(self.scale), "mask_filter_value": _HIDDEN}
        valid = () if self.mask is None else (None, self._valid())
        return self.at.op("MultiHeadAttention", self.query, key, value, *valid, domain="com.microsoft", dtype=self.dtype, **facts)

    def _valid(self) -> Any:
        kind = self.at.ir.DataType.INT32
        key = ("valid", self.mask)
        if key not in self.at.shared:
            self.at.shared[key] = self.at.op("Cast", self.mask, to=int(kind), dtype=kind)
        return self.at.shared[key]

    def _apart(self, key: Any, value: Any) -> Any:
        op, dtype = self.at.op, self.dtype
        scores = op("MatMul", self.query, op("Transpose", key, perm=[0, 1, 3, 2], dtype=dtype), dtype=dtype)
        if self.mask is not None:
            scores = op("Add", scores, self._hides(), dtype=dtype)
        attended = op("MatMul", op("Softmax", scores, axis=-1, dtype=dtype), value, dtype=dtype)
        by_token = op("Transpose", attended, perm=[0, 2, 1, 3], dtype=dtype)
        return op("Reshape", by_token, self.at.const(np.array([0, 0, self.heads * self.width], np.int64)), dtype=dtype)

    def _hides(self) -> Any:
        """[batch, 1, 1, source]: added to scores."""
        op, const = self.at.op, self.at.const
        key = ("hides", self.mask)
        if key not in self.at.shared:
            low, none = (const(np.asarray(v, self.dtype.numpy())) for v in (_HIDDEN, 0.0))
            hidden = op("Equal", self.mask, const(np.asarray(0, np.int64)))
            found = op("Where", hidden, low, none, dtype=self.dtype)
            self.at.shared[key] = op("Unsqueeze", found, const(np.array([1, 2], np.int64)), dtype=self.dtype)
        return self.at.shared[key]


def _branch(at: Build, outputs: Sequence[Any], name: str) -> Any:
    """A graph of `outputs` and of all nodes that nothing else needs, which leave the graph that they were in."""
    inside: set[Any] = set()
    for node in reversed(at.graph):
        users = {user for value in node.outputs for user, _ in value.uses()}
        asked = any(value in outputs for value in node.outputs)
        if users <= inside | {at.before} and (asked or users - {at.before}) and not any(v.is_graph_output() for v in node.outputs):
            inside.add(node)
    nodes = [node for node in at.graph if node in inside]
    at.graph.remove(nodes)
    for i, node in enumerate(nodes):
        node.name = f"{name}_{i}"
        for j, value in enumerate(node.outputs):
            value.name = f"{name}_{i}_{j}"
    return at.ir.Graph([], list(outputs), nodes=nodes, name=name)
