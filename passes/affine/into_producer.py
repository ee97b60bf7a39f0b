"""An affine moves up: into the operator that makes the value, or through it to that operator's own operands.

Every rule is read from the outside in: `Affine(P(x), s, t)` equals the value that the rule returns. Where that value
holds affines on its operands, those must move further up in turn; all of them land, or nothing is rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
    axes,
    collapse,
    fitted,
    image_axes,
    is_zero,
    keeps_shape,
    padded_axes,
    per_channel,
    pooled_axes,
    positive,
    same_shape,
    taken_alike,
    unmoved,
)

__all__ = ["RULES", "beside", "bias", "into_weight"]


def into_weight(op: Op) -> Value | None:
    """s (W x + b) + t  =  (s W) x + (s b + t) for every layer with weights;   s E[i] + t  =  (s E + t)[i] for a table"""
    match op:
        case Affine(Op(weight=Weight() as w) as layer, s, t):
            s, t = per_channel(s, w.axis, w.outputs), per_channel(t, w.axis, w.outputs)
            scaled = w.value * w.beside(s, w.out)
            if w.into is None:
                return layer.with_weight(scaled + w.beside(t, w.out))
            return layer.with_weight(scaled, bias(w, s, t))
        case _:
            return None


def through_sum(op: Op) -> Value | None:
    """s (x + y) + t  =  (s x + t) + s y,   s (x − y) + t  =  (s x + t) − s y"""
    match op:
        case Affine(Add(Value() as x, Value() as y), s, t) if same_shape(x, y):
            return Add(Affine(x, s, t), Affine(y, s, t * 0.0))
        case Affine(Sub(Value() as x, Value() as y), s, t) if same_shape(x, y):
            return Sub(Affine(x, s, t), Affine(y, s, t * 0.0))
        case Affine(Add(Value() as x, Constant() as c), s, t) | Affine(Add(Constant() as c, Value() as x), s, t) if _fits(c, x):
            return Add(Affine(x, s, t), c * s)
        case _:
            return None


def through_relu(op: Op) -> Value | None:
    """s relu(x)  =  relu(s x)   for s > 0; the same for leaky relu"""
    match op:
        case Affine(Relu() | LeakyRelu(), s, t) if not (positive(s) and is_zero(t)):
            raise Refuse("relu commutes only with a positive scale and no shift", blocker=op.x.node)
        case Affine(Relu(x), s, t):
            return Relu(Affine(x, s, t))
        case Affine(LeakyRelu(x, slope), s, t):
            return LeakyRelu(Affine(x, s, t), slope)
        case _:
            return None


def through_pool(op: Op) -> Value | None:
    """s pool(x) + t  =  pool(s x + t): means and resizing for any s, maxima for s > 0, where nothing varies along what is pooled"""
    match op:
        case Affine(MaxPool(x, kernel) as p, s, t):
            if not positive(s):
                raise Refuse("a maximum commutes only with a positive scale", blocker=p.node)
            pooled = kernel
        case Affine(AvgPool(x, kernel) as p, s, t):
            if not p.mean and not is_zero(t):
                raise Refuse("average pooling counts zeros of the border", blocker=p.node)
            pooled = kernel
        case Affine(GlobalAvgPool(x, size) as p, s, t):
            pooled = size
        case Affine(Resize(x) as p, s, t):
            pooled = image_axes(p)
        case Affine(Mean(x, dim, True, None), s, t):
            return Mean(Affine(x, s, t), dim, True)  # s and t cannot vary along an axis of size 1
        case _:
            return None
    return None if axes(s, t) & pooled_axes(pooled) else dataclasses.replace(p, x=Affine(x, s, t), node=None)


def through_movement(op: Op) -> Value | None:
    """s M x + t  =  M (s′ x + t′)   for reshapes, permutations, slices and the pieces of a split"""
    match op:
        case Affine(Identity(x) as m, s, t):
            return Identity(Affine(x, s, t), m.memory_format, target=m.target)
        case Affine(Permute(Value() as x, dims) as m, s, t):
            return Permute(Affine(x, unmoved(m, s, 1.0), unmoved(m, t, 0.0)), dims, target=m.target)
        case Affine(Reshape(Value() as x, rest) as m, s, t):
            return Reshape(Affine(x, unmoved(m, s, 1.0), unmoved(m, t, 0.0)), rest, target=m.target)
        case Affine(Movement(Value() as x, rest, kwargs, piece) as m, s, t):
            return Movement(Affine(x, unmoved(m, s, 1.0), unmoved(m, t, 0.0)), rest, kwargs, piece, target=m.target)
        case _:
            return None


def through_take(op: Op) -> Value | None:
    """s x[i] + t  =  (s x + t)[i]   for places i along axes on which nothing varies"""
    match op:
        case Affine(Take(x, mixed) as p, s, t) if x.rank is not None and taken_alike(p, x, axes(s, t), mixed):
            return dataclasses.replace(p, x=Affine(x, fitted(s, x.rank), fitted(t, x.rank)), node=None)
        case _:
            return None


def through_pad(op: Op) -> Value | None:
    """s pad_v(x) + t  =  pad_w(s x + t),   w = s v + t   where that is one number"""
    match op:
        case Affine(Pad(x, pad, v) as p, s, t) if not axes(s, t) & padded_axes(pad):
            w = collapse(t if v == 0 else s * v + t)
            if axes(w) or bool(w.value.isnan()):
                raise Refuse("the border would take another number in every channel", blocker=p.node)
            return Pad(Affine(x, s, t), pad, float(w.value.reshape(-1)[0]))
        case _:
            return None


def through_cat(op: Op) -> Value | None:
    """s [x | y] + t  =  [s₁ x + t₁ | s₂ y + t₂]"""
    match op:
        case Affine(Cat(xs, dim) as p, s, t) if p.shape is not None and all(
            isinstance(x, Value) and x.shape is not None for x in xs
        ):
            axis = dim % len(p.shape) - len(p.shape)
            sizes = [x.shape[axis] for x in xs]  # type: ignore[index]
            if axis not in axes(s, t):
                return Cat([Affine(x, s, t) for x in xs], dim)  # type: ignore[arg-type]
            if not all(isinstance(n, int) for n in sizes):
                return None
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            cut = [[_narrow(c, axis, a, n) for c in (s, t)] for a, n in zip(starts, sizes, strict=True)]
            return Cat([Affine(x, *c) for x, c in zip(xs, cut, strict=True)], dim)  # type: ignore[arg-type]
        case _:
            return None


def through_attention_values(op: Op) -> Value | None:
    """s (P v) + t  =  P (s v + t),   P = softmax(…): its rows sum to one, and s, t do not vary along the tokens"""
    match op:
        case Affine(Sdpa(q, k, v, mask, 0.0, causal, scale, False), s, t) if -2 not in axes(s, t):
            if mask is not None and not is_zero(t):
                raise Refuse("a mask may leave a row of attention empty, which then does not sum to one", blocker=op.x.node)
            return Sdpa(q, k, Affine(v, s, t), mask, 0.0, causal, scale, False)
        case Affine(MatMul(Softmax(dim=-1) as p, Value() as v) as m, s, t) if -2 not in axes(s, t):
            return MatMul(p, Affine(v, s, t), target=m.target)
        case _:
            return None


RULES: tuple[Callable[[Op], Value | None], ...] = (
    into_weight,
    through_sum,
    through_relu,
    through_pool,
    through_movement,
    through_take,
    through_pad,
    through_cat,
    through_attention_values,
)


def bias(w: Weight, s: Constant, t: Constant) -> Constant | None:
    """s b + t, named and typed as the bias of W; none where it would be zero and there was none."""
    if w.bias is None:
        return None if is_zero(t) else t.cast(w.value.dtype).named(beside(w.value))
    return w.bias * s + t


def beside(W: Constant) -> str:
    """Name of the bias that stands beside this weight."""
    return W.name.removesuffix("weight") + "bias" if W.name.endswith("weight") else f"{W.name}_bias"


def _fits(c: Constant, x: Value) -> bool:
    return c.dtype.is_floating_point and keeps_shape(c, x)


def _narrow(c: Constant, axis: int, start: int, length: int) -> Constant:
    if axis not in axes(c):
        return c
    return Constant.apply(lambda v: v.narrow(axis, start, length), c)
