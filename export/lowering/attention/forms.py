"""Forms of attention, each an operator of its runtime in the place of a site that it expresses exactly.

A site that a form refuses gets the next plainer one; the plainest is `scaled_dot_product_attention` itself, which a writer takes
apart. What a form needs of its operands (heads side by side, one projection for all three) is read off the graph, and the copies
around it go away.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import fx

from normfuse.export.lowering.attention.operators import kernel, multi_head, projected, standard
from normfuse.export.lowering.attention.site import Site, site_of
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import CHECKS
from normfuse.ir.passes import Change, Pass, Rewriting
from normfuse.ir.views import Identity, Permute, Reshape
from normfuse.passes.attention.heads import Heads, heads, sizes_of
from normfuse.passes.attention.projections import Projection, projection

__all__ = ["PLAIN", "AttentionForms", "KernelAttention", "fallbacks", "forms_in", "widest"]

aten = torch.ops.aten
_HEADS_LAST = (0, 2, 1, 3)  # (B, H, L, D) <-> (B, L, H, D)
PLAIN = "decomposed"

# Up to 1.20 ONNX Runtime refuses a mask that broadcasts over heads, or takes wrong numbers from it without a word; 1.21 came with
# this opset, which older ones do not read.
_BIAS_OPSET = 22
_BIAS_RUNTIME = "1.21"


class AttentionForms(Pass):
    """Every attention in one form, or in a plainer one.

    Args:
        form: the one that is wanted, a name of `normfuse.export.targets.AttentionForm`.
        opset: of the file.
    """

    name = "attention"
    leaves_affines = False

    def __init__(self, form: str, opset: int) -> None:
        self.form, self.opset = form, opset

    def rewrite(self, work: Rewriting) -> None:
        for node in work.graph:
            site = site_of(node)
            if site is None or node.target is not aten.scaled_dot_product_attention.default:
                continue
            for name in fallbacks(self.form):
                if work.attempt(name, node, partial(_RULES[name], work.graph, site, self.opset)):
                    break


class KernelAttention(Pass):
    """Attention that is an operator of normfuse already reads q, k and v where projections left them."""

    name = "kernel_attention"
    leaves_affines = False

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """attention(q, k, v)  =  kernel(x, y, z), with q, k and v the heads of x, y and z

        Raises:
            Refuse: the kernel does not take it so.
        """
        site = site_of(node)
        if site is None or node.target is aten.scaled_dot_product_attention.default:
            return None
        return _kernel(graph, site)


def fallbacks(form: str) -> tuple[str, ...]:
    """The form and the plainer ones, in the order in which they are tried, without the plainest, which refuses nothing."""
    return () if form == PLAIN else (form, "mha") if form in ("qkv", "native") else (form,)


def forms_in(nodes: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """Every attention, and its form."""
    for node in nodes:
        if node.target in _NAMES:
            yield node, _NAMES[node.target]


def widest(nodes: Sequence[fx.Node]) -> int:
    """Channels of the queries of all heads together, the most of all attentions; 0 where none is known."""
    found = [site for n in nodes if (site := site_of(n)) is not None and site.four]
    return max((site.heads * site.widths[0] for site in found), default=0)


# -- the forms -----------------------------------------------------------------------------------------------------------


def _standard(graph: Graph, site: Site, opset: int) -> Change:
    """The standard op of opset 23; ONNX Runtime has it in float and half."""
    _check_four(site)
    if site.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Refuse("runtimes have the op in float32 and half alone", remedy="export it in float32")
    width, _, out = site.widths
    if width != out:  # TensorRT refuses it
        raise Refuse(f"values are {out} wide and keys {width}, which TensorRT refuses")
    return Change(do=partial(_write_standard, graph, site))


def _write_standard(graph: Graph, site: Site) -> None:
    args = (*site.operands, site.mask, site.scale, site.causal)
    site.node.replace_all_uses_with(graph.call(_call_of(standard), args, site.node, site.node))


def _multi_head(graph: Graph, site: Site, opset: int) -> Change:
    """MultiHeadAttention of ONNX Runtime: takes (B, L, H·D), so the transposes on both sides go away."""
    _check_contrib(site, opset)
    return Change(do=partial(_write_multi_head, graph, site))


def _write_multi_head(graph: Graph, site: Site) -> None:
    operands = [_heads_last(graph, x) for x in site.operands]
    _finish(graph, site, _call_of(multi_head), (*operands, site.mask, site.scale, site.causal, site.heads))


def _projected(graph: Graph, site: Site, opset: int) -> Change:
    """Attention of ONNX Runtime: the projection to q, k and v is part of the op, so that it writes heads directly."""
    _check_contrib(site, opset)
    if not site.square:
        raise Refuse("there are not as many keys as queries: they are of two sequences")
    parts = _projections(graph, site)
    if parts is None:
        raise Refuse("queries, keys and values are not columns of linear layers that read one tensor")
    return Change(do=partial(_write_projected, graph, site, parts))


def _write_projected(graph: Graph, site: Site, parts: tuple[_Part, ...]) -> None:
    at = site.node
    weight = Constant.apply(lambda *rows: torch.cat(rows).T, *(p.linear.W[p.columns] for p in parts))
    bias = Constant.apply(lambda *b: torch.cat(b), *(_bias(p) for p in parts))
    w, b = graph.emit(weight, at), graph.emit(bias, at)
    args = (parts[0].linear.x, w, b, site.mask, site.scale, site.causal, site.heads, list(site.widths))
    _finish(graph, site, _call_of(projected), args)


def _kernel(graph: Graph, site: Site, opset: int = 0) -> Change:
    """Attention of normfuse's kernels: reads q, k and v where projections left them, and writes (B, L, H·D)."""
    _check_four(site)
    _check_float32_and_causal(site)
    width, _, out = site.widths
    if out != width:
        raise Refuse(f"values are {out} wide and keys {width}; the kernel has one width")
    kv_heads = site.kv_heads
    if not kv_heads or site.heads % kv_heads or (sizes_of(site.value) or ())[1] != kv_heads:
        raise Refuse(f"{site.heads} heads of queries are no multiple of those of keys and values")
    if not site.one_batch:
        raise Refuse("queries, keys and values have not provably one batch size")
    return Change(do=partial(_write_kernel, graph, site))


def _write_kernel(graph: Graph, site: Site) -> None:
    packed = _side_by_side(graph, site)
    operands = [_heads_last(graph, x) for x in site.operands] if packed is None else [packed, None, None]
    args = (*operands, site.mask, site.scale, site.causal, site.heads, site.kv_heads, site.bits)
    _finish(graph, site, _call_of(kernel), args)


_RULES: dict[str, Callable[[Graph, Site, int], Change]] = {
    "attention23": _standard,
    "mha": _multi_head,
    "qkv": _projected,
    "native": _kernel,
}


def _call_of(definition: object) -> torch._ops.OpOverload:
    found: torch._ops.OpOverload = definition._opoverload  # type: ignore[attr-defined]
    return found


_NAMES: dict[object, str] = {
    aten.scaled_dot_product_attention.default: PLAIN,
    _call_of(standard): "attention23",
    _call_of(multi_head): "mha",
    _call_of(projected): "qkv",
    _call_of(kernel): "native",
}


# -- what they ask for ----------------------------------------------------------------------------------------------------


def _check_four(site: Site) -> None:
    if not site.four:
        raise Refuse("its operands have not four axes with known heads and channels")


def _check_float32_and_causal(site: Site) -> None:
    if site.dtype is not torch.float32:
        raise Refuse("the kernel computes in float32, and the attention does not", remedy="export it in float32")
    if site.causal and not site.square:
        raise Refuse("it is causal, and there are not provably as many keys as queries")
    if site.causal and site.mask is not None:
        raise Refuse("it is causal and has a mask as well")


def _check_contrib(site: Site, opset: int) -> None:
    """What both ops of ONNX Runtime ask for."""
    _check_four(site)
    if not site.one_head_count:
        raise Refuse("keys and values have not the heads and the batch of the queries: they are shared or broadcast")
    _check_float32_and_causal(site)
    if site.mask is not None and opset < _BIAS_OPSET:
        raise Refuse(
            f"it has a mask, which ONNX Runtime takes wrongly before {_BIAS_RUNTIME}", remedy=f"opset {_BIAS_OPSET} or newer"
        )


# -- where operands lie ---------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Queries, keys or values: columns of what a linear layer writes, head by head."""

    linear: Projection
    columns: torch.Tensor


def _projections(graph: Graph, site: Site) -> tuple[_Part, ...] | None:
    """The linears that q, k and v are views of, when all three read one tensor."""
    options = [[p for h in heads(graph, x) if (p := _part(graph, h)) is not None] for x in site.operands]
    return next((found for found in itertools.product(*options) if len({p.linear.x for p in found}) == 1), None)


def _part(graph: Graph, found: Heads) -> _Part | None:
    linear = projection(graph, found.root)
    return None if linear is None else _Part(linear, found.columns.flatten())


def _bias(part: _Part) -> Constant:
    if part.linear.b is not None:
        return part.linear.b[part.columns]
    return part.linear.W.holding(torch.zeros(len(part.columns), dtype=torch.float64))


def _side_by_side(graph: Graph, site: Site) -> fx.Node | None:
    """The tensor whose columns are those of q, k and v, one behind the other."""
    for q, k, v in itertools.product(*(list(heads(graph, x)) for x in site.operands)):
        columns = torch.cat([h.columns.flatten() for h in (q, k, v)])
        if q.root is k.root is v.root and torch.equal(columns, torch.arange(q.width)):
            return q.root
    return None


def _heads_last(graph: Graph, node: fx.Node) -> fx.Node:
    """(B, L, H·D) that `node` (B, H, L, D) shows the heads of, or a stretch of its columns; else `node`, to be copied."""
    for found in heads(graph, node):
        if found.stretch == (0, found.width):
            return found.root
        if found.stretch is not None and (part := _split(graph, found, found.stretch[0])) is not None:
            return part
    return node


def _split(graph: Graph, found: Heads, start: int) -> fx.Node | None:
    """The stretch of columns from `start` on as one piece of a split into equal parts; one split serves q, k and v."""
    each = found.columns.numel()
    if found.width % each or start % each:
        return None
    given = ([each] * (found.width // each), 2)
    split = next((u for u in found.root.users if u.target is aten.split_with_sizes.default and u.args[1:] == given), None)
    if split is None:
        before = found.root.next
        while before.op in ("placeholder", "get_attr"):
            before = before.next
        split = graph.call(aten.split_with_sizes.default, (found.root, *given), before, found.root)
    return graph.call(operator.getitem, (split, start // each), split.next, split)


# -- behind an attention --------------------------------------------------------------------------------------------------


def _finish(graph: Graph, site: Site, target: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    """The operator in the place of the site; where all readers put heads side by side, it writes them so."""
    joined = _joined(graph, site.node)
    new = graph.call(target, (*args, joined is None), site.node, site.node)
    if joined is None:
        site.node.replace_all_uses_with(new)
        return
    for reshape in joined:
        if sizes_of(reshape) == sizes_of(new):
            reshape.replace_all_uses_with(new)
        else:
            reshape.replace_input_with(reshape.all_input_nodes[0], new)


def _joined(graph: Graph, node: fx.Node) -> list[fx.Node] | None:
    """The reshapes of (B, L, H, E) that read `node` (B, H, L, E), and nothing else does; in memory these are the rows of
    (B, L, H·E)."""
    found: list[fx.Node] = []
    for permute in _readers(graph, node):
        op = graph.view(permute, 1)
        if not isinstance(op, Permute) or op.dims != _HEADS_LAST:
            return None
        for reshape in _readers(graph, permute):
            if reshape.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints):
                return None
            found.append(reshape)
    sizes = sizes_of(node)
    assert sizes is not None
    joined = (sizes[0], sizes[2], int(sizes[1]) * int(sizes[3]))
    return found if found and all(r.target is not aten.flatten.using_ints or sizes_of(r) == joined for r in found) else None


def _readers(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """Who reads a value; copies, and reshapes to the shape that it has, as Hugging Face models have them, are looked through."""
    found = []
    for user in node.users:
        op = graph.view(user, 1)
        same = isinstance(op, (Identity, Reshape)) and sizes_of(user) == sizes_of(node)
        found += _readers(graph, user) if same else [] if user.target in CHECKS else [user]
    return found
