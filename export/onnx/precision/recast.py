"""A captured graph in other floating dtypes: weights, inputs, and every dtype that the graph asks for.

A runtime without kernels for a dtype cannot be given a graph in it. Values then get another one, and the model computes the same
function, with other roundings.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from normfuse.errors import ExportError
from normfuse.export.onnx.experts import GROUPED, fallback
from normfuse.export.onnx.precision.spelling import TORCH
from normfuse.export.targets import Target
from normfuse.ir.dtypes import default_eps
from normfuse.ir.guards import CheckedCodeGen

__all__ = ["Changes", "changes_for", "computes_in", "in_other_dtypes", "is_quantized_graph", "recast"]

aten = torch.ops.aten

Changes = Mapping[torch.dtype, torch.dtype]
"""What becomes of a dtype."""

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PRODUCTS = {
    aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
    aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.scaled_dot_product_attention,
}  # fmt: skip


def is_quantized_graph(gm: fx.GraphModule) -> bool:
    """It has layers in integers."""
    return any(str(getattr(n.target, "_schema", "")).startswith("normfuse::shiftquant") for n in gm.graph.nodes)


def computes_in(gm: fx.GraphModule, inputs: Any) -> torch.dtype:
    """The floating dtype of most products, of most values where there is none, of weights and inputs where no value is known."""
    products, values = Counter[torch.dtype](), Counter[torch.dtype]()
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, Tensor) or val.dtype not in _FLOATS:
            continue
        values[val.dtype] += 1
        if getattr(node.target, "overloadpacket", None) in _PRODUCTS or "shiftquant" in str(node.target):
            products[val.dtype] += 1
    held = Counter(t.dtype for t in [*gm.parameters(), *gm.buffers(), *pytree.tree_leaves(inputs)] if isinstance(t, Tensor))
    for found in (products, values, Counter({d: n for d, n in held.items() if d in _FLOATS})):
        if found:
            return found.most_common(1)[0][0]
    return torch.float32


def changes_for(native: torch.dtype, asked: str | None, target: Target, *, quantized: bool) -> dict[torch.dtype, torch.dtype]:
    """What has to change in a model that computes in `native` so that the file can be in the dtype that is `asked` for.

    float16 and bfloat16 files are made of float32 ones, which have what the conversion looks at (`normfuse.export.onnx.precision`).
    A model that computes in that dtype already stays as its author wrote it. ONNX Runtime has next to no kernels for bfloat16 on
    the CPU, so that nothing there stays in it.

    Args:
        asked: a name of `normfuse.export.onnx.precision.spelling`, or None for the nearest that the target computes in.
        quantized: the model has layers in integers, whose kernels scale in float32.
    """
    everything = {d: torch.float32 for d in _FLOATS if d is not torch.float32}
    lacking = [TORCH[name] for name in target.lacks]
    no_bf16 = {torch.bfloat16: torch.float32} if torch.bfloat16 in lacking else {}
    if asked is not None:
        nearest = TORCH[asked]
    else:
        nearest = torch.float32 if native in lacking or (quantized and target.own_in_float32) else native
    if nearest is native and native not in no_bf16:
        return no_bf16  # what the author keeps apart in a wider dtype stays apart
    if nearest is torch.float64:
        return {d: torch.float64 for d in _FLOATS if d is not torch.float64}
    if native is torch.float32:
        return no_bf16
    if native in _HALF:  # float64 within a half model is there for a reason
        return dict.fromkeys(_HALF, torch.float32)
    return everything


def in_other_dtypes(values: Any, changes: Changes) -> Any:
    """The same nested values, tensors of a dtype in `changes` converted."""
    return pytree.tree_map(lambda v: v.to(changes[v.dtype]) if isinstance(v, Tensor) and v.dtype in changes else v, values)


def recast(gm: fx.GraphModule, changes: Changes) -> fx.GraphModule:
    """A copy of a captured graph in which the dtypes are those of `changes`; weights that do not change are shared.

    Raises:
        ExportError: an operator reads the bits of its input, which other dtypes do not have.
    """
    return _recast(gm, changes, {})


def _recast(gm: fx.GraphModule, changes: Changes, done: dict[int, Any]) -> fx.GraphModule:
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    graph = new.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":  # asks for the dtypes of before
            graph.erase_node(node)
        elif node.op == "get_attr":
            _replace(new, str(node.target), changes, done)
        elif node.op == "call_function":
            if node.target is aten.view.dtype:
                raise ExportError(
                    f"{node.name} reads the bits of its input ({node.target}): the model has no other dtype than its own"
                )
            _explicit(node, changes)
            _experts(node, changes)
            node.args, node.kwargs = _mapped(node.args, changes), _mapped(node.kwargs, changes)
            _floats_of_integers(node, changes)
    if isinstance(graph._codegen, CheckedCodeGen):
        graph._codegen = fx.graph._PyTreeCodeGen(graph._codegen.pytree_info)
    graph.lint()
    new.recompile()
    return new


def _replace(gm: fx.GraphModule, target: str, changes: Changes, done: dict[int, Any]) -> None:
    """The tensor or the branch called `target`, in place; what is shared stays shared."""
    *path, name = target.split(".")
    owner: Any = gm
    for part in path:
        owner = getattr(owner, part)
    value = getattr(owner, name)
    if id(value) not in done:
        found: Any = value
        if isinstance(value, fx.GraphModule):
            found = _recast(value, changes, done)
        elif isinstance(value, Tensor) and value.dtype in changes:
            found = _converted(value, changes[value.dtype])
            found = nn.Parameter(found, requires_grad=False) if isinstance(value, nn.Parameter) else found
        done[id(value)] = found
        done.setdefault(id(found), found)
    if done[id(value)] is not value:
        setattr(owner, name, done[id(value)])


def _mapped(arguments: Any, changes: Changes) -> Any:
    """Other dtypes; and numbers that stand for "the least there is", as in masks, are the least of the other dtype."""
    narrow = changes.get(torch.float64)

    def change(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return changes.get(value, value)
        if narrow is not None and isinstance(value, float) and math.isfinite(value):
            return max(-torch.finfo(narrow).max, min(torch.finfo(narrow).max, value))
        return value

    return pytree.tree_map(change, arguments, is_leaf=lambda v: isinstance(v, fx.Node))


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    found = value.detach().to(dtype)
    if dtype.itemsize < value.dtype.itemsize:
        limit = torch.finfo(dtype).max
        found = torch.where(found.isinf() & value.isfinite(), found.sign() * limit, found)
    return found


def _explicit(node: fx.Node, changes: Changes) -> None:
    """What follows from the dtype of an operand, or from the default one, becomes a number or a dtype of its own."""
    val = node.meta.get("val")
    if node.target is aten.rms_norm.default and isinstance(val, Tensor):
        x, shape, weight, eps = (*node.args, None, None)[:4]
        given = node.kwargs.get("eps", eps)
        if given is None:
            node.args = (x, shape, node.kwargs.get("weight", weight), default_eps(val.dtype))
            node.kwargs = {}
    schema = getattr(node.target, "_schema", None)
    if schema is None or not isinstance(val, Tensor) or val.dtype not in changes:
        return
    asks = any(a.name == "dtype" and a.kwarg_only for a in schema.arguments)  # arange, zeros, full
    reads = any(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].is_floating_point() for n in node.all_input_nodes)
    if asks and not reads and node.kwargs.get("dtype") is None:
        node.kwargs = {**node.kwargs, "dtype": val.dtype}


def _experts(node: fx.Node, changes: Changes) -> None:
    """On a CPU PyTorch multiplies sorted rows in bfloat16 alone; transformers has an operator for the other dtypes."""
    if node.target is not GROUPED or node.meta["val"].dtype not in changes:
        return
    if fallback() is None:
        raise ExportError(f"{node.name} ({GROUPED}) computes in bfloat16 alone; use another form of experts in the model")
    x, weight, offs = (*node.args, None)[:3]
    node.target = fallback()
    node.args, node.kwargs = (x, weight, node.kwargs.get("offs", offs)), {}


def _floats_of_integers(node: fx.Node, changes: Changes) -> None:
    """7 / 2 is in the default dtype, which nobody asked for."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.dtype not in changes or "dtype" in node.kwargs:
        return
    read = [n.meta.get("val") for n in node.all_input_nodes]
    if not read or any(not isinstance(v, Tensor) or v.is_floating_point() for v in read):
        return
    if any(isinstance(a, torch.dtype) for a in node.args):
        return
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten.to.dtype, (node, changes[val.dtype]))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
