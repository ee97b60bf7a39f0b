"""Tables, of which rows are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from normfuse.ir.views import Embedding as EmbeddingView
from normfuse.ir.views import Op
from normfuse.passes.quantize.layers.layer import Handler, Layer, read_node

__all__ = ["EMBEDDING", "Embedding"]


@dataclass(frozen=True, eq=False)
class Embedding(Layer):
    """y = W[x]."""

    kind = "embedding"


def _embedding(node: fx.Node, op: Op, path: str, spec: Any) -> Embedding:
    assert isinstance(op, EmbeddingView)
    return Embedding(node, path, spec, op.W, None, read_node(op.x), tail=node)


EMBEDDING = Handler(Embedding.kind, _embedding)
