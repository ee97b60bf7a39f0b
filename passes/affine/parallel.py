"""Branches that read one value and are added or subtracted: their kernels add up to one.

    W₁ ∗ x + b₁ − (W₂ ∗ x + b₂) + (s x + t)  =  (W₁ − W₂ + s δ) ∗ x + (b₁ − b₂ + t)

δ is the unit kernel; a smaller kernel gets zeros around it. Source: Ding et al., RepVGG, arXiv 2101.03697, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Add, Affine, Conv, Linear, Sub, Value
from normfuse.passes.affine.broadcast import is_zero, per_channel
from normfuse.passes.affine.into_producer import into_weight
from normfuse.passes.affine.shared import check_shared
from normfuse.passes.patterns.precision import in_range

__all__ = [
    "Merged", "check_compatible", "check_sole", "outermost", "parallel_convs", "sum_of_kernels", "terms_of", "unit_branch",
    "weighted_branch",
]  # fmt: skip

aten = torch.ops.aten

_CONVS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
Term = tuple[fx.Node, int]  # a value and its sign in a sum


@dataclass(frozen=True, eq=False)
class Branch:
    """One term that can be spelled as a kernel; along an axis it reads input s·i − p + d·j for j < k.

    Attributes:
        node: the term.
        x: what it reads.
        W: its weight; None for s x + t.
        b: its bias, or the shift t.
        s: the scale of s x + t; None for x itself, and where there is a weight.
        sign: −1 for a term that is subtracted; W, b and s are those of the term itself.
    """

    node: fx.Node
    x: fx.Node
    W: Constant | None
    b: Constant | None
    s: Constant | None
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    sign: int = 1


@dataclass(frozen=True, eq=False)
class Merged:
    """What a sum becomes.

    Attributes:
        value: the sum with one operator in place of the branches.
        count: how many branches that operator replaces.
        rule: `parallel_convs`, or `parallel_linears`.
    """

    value: Value
    count: int
    rule: str


def parallel_convs(graph: Graph, node: fx.Node) -> Merged | None:
    """W₁ ∗ x ± W₂ ∗ x ± (s x + t)  =  (W₁ ± W₂ ± s δ) ∗ x ± t, and the same for linear operators: equal strides and groups,
    kernels with one centre, and no more taps than before"""
    if not outermost(graph, node):
        return None
    terms = terms_of(graph, node)
    refusal: Refuse | None = None
    for lead in terms:
        first = weighted_branch(graph, lead)
        if first is None:
            continue
        try:
            chosen = _fitting(graph, first, terms)
            if chosen is None:
                continue
            whole: Value = _one(graph, chosen)
            in_range(graph.view(lead[0], 1), whole)
        except Refuse as e:
            refusal = refusal or e
            continue
        taken = [(b.node, b.sign) for b in chosen]
        for term in terms:
            if term in taken:
                taken.remove(term)
            else:
                value, sign = Value(node=term[0]), term[1]
                whole = Add(value, whole) if sign > 0 else Sub(whole, value)
        return Merged(whole, len(chosen), "parallel_linears" if not first.size else "parallel_convs")
    if refusal is not None:
        raise refusal
    return None


def outermost(graph: Graph, node: fx.Node) -> bool:
    """Is the node a sum that is no term of another sum alone?"""
    if not _sum(graph, node):
        return False
    return not (len(node.users) == 1 and _sum(graph, next(iter(node.users))))


def _sum(graph: Graph, node: fx.Node) -> bool:
    match graph.view(node, 1):
        case Add(Value(), Value()) | Sub(Value(), Value()):
            return True
        case _:
            return False


def terms_of(graph: Graph, node: fx.Node) -> list[Term]:
    """The values that a tree of sums and differences adds up; an inner one that somebody else reads is one of them."""
    found: list[Term] = []
    work = [(node, 1)]
    while work:
        n, sign = work.pop()
        if n is node or (len(n.users) == 1 and _sum(graph, n)):
            second = -sign if isinstance(graph.view(n, 1), Sub) else sign
            work += [(a, s) for a, s in ((n.args[1], second), (n.args[0], sign)) if isinstance(a, fx.Node)]
        else:
            found.append((n, sign))
    return found


# -- branches ----------------------------------------------------------------------------------------------------------


def weighted_branch(graph: Graph, term: Term) -> Branch | None:
    """The term as a branch that ends in a convolution or a linear; None if it does not, or reads no graph node."""
    node, sign = term
    match _with_its_gain(graph, node):
        case Linear(Value(node=fx.Node() as x), W, b):
            return Branch(node, x, W, b, None, (), (), (), (), 1, sign)
        case Conv(Value(node=fx.Node() as x), W, b, stride, padding, dilation, groups):
            n = W.ndim - 2
            size, spread = tuple(W.shape[2:]), _times(dilation, n)
            around = _padding(padding, size, spread)
            return None if around is None else Branch(node, x, W, b, None, size, _times(stride, n), around, spread, groups, sign)
        case _:
            return None


def _with_its_gain(graph: Graph, node: fx.Node) -> Value:
    """s (W ∗ x + b) + t as one operator, where the branches under a gain have just become one that nobody else reads."""
    match graph.view(node, 2):
        case Affine(Linear() | Conv() as inner) as op if inner.sole_use and not graph.shared(inner.W):
            try:
                return into_weight(op) or op
            except Refuse:
                return op
        case _:
            return graph.view(node, 1)


def unit_branch(graph: Graph, term: Term, lead: Branch) -> Branch | None:
    """x, or s x + t with s and t per channel, as a kernel of one tap."""
    node, sign = term
    assert lead.W is not None
    n, channels = len(lead.size), lead.W.shape[0]
    if channels != lead.W.shape[1] * lead.groups:
        return None
    ones = ((1,) * n, (1,) * n, (0,) * n, (1,) * n, lead.groups, sign)
    if node is lead.x:
        return Branch(node, node, None, None, None, *ones)
    match graph.view(node, 1):
        case Affine(Value(node=x), s, t) if x is lead.x:
            scale, shift = per_channel(s, -1 - n, channels), per_channel(t, -1 - n, channels)
            return Branch(node, x, None, None if is_zero(shift) else shift, scale, *ones)
        case _:
            return None


def _padding(padding: Any, size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...] | None:
    """Zeros at the front of each axis; None where front and back differ."""
    if padding == "valid":
        return (0,) * len(size)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return _times(padding, len(size))


def _times(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * n if len(values) == 1 else values


# -- which of them add up ----------------------------------------------------------------------------------------------


def _fitting(graph: Graph, lead: Branch, terms: list[Term]) -> list[Branch] | None:
    """The branches that become one operator with `lead`, the largest kernel first; None if there are none."""
    rest = list(terms)
    rest.remove((lead.node, lead.sign))
    weighted = [
        b for b in (weighted_branch(graph, n) for n in rest) if b is not None and b.x is lead.x and bool(b.size) == bool(lead.size)
    ]
    chosen, refusal = [lead], None
    units = []
    for n in rest:
        try:
            unit = unit_branch(graph, n, lead)
        except Refuse as e:
            refusal = refusal or e
            continue
        units += [unit] if unit is not None else []
    for branch in [*weighted, *units]:
        try:
            check_sole(graph, branch, lead)
            check_compatible(graph, lead, branch)
            chosen.append(branch)
        except Refuse as e:
            refusal = refusal or e
    least = 2 if not lead.size else 1  # a residual around one linear is an ordinary sum
    if len(chosen) == 1 or sum(b.W is not None for b in chosen) < least:
        if refusal is not None:
            raise refusal
        return None
    check_sole(graph, lead, lead)
    chosen.sort(key=lambda b: (b.W is None, -prod(b.size)))
    _cheaper(chosen)
    return chosen


def check_sole(graph: Graph, branch: Branch, lead: Branch) -> None:
    """Refuse a branch that somebody beside the sum reads: it would be computed twice."""
    consumers = graph.consumers(branch.node)
    if branch.node is not lead.x and len(consumers) > 1:
        raise Refuse(f"{graph.path(branch.node)} feeds {len(consumers)} consumers", blocker=branch.node)
    if branch.W is not None:
        check_shared(graph, branch.W, branch.node, "merging")


def check_compatible(graph: Graph, a: Branch, b: Branch) -> None:
    """Do both read the same places around each output, and are their outputs of the same size?"""
    path = graph.path(b.node)
    assert a.W is not None
    if b.W is not None and b.W.shape[0] != a.W.shape[0]:
        raise Refuse(f"{path} has another number of outputs", blocker=b.node)
    if b.W is not None and b.W.dtype != a.W.dtype:
        raise Refuse(f"{path} has weights of another dtype", blocker=b.node)
    if a.groups != b.groups:
        raise Refuse(f"{path} has {b.groups} groups beside {a.groups}", blocker=b.node)
    if a.stride != b.stride:
        raise Refuse(f"{path} has another stride", blocker=b.node)
    for k, k2, d, d2, p, p2 in zip(a.size, b.size, a.dilation, b.dilation, a.padding, b.padding, strict=True):
        if k > 1 and k2 > 1 and d != d2:
            raise Refuse(f"{path} has another dilation", blocker=b.node)
        if 2 * p - d * (k - 1) != 2 * p2 - d2 * (k2 - 1) or (k - k2) % 2:
            raise Refuse(f"the kernel of {path} has another centre", blocker=b.node)


def _cheaper(branches: list[Branch]) -> None:
    taps, before = prod(_largest(branches)), sum(prod(b.size) for b in branches)
    if taps > before:
        raise Refuse(f"one kernel of {taps} taps would cost more than the {before} of its branches", blocker=branches[0].node)


# -- the one operator --------------------------------------------------------------------------------------------------


def _largest(branches: list[Branch]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*(b.size for b in branches), strict=True))


def _one(graph: Graph, branches: list[Branch]) -> Value:
    lead, size = branches[0], _largest(branches)
    W = lead.W
    assert W is not None
    weights = [_signed(b.W, b.sign) for b in branches if b.W is not None]
    scales = [float(b.sign) if b.s is None else _signed(b.s, b.sign) for b in branches if b.W is None]
    whole = Constant.apply(sum_of_kernels, weights, scales, size, lead.groups)
    bias: Constant | None = None
    for b in (None if branch.b is None else _signed(branch.b, branch.sign) for branch in branches):
        bias = b if bias is None else bias + b if b is not None else bias
    if bias is not None and all(b.b is None for b in branches if b.W is not None):
        bias = bias.cast(W.dtype).named(f"{W.name.removesuffix('weight')}bias" if W.name.endswith("weight") else f"{W.name}_bias")
    x = Value(node=lead.x)
    if not size:
        return Linear(x, whole, bias)
    widest = [max(branches, key=lambda b: b.size[i]) for i in range(len(size))]
    padding, dilation = [b.padding[i] for i, b in enumerate(widest)], [b.dilation[i] for i, b in enumerate(widest)]
    return Conv(x, whole, bias, list(lead.stride), padding, dilation, lead.groups, target=_CONVS[W.ndim])


def _signed(c: Constant, sign: int) -> Constant:
    return c if sign > 0 else -c


def sum_of_kernels(weights: list[Tensor], scales: list[Tensor | float], size: tuple[int, ...], groups: int) -> Tensor:
    """Σ W with every kernel in the middle of `size`, and the scales on the unit kernel: output o reads input o of its group."""

    def padded(w: Tensor) -> Tensor:
        around = [(k - n) // 2 for k, n in zip(size, w.shape[2:], strict=True)]
        return F.pad(w, [a for one in reversed(around) for a in (one, one)])

    whole = torch.stack([padded(w) for w in weights]).sum(0)
    if not scales:
        return whole
    channels = torch.arange(whole.shape[0], device=whole.device)
    middle = tuple(torch.full_like(channels, k // 2) for k in size)
    scale = torch.ones(whole.shape[0], dtype=whole.dtype, device=whole.device) * sum(scales)
    return whole.index_put((channels, channels % (whole.shape[0] // groups), *middle), scale, accumulate=True)
