"""The module that `optimize` returns: a GraphModule that checks its calls, and keeps its report and guards when it is copied."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from normfuse.ir.guards import attach_guards

__all__ = ["OptimizedGraph"]

_KEPT = "normfuse"  # what our entries of meta begin with


class OptimizedGraph(fx.GraphModule):
    """A GraphModule whose guards are a forward pre-hook; torch drops such hooks, and `meta`, when it copies or pickles a graph."""

    @classmethod
    def of(cls, root: nn.Module, graph: fx.Graph, name: str, meta: dict[str, Any]) -> OptimizedGraph:
        """`graph` over the tensors and modules of `root`, with the guards that `meta` holds."""
        made = cls(root, graph, name)
        made.meta.update(meta)
        attach_guards(made)
        return made

    def __copy__(self) -> OptimizedGraph:
        return _like(self, fx.GraphModule.__copy__(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedGraph:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, OptimizedGraph)
        attach_guards(copied)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        function, arguments = super().__reduce__()
        return _restored, (function, arguments, {k: v for k, v in self.meta.items() if k.startswith(_KEPT)})


def _like(old: OptimizedGraph, new: fx.GraphModule) -> OptimizedGraph:
    made = OptimizedGraph.of(new, new.graph, type(old).__name__, dict(old.meta))
    made.training = old.training
    return made


def _restored(function: Any, arguments: tuple[Any, ...], meta: dict[str, Any]) -> OptimizedGraph:
    gm = function(*arguments)
    made = OptimizedGraph.of(gm, gm.graph, type(gm).__name__, {**gm.meta, **meta})
    made.training = arguments[0].get("training", False)
    return made
