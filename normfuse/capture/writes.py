"""In-place calls of an exported graph become out-of-place where nobody can tell.

    h = linear(x); z = einsum("ab->ab", h); z.relu_(); return h + z

Here z is h under another name, and no schema says so. So the graph is run once on fake tensors: two values are one storage or they
are not. A write becomes its functional twin if nothing that shares its storage is read afterwards; else the whole graph is
functionalised by torch, which believes the schemas, so that operators like einsum are taken apart there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from normfuse.capture.in_place import makes_storage, out_of_place
from normfuse.errors import CaptureError
from normfuse.ir.fakes import on_fakes

__all__ = ["is_write", "secret_views", "without_writes", "writes"]

log = logging.getLogger(__name__)

aten = torch.ops.aten


def is_write(node: fx.Node) -> bool:
    """Does the call write to one of its arguments? batch_norm says so, and does not in eval mode."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target is not aten.batch_norm.default


def writes(gm: fx.GraphModule) -> bool:
    """Does any call of the graph write to one of its arguments?"""
    return any(is_write(n) for n in gm.graph.nodes)


def without_writes(gm: fx.GraphModule) -> bool:
    """Replace every f_(x) by f(x), in place; False, and nothing is changed, if for one of them somebody could tell."""
    try:
        values = _values(gm)
    except Exception as e:  # sizes that depend on data, operators without a fake form
        log.debug("storages are unknown: %s", e)
        return False
    twins: dict[fx.Node, Any] = {}
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    outside = {s for n in gm.graph.nodes if n.op in ("placeholder", "get_attr") for s in _storages(values.get(n))}
    for node in filter(is_write, gm.graph.nodes):
        twin, x = out_of_place(node), node.args[0] if node.args else None
        if twin is None or not isinstance(x, fx.Node):
            return False
        mine = _storages(values[x])
        if mine & outside or not _same_kind(twin, node, values):
            return False
        # an earlier write that became functional has left this storage: what was made from it counts as what it is
        named = [n for n in gm.graph.nodes if order[n] < order[node] and mine & _storages(values.get(n))]
        if any(order[user] > order[node] for n in named for user in n.users):
            return False
        twins[node] = twin
    for node, twin in twins.items():
        node.target = twin
    return True


def secret_views(gm: fx.GraphModule) -> dict[Any, Callable[..., Any]]:
    """A decomposition for each operator of the graph whose result may share storage with an argument although its schema denies it.

    Raises:
        CaptureError: such an operator has none: it is no composite of PyTorch.
    """
    try:
        values = _values(gm)
    except Exception as e:
        log.debug("storages are unknown: %s", e)
        values = None
    table: dict[Any, Callable[..., Any]] = {}
    known = torch.export.default_decompositions()
    for node in gm.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or any(r.alias_info is not None for r in target._schema.returns):
            continue
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
        if values is None:
            shares = composite and not makes_storage(node)
        else:
            shares = any(_storages(values[node]) & _storages(values.get(n)) for n in node.all_input_nodes)
        if shares and not composite:
            raise CaptureError(
                f"{target} returns a view of its input, which its schema denies, and the model writes in place: clone it"
            )
        if shares and target in known:  # the others are taken apart anyway
            table[target] = known[target]
    return table


def _values(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """A fake value for every node, made anew: those that an exported graph carries need not share what the real ones share."""
    found: dict[fx.Node, Any] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    mode: Any = torch._guards.detect_fake_mode([n.meta["val"] for n in placeholders if isinstance(n.meta.get("val"), Tensor)])
    if mode is None:
        raise ValueError("no input is a tensor")

    class Shared(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

        def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().get_attr(target, args, kwargs)
            return mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    with on_fakes(mode):
        inputs = [v.clone() if isinstance(v := n.meta.get("val"), Tensor) else v for n in placeholders]
        Shared(gm, garbage_collect_values=False).run(*inputs, enable_io_processing=False)
    return found


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.layout is torch.strided}


def _same_kind(twin: Any, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Half plus float is float, and half in place; one element times many is many, and an error in place."""
    x = values[node.args[0]]  # type: ignore[index]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    mode: Any = torch._guards.detect_fake_mode([x])
    with on_fakes(mode):
        made = twin(*args, **kwargs)
    return isinstance(made, Tensor) and made.dtype == x.dtype and made.shape == x.shape
