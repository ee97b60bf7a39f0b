"""In-place calls made out-of-place where nobody can tell.

    y = conv(x); y.add_(z); f(y)   ->   y = conv(x); y' = add(y, z); f(y')

Condition: y is storage that one op has just made, or the only view of it, and no other view of it is alive. What writes through
another view, into an input, a parameter or a buffer, stays in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

__all__ = ["functionalise", "makes_storage", "out_of_place"]

aten = torch.ops.aten

# composite in ATen, so that their schema does not say whether the result is new storage; these always make some
_FRESH_COMPOSITES = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm"),
    *("layer_norm", "group_norm", "instance_norm", "rms_norm", "softmax", "log_softmax", "matmul", "max_pool1d", "max_pool2d"),
    *(
        "max_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
    ),
    *("relu6", "selu", "scaled_dot_product_attention", "clone"),
}
# results that may share storage with the first argument, and with nothing else
_VIEWS = {
    *("slice", "select", "view", "reshape", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "contiguous"),
    *("dropout", "alias"),
}
# ops that read a tensor and keep nothing of it
_READS_ONLY = {"sym_size", "sym_numel"}


def functionalise(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Replace every in-place call for which it is provably the same; later readers of the old value read the new one."""
    one_dtype = _one_dtype(graph, root)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        twin = out_of_place(node)
        if twin is None or not _unseen(node, order) or not (one_dtype or _keeps_dtype(node)):
            continue
        old = node.args[0]
        node.target = twin
        assert isinstance(old, fx.Node)
        later = [user for user in old.users if order[user] > order[node]]
        for user in later:
            user.replace_input_with(old, node)
        node.name = graph._graph_namespace.create_name(node.name.replace("_", "") or node.name, node)
    return graph


def out_of_place(node: fx.Node) -> Any:
    """The overload of the same name without the underscore; None for a call that does not write to its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    schema = node.target._schema
    name = schema.name.removeprefix("aten::")
    if not (name.endswith("_") and not name.endswith("__")) or not schema.is_mutable:
        return None
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments[1:]):
        return None
    twin = getattr(getattr(aten, name[:-1], None), node.target._overloadname, None)
    same = twin is not None and [str(a.type) for a in twin._schema.arguments] == [str(a.type) for a in schema.arguments]
    return twin if same else None


def _unseen(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Is the written value new storage that only later calls, and earlier ones that are done with it, read?"""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    earlier = [user for user in written.users if order[user] < order[node]]
    return _owns_storage(written) and all(makes_storage(user) or _name(user) in _READS_ONLY for user in earlier)


def _owns_storage(node: Any) -> bool:
    """Does nothing but this value refer to its storage? So it is for new storage, and for a view of it that is its only use."""
    while _name(node) in _VIEWS and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1:
        node = node.args[0]
    return makes_storage(node)


def _name(node: Any) -> str:
    is_aten = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    return str(node.target._schema.name).removeprefix("aten::") if is_aten else ""


def makes_storage(node: Any) -> bool:
    """Does the call return tensors that share nothing with its arguments?"""
    name = _name(node)
    if not name or not str(node.target._schema.name).startswith("aten::"):
        return False
    schema = node.target._schema
    if any(r.alias_info is not None for r in schema.returns) or schema.is_mutable:
        return False
    if name in _FRESH_COMPOSITES:
        return True
    return not torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")


def _one_dtype(graph: fx.Graph, root: nn.Module) -> bool:
    """Do all floating-point values share one dtype? Then an addend cannot change the dtype of a sum."""
    dtypes = {t.dtype for t in (*root.parameters(), *root.buffers()) if t.is_floating_point()}
    casts = {"to", "type_as", "_to_copy"}
    return len(dtypes) <= 1 and not any(_name(n) in casts or n.op == "call_method" or n.kwargs.get("dtype") for n in graph.nodes)


def _keeps_dtype(node: fx.Node) -> bool:
    """No second tensor takes part: numbers do not promote a floating-point tensor."""
    return not any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values()))
