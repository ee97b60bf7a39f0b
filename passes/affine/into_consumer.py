"""An affine moves down: into every operator that reads the value, or through it to that operator's own readers.

Every rule is read from the inside out: an operator with `Affine(x, s, t)` among its operands equals the value that the
rule returns. A returned `Affine` has to land further down; all readers take it, or nothing is rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.ir.views import (
    Add,
    Affine,
    AvgPool,
    Cat,
    GlobalAvgPool,
    Identity,
    LeakyRelu,
    MatMul,
    MaxPool,
    Mean,
    Movement,
    Mul,
    Op,
    Pad,
    Permute,
    Relu,
    Reshape,
    Resize,
    Sdpa,
    Softmax,
    Sub,
    Take,
    Value,
)  # fmt: skip
from normfuse.ir.weights import Weight
from normfuse.passes.affine.broadcast import (
    PASS_INPUTS,
    UNKNOWN,
    axes,
    collapse,
    fitted,
    image_axes,
    is_one,
    is_zero,
    moved,
    padded_axes,
    per_channel,
    pooled_axes,
    positive,
    taken_alike,
)
from normfuse.passes.affine.into_producer import bias

__all__ = ["RULES"]

_ONE = Constant.of(torch.ones(1, dtype=torch.float64))


def into_weight(op: Op) -> Value | None:
    """W (s x + t) + b  =  (W s) x + (W t + b) for every layer with weights, the shift only where it is one for all outputs"""
    match op:
        case Op(weight=Weight(into=int(into)) as w, x=Affine(x, s, t)):  # type: ignore[misc]
            s, t = per_channel(s, w.axis, w.inputs), per_channel(t, w.axis, w.inputs)
            if w.unshifted and not is_zero(t):
                raise Refuse(w.unshifted, blocker=op.node, remedy=w.remedy)
            scaled = w.value if is_one(s) else w.value * w.beside(s, into)
            shifted = w.bias if is_zero(t) else bias(w, _ONE, w.total(t))
            return dataclasses.replace(op.with_weight(scaled, shifted), x=x)  # type: ignore[call-arg]
        case _:
            return None


def through_relu(op: Op) -> Value | None:
    """relu(s x)  =  s relu(x)   for s > 0; the same for leaky relu"""
    match op:
        case Relu(Affine(x, s, t)) | LeakyRelu(Affine(x, s, t)):
            if not (positive(s) and is_zero(t)):
                raise Refuse("relu commutes only with a positive scale and no shift", blocker=op.node)
            return Affine(Relu(x) if isinstance(op, Relu) else LeakyRelu(x, op.slope), s, t)
        case _:
            return None


def through_pool(op: Op) -> Value | None:
    """pool(s x + t)  =  s pool(x) + t: means and resizing for any s, maxima for s > 0, where nothing varies along what is pooled"""
    match op:
        case MaxPool(Affine(x, s, t), kernel):
            if not positive(s):
                raise Refuse("a maximum commutes only with a positive scale", blocker=op.node)
            pooled = kernel
        case AvgPool(Affine(x, s, t), kernel):
            if not op.mean and not is_zero(t):
                raise Refuse("average pooling counts zeros of the border", blocker=op.node)
            pooled = kernel
        case GlobalAvgPool(Affine(x, s, t), size):
            pooled = size
        case Resize(Affine(_, s, t)):
            pooled = image_axes(op)
        case Mean(Affine(x, s, t), dim, keepdim, None):
            rank = op.x.x.rank  # type: ignore[attr-defined]
            if rank is None:
                raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
            lost = {d % rank - rank for d in dim}
            if axes(s, t) & lost:
                return None
            return Affine(Mean(x, dim, keepdim), *(_drop(c, rank, lost, keepdim) for c in (s, t)))
        case _:
            return None
    return None if axes(s, t) & pooled_axes(pooled) else Affine(Value(), s, t)


def through_movement(op: Op) -> Value | None:
    """M (s x + t)  =  s′ M x + t′   for reshapes, permutations, slices, expansions and the pieces of a split"""
    match op:
        case Identity(Affine(_, s, t)):
            return Affine(Value(), s, t)
        case Permute(Affine(x, s, t)) | Reshape(Affine(x, s, t)) | Movement(Affine(x, s, t)):
            return Affine(Value(), moved(_on(op, x), s), moved(_on(op, x), t))
        case _:
            return None


def through_take(op: Op) -> Value | None:
    """(s x + t)[i]  =  s x[i] + t   for places i along axes on which nothing varies"""
    match op:
        case Take(Affine(x, s, t), mixed) if op.rank is not None and taken_alike(op, x, axes(s, t), mixed):
            return Affine(Value(), fitted(s, op.rank), fitted(t, op.rank))
        case _:
            return None


def through_pad(op: Op) -> Value | None:
    """pad_v(s x + t)  =  s pad_w(x) + t,   w = (v − t) / s   where that is one number;   pad₀(s x) = s pad₀(x)"""
    match op:
        case Pad(Affine(x, s, t), pad, v) if not axes(s, t) & padded_axes(pad):
            if v == 0 and is_zero(t):
                return Affine(Value(), s, t)
            w = collapse((t * -1.0 + v) / s) if bool(s.value.all()) else None
            if w is None or axes(w):
                border = "zero padding" if v == 0 else f"padding with {v}"
                raise Refuse(f"a shift does not commute with {border}", blocker=op.node, remedy="pad before the normalization")
            return Affine(Pad(x, pad, float(w.value.reshape(-1)[0])), s, t)
        case _:
            return None


def through_cat(op: Op) -> Value | None:
    """[s x + t | y]  =  (s, 1) [x | y] + (t, 0)"""
    match op:
        case Cat(xs, dim) if op.shape is not None:
            axis = dim % len(op.shape) - len(op.shape)
            parts = [(x.s, x.t) if isinstance(x, Affine) and _pending(x) else None for x in xs]
            if all(p is not None for p in parts) and all(axis not in axes(*p) for p in parts if p):
                first = parts[0]
                assert first is not None
                if all(p is not None and _same(p[0], first[0]) and _same(p[1], first[1]) for p in parts):
                    return Affine(Value(), *first)
            sizes = [x.shape[axis] if x.shape is not None else None for x in (_raw(x) for x in xs)]
            fixed = [n for n in sizes if isinstance(n, int)]
            if len(fixed) != len(sizes):
                raise Refuse("concatenated with a value of varying size that has another affine", blocker=op.node)
            return Affine(Value(), *(_stack(parts, fixed, axis, i) for i in (0, 1)))
        case _:
            return None


def through_sum(op: Op) -> Value | None:
    """(x + t) ± y  =  (x ± y) + t,   y − (x + t)  =  (y − x) − t;   (s x + t₁) ± (s y + t₂)  =  s (x ± y) + (t₁ ± t₂)"""
    match op:
        case Add(Value() as x, Value() as y) | Sub(Value() as x, Value() as y):  # also where one is broadcast to the other
            carried = [v.s for v in (x, y) if isinstance(v, Affine) and _pending(v)]
            if not carried:
                return None
            s = carried[0]
            if not (_same(s, carried[1]) if len(carried) == 2 else is_one(s)):
                raise Refuse("added to a value that does not carry the same scale", blocker=op.node)
            return Affine(Value(), s, _total(x, y, minus=isinstance(op, Sub)))
        case _:
            return None


def through_product(op: Op) -> Value | None:
    """(s x) y  =  s (x y)"""
    match op:
        case Mul(Affine(_, s, t, node=None), Value() as y) | Mul(Value() as y, Affine(_, s, t, node=None)) if not isinstance(
            y, Affine
        ):
            if not is_zero(t):
                raise Refuse("a shift does not commute with a product", blocker=op.node)
            return Affine(Value(), s, t)  # s varies only where x does, and so does the product
        case _:
            return None


def through_attention_values(op: Op) -> Value | None:
    """P (s v + t)  =  s (P v) + t,   P = softmax(…): its rows sum to one, and s, t do not vary along the tokens"""
    match op:
        case Sdpa(Value(), Value(), Affine(v, s, t, node=None), mask, 0.0) if -2 not in axes(s, t) and not op.gqa:
            if _pending(op.q) or _pending(op.k):
                return None
            if mask is not None and not is_zero(t):
                raise Refuse("a mask may leave a row of attention empty, which then does not sum to one", blocker=op.node)
            return Affine(Value(), s, t)
        case MatMul(p, Affine(v, s, t, node=None)) if -2 not in axes(s, t) and not _pending(p):
            if not is_zero(t) and not (isinstance(p, Softmax) and p.dim in (-1, (v.rank or 0) - 1)):
                raise Refuse("a shift passes a product only if the rows of the other factor sum to one", blocker=op.node)
            return Affine(Value(), s, t)
        case _:
            return None


RULES: tuple[Callable[[Op], Value | None], ...] = (
    into_weight,
    through_relu,
    through_pool,
    through_movement,
    through_take,
    through_pad,
    through_cat,
    through_sum,
    through_product,
    through_attention_values,
)


def _total(x: Value, y: Value, *, minus: bool) -> Constant:
    """The shift of x ± y, of which one has a shift of its own at least."""
    a, b = (v.t if isinstance(v, Affine) and _pending(v) else None for v in (x, y))
    if b is not None and minus:
        b = b * -1.0
    total = a if b is None else b if a is None else a + b
    assert total is not None
    return total


def _drop(c: Constant, rank: int, lost: set[int], keepdim: bool) -> Constant:
    """An affine on x, on the mean of x over the axes `lost`."""
    if keepdim:
        return c
    full = c.reshape(*[1] * (rank - c.ndim), *c.shape)
    return full.reshape(*[n for i, n in enumerate(full.shape) if i - rank not in lost])


def _on(op: Op, x: Value) -> Permute | Reshape | Movement:
    """The same movement, reading the value without its affine."""
    match op:
        case Permute(_, dims):
            return Permute(x, dims, node=op.node, target=op.target)
        case Reshape(_, rest):
            return Reshape(x, rest, node=op.node, target=op.target)
        case Movement(_, rest, kwargs, piece):
            return Movement(x, rest, kwargs, piece, node=op.node, target=op.target)
    raise TypeError(op)


def _raw(x: Any) -> Any:
    return x.x if _pending(x) else x


def _pending(x: Any) -> bool:
    """Is it an affine that is on its way, not one that stands in the graph?"""
    return isinstance(x, Affine) and x.node is None


def _same(a: Constant, b: Constant) -> bool:
    return a.value.numel() == b.value.numel() and bool((a.value.reshape(-1) == b.value.reshape(-1)).all())


def _stack(parts: list[tuple[Constant, Constant] | None], sizes: list[int], axis: int, which: int) -> Constant:
    rank = max([-axis] + [c.ndim for p in parts if p for c in p])
    columns = []
    for part, size in zip(parts, sizes, strict=True):
        c = part[which].value if part else torch.tensor([1.0 - which], dtype=torch.float64)
        c = c.reshape(*[1] * (rank - c.ndim), *c.shape)
        columns.append(c.expand(*[size if i == rank + axis else n for i, n in enumerate(c.shape)]))
    shape = torch.broadcast_shapes(*[c.narrow(axis, 0, 1).shape for c in columns])
    whole = torch.cat([c.expand(*[c.shape[axis] if i == rank + axis else n for i, n in enumerate(shape)]) for c in columns], axis)
    like = next(p[which] for p in parts if p)
    return collapse(like.holding(whole.contiguous()))
