"""Logits of the newest token alone: the selection moves up in front of the last matrix, and of the norm before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from normfuse.export.decoder.operator import newest

__all__ = ["last_logits"]

_ATEN = torch.ops.aten
_HEADS = (_ATEN.linear.default, _ATEN.matmul.default)
_NORMS = (_ATEN.rms_norm.default, _ATEN.layer_norm.default)
#: One number each of what they read; the rest of their arguments are numbers or constants of one element.
_EACH = (
    _ATEN.mul.Tensor, _ATEN.mul.Scalar, _ATEN.div.Tensor, _ATEN.div.Scalar, _ATEN.tanh.default, _ATEN.to.dtype,
    _ATEN._to_copy.default,
)  # fmt: skip


def last_logits(gm: fx.GraphModule) -> bool:
    """Let the graph of a `CausalModel` return logits [batch, 1, vocabulary]; False where their matrix is not found."""
    node = gm.graph.output_node().args[0][0]  # type: ignore[index]
    while isinstance(node, fx.Node) and node.target in _EACH and _alone(node):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _HEADS or not _alone(node):
        return False
    reader, hidden = node, node.args[0]
    if isinstance(hidden, fx.Node) and hidden.target in _NORMS and len(hidden.users) == 1 and len(hidden.args[1]) == 1:  # type: ignore[arg-type]
        reader, hidden = hidden, hidden.args[0]
    mask = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "attention_mask")
    with gm.graph.inserting_before(reader):
        chosen = gm.graph.call_function(newest._opoverload, (hidden, mask))
    value: Any = hidden.meta["val"]  # type: ignore[union-attr]
    chosen.meta = dict(reader.meta) | {"val": value[:, :1]}
    reader.args = (chosen, *reader.args[1:])
    gm.recompile()
    return True


def _alone(node: fx.Node) -> bool:
    """Read once, and its other arguments are no values of tokens."""
    others = [a for a in node.args[1:] if isinstance(a, fx.Node) and a.op != "get_attr"]
    return len(node.users) == 1 and not others and isinstance(node.meta.get("val"), Tensor)
