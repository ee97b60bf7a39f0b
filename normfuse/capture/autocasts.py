"""The casts that `torch.autocast` makes, written into the graph: after that no region is needed around it.

Which operators are cast, and to what, is nowhere a public table. So each operator runs once under autocast, on tensors without
data, and the casts of its operands are watched; then it runs without autocast on operands that were cast so, and must give the
same dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.ir.fakes import on_fakes
from normfuse.ir.operators import CASTS

__all__ = ["state_casts"]

aten = torch.ops.aten


class _Casts(TorchDispatchMode):
    """Notes which tensors are cast to which dtype, by identity."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is aten._to_copy.default and (kwargs or {}).get("dtype") is not None:
            self.made.setdefault(id(args[0]), (kwargs or {})["dtype"])
        return func(*args, **(kwargs or {}))


def state_casts(gm: fx.GraphModule, device: str, dtype: torch.dtype | None) -> bool:
    """Write the casts of autocast into `gm`, in place; False, and nothing is changed, where one cannot be told.

    Args:
        gm: the graph of the region, with example values.
        device, dtype: of autocast; None for the dtype that torch takes for that device.

    Operators that run graphs of their own are left alone: a region in the region says itself what holds in it.
    """
    found: dict[fx.Node, dict[fx.Node, torch.dtype]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            casts = _casts(node, device, dtype)
            if casts is None:
                return False
            found[node] = casts
    made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node, casts in found.items():
        for x, to in casts.items():
            if (x, to) not in made:
                made[x, to] = _cast(gm.graph, x, to, node)
            node.replace_input_with(x, made[x, to])
    return True


def _casts(node: fx.Node, device: str, dtype: torch.dtype | None) -> dict[fx.Node, torch.dtype] | None:
    """The operands of a call that autocast casts; None where that does not explain its result."""
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if not inputs:
        return {}
    mode = torch._guards.detect_fake_mode([n.meta["val"] for n in inputs])
    if mode is None or any("val" not in n.meta for n in node.all_input_nodes):
        return None
    values = {n: n.meta["val"] for n in node.all_input_nodes}
    with on_fakes(mode), _Casts() as seen, torch.autocast(device, dtype=dtype):
        expected = _run(node, values)
    casts = {n: seen.made[id(n.meta["val"])] for n in inputs if id(n.meta["val"]) in seen.made}
    if node.target in CASTS:
        return {}  # a cast of the model's own
    with on_fakes(mode), torch.autocast(device, enabled=False):
        found = _run(node, values | {n: n.meta["val"].to(to) for n, to in casts.items()})
    return casts if _dtypes(found) == _dtypes(expected) else None


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _dtypes(value: Any) -> list[torch.dtype]:
    return [v.dtype for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


def _cast(graph: fx.Graph, x: fx.Node, to: torch.dtype, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(aten.to.dtype, (x, to))
    node.meta = {k: before.meta[k] for k in ("nn_module_stack", "stack_trace", "source_fn_stack") if k in before.meta}
    node.meta["val"] = x.meta["val"].to(to)  # a fake value stays one
    return node
