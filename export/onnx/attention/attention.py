"""Forms of attention: softmax(scale q kᵀ + mask) v, written in the ops that a runtime has.

Each form is the same function; a site that a form cannot express exactly gets the next plainer one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from normfuse.export.onnx.attention.linear import Linear, linear_of
from normfuse.export.onnx.attention.masks import Bias, bias_of
from normfuse.export.onnx.attention.views import Heads, heads
from normfuse.export.onnx.build import Build, Shared, const_of, dims, given, module_of, same_size, take_over
from normfuse.export.onnx.own_nodes import native_node
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN, SDPA
from normfuse.ir.graph import Refuse
from normfuse.reports.model import Form

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Site", "in_kernel", "lower_attention", "widths"]

log = logging.getLogger(__name__)

_CONTRIB = "com.microsoft"
_HEADS_LAST = (0, 2, 1, 3)  # (B, H, L, D) <-> (B, L, H, D)
# ONNX Runtime hides a future token by adding this instead of -inf; its own default, -10000, does not hide large scores
_HIDDEN = float(np.finfo(np.float32).min) / 2

# Up to 1.20 ONNX Runtime refuses a mask that broadcasts over heads, or takes wrong numbers from it without a word; 1.21 came with
# this opset, which older ones do not read.
_BIAS_OPSET = 22
_BIAS_RUNTIME = "1.21"


@dataclass(frozen=True)
class Site:
    """One attention.

    Attributes:
        node: the marker.
        query, key, value: (B, H, L, D), (B, Hk, S, D), (B, Hk, S, E).
        scale: factor on the scores.
        causal: query i sees keys 0 … i.
        bits: of queries and keys, where the scores are sums of integers; 0: floats.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    causal: bool
    bits: int = 0

    @property
    def square(self) -> bool:
        """As many queries as keys, provably."""
        q, k = dims(self.query), dims(self.key)
        return q is not None and k is not None and same_size(q[-2], k[-2])

    @property
    def four(self) -> bool:
        """All operands have four axes with known heads and channels."""
        sizes = [dims(v) for v in (self.query, self.key, self.value)]
        return all(s is not None and len(s) == 4 and isinstance(s[1], int) and isinstance(s[3], int) for s in sizes)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, channels of a query and of a value, where `four` holds."""
        query, value = dims(self.query), dims(self.value)
        assert query is not None
        assert value is not None
        return int(query[1] or 0), int(query[3] or 0), int(value[3] or 0)

    @property
    def dtype(self) -> ir.DataType:
        """Of the queries, and of the result."""
        assert self.query.dtype is not None
        return self.query.dtype

    @property
    def one_head_count(self) -> bool:
        """Keys and values have the heads of the queries: neither grouped nor broadcast."""
        sizes = [dims(v) for v in (self.query, self.key, self.value)]
        first = sizes[0]
        return first is not None and all(s is not None and same_size(s[1], first[1]) and same_size(s[0], first[0]) for s in sizes)


def widths(model: ir.Model) -> list[int]:
    """Channels of the queries of all heads together, of each marker where that is known."""
    found = [_site(n) for n in model.graph if _is_marker(n)]
    return [site.sizes[0] * site.sizes[1] for site in found if site.four]


def lower_attention(model: ir.Model, form: str) -> list[Form]:
    """Replace every marker by `form`, or by a plainer one where `form` cannot express the site.

    Returns: what each site got, and why it is not `form`.
    """
    found: list[Form] = []
    shared: Shared = {}
    for node in [n for n in model.graph if _is_marker(n)]:
        site, refusal = _site(node), None
        for name, write in _fallbacks(form):
            try:
                write(site, Build(model, node, shared))
            except Refuse as e:
                refusal = refusal or e  # that of the form which was asked for
                continue
            found.append(_told(node, name, refusal))
            log.debug("%s: attention as %s", node.name, name)
            break
        model.graph.remove(node, safe=True)
    return found


def _told(node: ir.Node, form: str, refusal: Refuse | None) -> Form:
    why, remedy = ("", "") if refusal is None else (refusal.reason, refusal.remedy)
    return Form("attention", module_of(node), form, why, remedy)


def _is_marker(node: ir.Node) -> bool:
    return bool(node.domain == MARKER_DOMAIN and node.op_type == SDPA)


def _site(node: ir.Node) -> Site:
    query, key, value, mask = (*node.inputs, None)[:4]
    causal = bool(node.attributes["is_causal"].value)
    assert query is not None
    assert key is not None
    assert value is not None
    return Site(node, query, key, value, mask, float(node.attributes["scale"].value), causal)


def _fallbacks(form: str) -> tuple[tuple[str, Callable[[Site, Build], None]], ...]:
    """The form and the plainer ones, by name; each raises `Refuse`, and has written nothing, where it cannot express a site."""
    plain = ("decomposed", _decomposed)
    forms: dict[str, tuple[tuple[str, Callable[[Site, Build], None]], ...]] = {
        "qkv": (("qkv", _qkv), ("mha", _mha), plain),
        "mha": (("mha", _mha), plain),
        "attention23": (("attention23", _attention23), plain),
        "native": (("native", _native), ("mha", _mha), plain),
    }
    return forms.get(form, (plain,))


def _decomposed(site: Site, at: Build) -> None:
    """MatMul, Softmax, MatMul."""
    key, value = _repeated(site, site.key, at), _repeated(site, site.value, at)
    rank = len(dims(site.query) or ())
    key_t = _transposed(key, (*range(rank - 2), rank - 1, rank - 2), at)
    dtype = site.dtype
    query = (
        site.query if site.scale == 1 else at.op("Mul", site.query, at.const(np.asarray(site.scale, dtype.numpy())), dtype=dtype)
    )
    scores = at.op("MatMul", query, key_t, dtype=dtype)
    bias = bias_of(site.mask, site, at, causal=site.causal)
    if bias.values is not None:
        scores = at.op("Add", scores, bias.values, dtype=dtype)
    out = at.op("MatMul", at.op("Softmax", scores, axis=-1, dtype=dtype), value, dtype=dtype)
    _finish(site, _masked(out, bias, at))


def _attention23(site: Site, at: Build) -> None:
    """The standard op of opset 23; ONNX Runtime has it in float and half."""
    types = at.ir.DataType
    _four(site)
    if site.query.dtype not in (types.FLOAT, types.FLOAT16, types.BFLOAT16):
        raise Refuse("runtimes have the op in float32 and half alone", remedy="export it in float32")
    if site.sizes[1] != site.sizes[2]:  # TensorRT refuses it
        raise Refuse(f"values are {site.sizes[2]} wide and keys {site.sizes[1]}, which TensorRT refuses")
    # the op aligns a causal mask to the last key or to the first depending on its version: leave it out unless both agree
    causal = site.causal and site.square
    # ONNX Runtime does not broadcast the mask over queries and keys, though the standard allows it
    bias = _full_bias(site, at, causal=site.causal and not causal)
    inputs = [site.query, site.key, site.value, *([bias.values] if bias.values is not None else [])]
    out = at.op("Attention", *inputs, scale=site.scale, is_causal=int(causal), dtype=site.query.dtype)
    _finish(site, _masked(out, bias, at))


def _mha(site: Site, at: Build) -> None:
    """MultiHeadAttention of ONNX Runtime: takes (B, L, H·D), so the transposes on both sides go away."""
    _check_contrib(site, at)
    operands = [_heads_last(v, at) for v in (site.query, site.key, site.value)]
    bias = _full_bias(site, at)
    # query, key, value, bias, key_padding_mask, attention_bias
    inputs = [*operands, *([None, None, bias.values] if bias.values is not None else [])]
    out = at.op(
        "MultiHeadAttention",
        *inputs,
        domain=_CONTRIB,
        num_heads=site.sizes[0],
        scale=site.scale,
        unidirectional=int(site.causal),
        mask_filter_value=_HIDDEN,
        dtype=site.query.dtype,
    )
    _finish_heads_last(site, out, bias, at)


def _qkv(site: Site, at: Build) -> None:
    """Attention of ONNX Runtime: the projection to q, k and v is part of the op, so that it writes heads directly."""
    _check_contrib(site, at)
    if not site.square:
        raise Refuse("there are not as many keys as queries: they are of two sequences")
    parts = _projections(site)
    if parts is None:
        raise Refuse("queries, keys and values are not columns of linear layers that read one tensor")
    x = parts[0][0].x
    kernels, biases = [], []
    for linear, found in parts:
        columns = found.columns.reshape(-1)
        kernels.append(linear.weight[:, columns])
        biases.append(np.zeros(columns.size, linear.weight.dtype) if linear.bias is None else linear.bias[columns])
    heads_, width, out_width = site.sizes
    bias = _full_bias(site, at)
    inputs: list[ir.Value | None] = [x, at.const(np.concatenate(kernels, 1)), at.const(np.concatenate(biases))]
    if bias.values is not None:
        inputs += [None, None, bias.values]  # mask_index, past, attention_bias
    out = at.op(
        "Attention",
        *inputs,
        domain=_CONTRIB,
        num_heads=heads_,
        scale=site.scale,
        unidirectional=int(site.causal),
        mask_filter_value=_HIDDEN,
        dtype=site.query.dtype,
        qkv_hidden_sizes=[heads_ * width, heads_ * width, heads_ * out_width],
    )
    _finish_heads_last(site, out, bias, at)


def _native(site: Site, at: Build) -> None:
    """Attention of normfuse's kernels: reads q, k and v where projections left them, and writes (B, L, H·D)."""
    sizes = [dims(v) for v in (site.query, site.key, site.value)]
    _four(site)
    _check_float32_and_causal(site, at)
    head, width, out = site.sizes
    shared = sizes[1][1] if sizes[1] is not None else None
    if out != width:
        raise Refuse(f"values are {out} wide and keys {width}; the kernel has one width")
    if not isinstance(shared, int) or not shared or head % shared or sizes[2] is None or sizes[2][1] != shared:
        raise Refuse(f"{head} heads of queries are no multiple of those of keys and values")
    if not all(s is not None and same_size(s[0], sizes[0][0] if sizes[0] else None) for s in sizes):
        raise Refuse("queries, keys and values have not provably one batch size")
    bias = _full_bias(site, at)
    packed = _side_by_side(site)
    operands: tuple[ir.Value | None, ...]
    if packed is None:
        operands = tuple(_heads_last(v, at) for v in (site.query, site.key, site.value))
    else:  # no gap in front of a mask: see `native_node`
        operands = (packed, *[None if bias.values is None else packed] * 2)
    facts = {
        "scale": site.scale,
        "causal": int(site.causal),
        "heads": head,
        "kv_heads": shared,
        "layout": "bthd" if packed is None else "packed",
        "bits": site.bits,
    }
    (y,) = native_node(at, "Attention", (*operands, bias.values), facts, count=1)
    y.dtype = site.dtype
    _finish_heads_last(site, y, bias, at)


def in_kernel(site: Site, at: Build) -> bool:
    """Write `site` for normfuse's kernels, which take `bits`; False, and nothing written, where they need its operands copied."""
    try:
        _native(site, at)
    except Refuse:
        return False
    return True


def _side_by_side(site: Site) -> ir.Value | None:
    """The tensor whose columns are those of q, k and v, one behind the other."""
    for q, k, v in itertools.product(heads(site.query), heads(site.key), heads(site.value)):
        width = dims(q.root)
        if q.root is not k.root or q.root is not v.root or width is None:
            continue
        columns = np.concatenate([h.columns.reshape(-1) for h in (q, k, v)])
        if columns.size == width[2] and np.array_equal(columns, np.arange(columns.size)):
            return q.root
    return None


def _four(site: Site) -> None:
    if not site.four:
        raise Refuse("its operands have not four axes with known heads and channels")


def _check_float32_and_causal(site: Site, at: Build) -> None:
    if site.query.dtype != at.ir.DataType.FLOAT:
        raise Refuse("the kernel computes in float32, and the attention does not", remedy="export it in float32")
    if site.causal and not site.square:
        raise Refuse("it is causal, and there are not provably as many keys as queries")
    if site.causal and site.mask is not None:
        raise Refuse("it is causal and has a mask as well")


def _check_contrib(site: Site, at: Build) -> None:
    """What both ops of ONNX Runtime ask for.

    Raises:
        Refuse: the site is another.
    """
    _four(site)
    if not site.one_head_count:
        raise Refuse("keys and values have not the heads and the batch of the queries: they are shared or broadcast")
    _check_float32_and_causal(site, at)
    if site.mask is not None and at.opset < _BIAS_OPSET:
        raise Refuse(
            f"it has a mask, which ONNX Runtime takes wrongly before {_BIAS_RUNTIME}", remedy=f"opset {_BIAS_OPSET} or newer"
        )


def _projections(site: Site) -> tuple[tuple[Linear, Heads], ...] | None:
    """The linears that q, k and v are views of, when all three read one tensor."""
    options = [
        [(linear, h) for h in heads(v) if (linear := linear_of(h.root)) is not None] for v in (site.query, site.key, site.value)
    ]
    return next((found for found in itertools.product(*options) if len({id(linear.x) for linear, _ in found}) == 1), None)


def _heads_last(value: ir.Value, at: Build) -> ir.Value:
    """(B, H, L, D) as (B, L, H·D): the tensor that it is a view of, or a transposed copy."""
    for found in heads(value):
        width = dims(found.root)
        if found.contiguous and width is not None:
            start, stop = int(found.columns.flat[0]), int(found.columns.flat[-1]) + 1
            if (start, stop) == (0, width[2]):
                return found.root
            part = _column_split(found, at)
            if part is not None:
                return part
    size = dims(value)
    assert size is not None
    flat = at.op("Transpose", value, perm=list(_HEADS_LAST), dtype=value.dtype)
    shape = at.const(np.array([0, 0, int(size[1] or 0) * int(size[3] or 0)], np.int64))
    return at.op("Reshape", flat, shape, dtype=value.dtype)


def _column_split(found: Heads, at: Build) -> ir.Value | None:
    """The stretch of columns as one output of a Split into equal parts; one Split serves q, k and v."""
    sizes = dims(found.root)
    assert sizes is not None
    total, each, start = int(sizes[2] or 0), found.columns.size, int(found.columns.flat[0])
    if total % each or start % each:
        return None
    key = ("split", id(found.root), each)
    if key not in at.shared:
        producer = found.root.producer()
        parts = total // each
        node = at.ir.node("Split", [found.root, at.const(np.full(parts, each, np.int64))], {"axis": 2}, num_outputs=parts)
        node.metadata_props.update(at.before.metadata_props)
        for out in node.outputs:
            out.dtype = found.root.dtype
            out.shape = at.ir.Shape((sizes[0], sizes[1], each))
        if producer is not None:
            at.graph.insert_after(producer, [node])
        else:
            at.graph.insert_before(at.before, [node])
        at.shared[key] = node.outputs
    parts_: Sequence[ir.Value] = at.shared[key]
    return parts_[start // each]


def _repeated(site: Site, value: ir.Value, at: Build) -> ir.Value:
    """Keys or values with as many heads as the queries: head j serves the queries j·g … j·g + g − 1."""
    q, k = dims(site.query), dims(value)
    if q is None or k is None or len(q) != 4 or same_size(q[1], k[1]) or not (isinstance(q[1], int) and isinstance(k[1], int)):
        return value
    if k[1] == 1:
        return value  # MatMul broadcasts one head
    group = q[1] // k[1]
    wide = at.op("Unsqueeze", value, at.const(np.array([2], np.int64)), dtype=value.dtype)
    wide = at.op("Expand", wide, at.const(np.array([1, 1, group, 1, 1], np.int64)), dtype=value.dtype)
    return at.op("Reshape", wide, at.const(np.array([0, q[1], -1, k[3]], np.int64)), dtype=value.dtype)


def _transposed(value: ir.Value, perm: tuple[int, ...], at: Build) -> ir.Value:
    """`value` transposed; through a Transpose that made it, so that there is one and not two."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and not node.domain and "perm" in node.attributes:
        inner = node.attributes["perm"].value
        value, perm = given(node), tuple(inner[i] for i in perm)
    return at.op("Transpose", value, perm=list(perm), dtype=value.dtype)


def _full_bias(site: Site, at: Build, *, causal: bool = False) -> Bias:
    """The mask with four axes, the last two not broadcast."""
    bias = bias_of(site.mask, site, at, causal=causal)
    if bias.values is None:
        return bias
    have, q, k = dims(bias.values), dims(site.query), dims(site.key)
    if (
        have is not None
        and q is not None
        and k is not None
        and len(have) == 4
        and same_size(have[2], q[2])
        and same_size(have[3], k[2])
    ):
        return bias
    key = ("full", id(bias.values), q and q[2], k and k[2])
    if key not in at.shared:
        two = at.const(np.array([1, 1], np.int64))
        length = at.op("Concat", two, at.op("Shape", site.query, start=2, end=3), at.op("Shape", site.key, start=2, end=3), axis=0)
        at.shared[key] = at.op("Expand", bias.values, length, dtype=bias.values.dtype)
    return Bias(at.shared[key], bias.alive)


def _masked(out: ir.Value, bias: Bias, at: Build) -> ir.Value:
    """A query that may see no key at all gives zero, as in torch."""
    return out if bias.alive is None else at.op("Mul", out, bias.alive, dtype=out.dtype)


def _finish(site: Site, out: ir.Value) -> None:
    take_over(site.node.outputs[0], out)


def _finish_heads_last(site: Site, out: ir.Value, bias: Bias, at: Build) -> None:
    """Connect `out` (B, L, H·E); where the model transposes right behind the attention, its reshape reads `out` directly."""
    q = dims(site.query)
    head, _, width = site.sizes
    out.shape = at.ir.Shape((q[0], q[2], head * width) if q is not None else (None, None, head * width))
    if bias.alive is not None:
        out = _alive_tokens(out, bias, head, width, at)
    four = at.op("Reshape", out, at.const(np.array([0, 0, head, width], np.int64)), dtype=out.dtype)
    four = at.op("Transpose", four, perm=list(_HEADS_LAST), dtype=out.dtype)
    take_over(site.node.outputs[0], four)
    for user in _readers(four):
        if _undoes(user):
            for reshape, _ in list(user.outputs[0].uses()):
                reshape.replace_input_with(0, out)


def _alive_tokens(out: ir.Value, bias: Bias, head: int, width: int, at: Build) -> ir.Value:
    four = at.op("Reshape", out, at.const(np.array([0, 0, head, width], np.int64)), dtype=out.dtype)
    alive = at.op("Transpose", bias.alive, perm=list(_HEADS_LAST), dtype=out.dtype)
    shape = at.const(np.array([0, 0, head * width], np.int64))
    return at.op("Reshape", at.op("Mul", four, alive, dtype=out.dtype), shape, dtype=out.dtype, shape=dims(out))


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`; one that reshapes (B, H, L, E) to itself, as Hugging Face models do, is looked through."""
    out = []
    for user, _ in list(value.uses()):
        same = user.op_type == "Reshape" and not user.domain and dims(value) is not None and dims(user.outputs[0]) == dims(value)
        out += [u for u, _ in user.outputs[0].uses()] if same else [user]
    return out


def _undoes(node: ir.Node) -> bool:
    """(B, H, L, E) back to (B, L, H, E), read only by reshapes; in memory these are the rows of (B, L, H·E)."""
    if node.op_type != "Transpose" or node.domain or tuple(node.attributes["perm"].value) != _HEADS_LAST:
        return False
    if node.outputs[0].is_graph_output():
        return False
    for user, index in node.outputs[0].uses():
        if user.op_type != "Reshape" or user.domain or index != 0:
            return False
        shape = const_of(user.inputs[1])
        # a 0 copies the size of that axis, and only the first two axes keep theirs
        if shape is not None and (shape.reshape(-1)[2:] == 0).any():
            return False
    return True
