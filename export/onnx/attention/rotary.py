"""Rotary embeddings that torch's exporter leaves with a batch of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from normfuse.export.onnx.build import Build, Shared, dims, given, same_size

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["full_rotary_tables"]


def full_rotary_tables(model: ir.Model) -> int:
    """Repeat the tables of cosines and sines over the batch; returns the number of RotaryEmbedding nodes.

    The exporter merges the rotation of a Hugging Face model into RotaryEmbedding-23 and passes tables (1, S, D/2), where
    the standard wants (B, S, D/2) and ONNX Runtime refuses anything else.
    """
    shared: Shared = {}
    found = 0
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue  # with position ids the tables have no batch
        at = Build(model, node, shared)
        x = given(node)
        batch = dims(x)
        for i in (1, 2):
            table = given(node, i)
            have = dims(table)
            if have is not None and batch is not None and same_size(have[0], batch[0]):
                continue
            source = _same_table(table, shared)
            key = ("rotary", id(source), batch and batch[0])
            if batch is None or batch[0] is None or key not in shared:
                ones = at.const(np.array([1, 1], np.int64))
                shape = at.op("Concat", at.op("Shape", x, start=0, end=1), ones, axis=0)
                shared[key] = at.op("Expand", source, shape, dtype=x.dtype)
            node.replace_input_with(i, shared[key])
        found += 1
    return found


def _same_table(table: ir.Value, shared: Shared) -> ir.Value:
    """The first of equal tables: each rotation has a Cos and a Sin of its own over one angle."""
    node = table.producer()
    if node is None or node.op_type not in ("Cos", "Sin") or node.domain:
        return table
    first: ir.Value = shared.setdefault(("table", node.op_type, id(node.inputs[0])), table)
    return first
