"""Normalizations over the last axis in ATen arithmetic, read as one operator of `torch.ops.normfuse`.

    γ x / √(mean x² + ε)                          =  rms_norm(x, γ)
    x / √((Σ x² + (Σ x)²) / (d + 1) + ε)          =  crms_norm(x),            d features
    γ (x − μ) / (c mean|x − μ| + ε) + β           =  l1_norm(x, γ, β),        μ = mean x

`max(c mean|x − μ|, √ε)`, which the pass `l1` writes, is no l1_norm: the two differ where a row hardly varies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import default_eps
from normfuse.ir.graph import Graph
from normfuse.ir.views import Add, Div, Mean, Mul, Pow, RmsNorm, Rsqrt, Sqrt, Square, Sub, Sum, Value
from normfuse.passes.patterns.moments import is_cast

__all__ = ["Norm", "crms_norm", "dtype_of", "is_row", "l1_norm", "over_last_axis", "rms_norm", "settled"]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm over the last axis, d features long.

    Attributes:
        op: the operator that it is.
        x: what is normalized.
        last: what holds the result.
        eps: as the operator takes it.
        gain, shift: d values or None.
        scale_const: c of l1_norm.
    """

    op: str
    x: fx.Node
    last: fx.Node
    eps: float
    gain: Constant | None = None
    shift: Constant | None = None
    scale_const: float = 1.0

    @property
    def features(self) -> int:
        return int(self.x.meta["val"].shape[-1])


def rms_norm(graph: Graph, node: fx.Node) -> Norm | None:
    """γ x / √(mean x² + ε)"""
    match graph.view(node, 2):
        case RmsNorm(Value(node=fx.Node() as x), [_], gamma, eps) if is_row(x):
            return Norm("rms_norm", x, node, default_eps(x.meta["val"].dtype) if eps is None else eps, gamma)
        case _:
            return None


def crms_norm(graph: Graph, node: fx.Node) -> Norm | None:
    """x / √(k (Σ x² + (Σ x)²) / (d + 1) + ε)  =  k^−½ x / √((Σ x² + (Σ x)²) / (d + 1) + ε / k)"""
    match graph.view(node, 2):
        case Div(Value(node=fx.Node() as x), Sqrt(Value(node=fx.Node() as under))):
            pass
        case Mul(Value(node=fx.Node() as x), Rsqrt(Value(node=fx.Node() as under))):
            pass
        case Mul(Rsqrt(Value(node=fx.Node() as under)), Value(node=fx.Node() as x)):
            pass
        case _:
            return None
    if not is_row(x):
        return None
    match graph.view(under, 6):
        case Add(Mul(Add(a, b), float() as scale), float() as eps):
            pass
        case Add(Div(Add(a, b), int() | float() as count), float() as eps) if count:
            scale = 1 / count
        case _:
            return None
    if not (_squares(a, x) and _square_of_sum(b, x)) and not (_squares(b, x) and _square_of_sum(a, x)):
        return None
    d = int(x.meta["val"].shape[-1])
    k = scale * (d + 1)
    if isclose(k, 1.0, rel_tol=1e-12):
        return Norm("crms_norm", x, node, eps)
    if k <= 0:
        return None
    gain = Constant.of(torch.full((d,), k**-0.5, dtype=torch.float64)).cast(x.meta["val"].dtype)
    return Norm("crms_norm", x, node, eps / k, gain)


def l1_norm(graph: Graph, node: fx.Node) -> Norm | None:
    """(x − μ) / (c mean|x − μ| + ε)"""
    match graph.view(node, 4):
        case Div(Sub(Value(node=fx.Node() as x), Mean(Value(node=y), dim, True)) as centred, Add(size, float() as eps)):
            pass
        case _:
            return None
    if y is not x or not is_row(x) or not over_last_axis(dim, x):
        return None
    c = 1.0
    match size:
        case Mul(Mean() as size, float() as c) | Mul(float() as c, Mean() as size):
            pass
    match size:
        case Mean(Value(node=fx.Node(target=aten.abs.default, args=(of,))), axis, True) if of is centred.node and c > 0:
            return Norm("l1_norm", x, node, eps, scale_const=c) if over_last_axis(axis, x) else None
        case _:
            return None


def _squares(value: Any, x: fx.Node) -> bool:
    """Is it Σ x², the axis kept?"""
    match value:
        case Sum(inner, dim, True):
            return over_last_axis(dim, x) and _is_square(inner, x)
        case _:
            return False


def _square_of_sum(value: Any, x: fx.Node) -> bool:
    """Is it (Σ x)²?"""
    match value:
        case Mul(Sum() as total, Sum() as again):
            same = total.node is again.node
        case Square(Sum() as total) | Pow(Sum() as total, 2 | 2.0):
            same = True
        case _:
            return False
    return same and total.keepdim and over_last_axis(total.dim, x) and total.x.node is x


def _is_square(value: Value, x: fx.Node) -> bool:
    match value:
        case Mul(Value(node=a), Value(node=b)):
            return a is x and b is x
        case Square(Value(node=a)) | Pow(Value(node=a), 2 | 2.0):
            return a is x
        case _:
            return False


def settled(graph: Graph, norm: Norm) -> Norm | None:
    """With the γ and β that follow and the casts around it, as far as the result has the dtype of x; None if it never has."""
    x, source = norm.x, norm.x.args[0] if is_cast(norm.x) else None
    narrow = source if isinstance(source, fx.Node) and is_row(source) else None
    best: Norm | None = None
    while True:
        if dtype_of(norm.last) == dtype_of(x):
            best = replace(norm, x=x)
        user = next(iter(norm.last.users)) if len(norm.last.users) == 1 else None
        if user is None:
            return best
        if narrow is not None and is_cast(user) and dtype_of(user) == dtype_of(narrow):
            norm, x = replace(norm, last=user), narrow
            continue
        taken = _affine(graph, norm, user)
        if taken is None:
            return best
        norm = taken


def _affine(graph: Graph, norm: Norm, user: fx.Node) -> Norm | None:
    """The norm together with the constants that `user` multiplies it with, or adds to it; None if it does neither."""
    d = norm.features
    match graph.view(user, 1):
        case Mul(Value(), Constant() as c) | Mul(Constant() as c, Value()) if _is_vector(c, d, norm.x) and norm.shift is None:
            gain = c.reshape(d) if c.ndim > 1 else c
            return replace(norm, last=user, gain=gain if norm.gain is None else norm.gain * gain)
        case Add(Value(), Constant() as c) | Add(Constant() as c, Value()) if _is_vector(c, d, norm.x):
            if norm.op == "l1_norm" and norm.shift is None:
                return replace(norm, last=user, shift=c.reshape(d) if c.ndim > 1 else c)
    return None


# -- what values are ---------------------------------------------------------------------------------------------------


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of the tensor of a node that has one."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def is_row(node: fx.Node) -> bool:
    """Floats with a last axis of fixed size."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or not val.dtype.is_floating_point or not val.ndim:
        return False
    return isinstance(val.shape[-1], int) and val.shape[-1] > 0


def over_last_axis(dim: Any, x: fx.Node) -> bool:
    """Does the argument `dim` of a reduction of x name its last axis and no other?"""
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return dims in ((-1,), (x.meta["val"].ndim - 1,))


def _is_vector(c: Constant, d: int, x: fx.Node) -> bool:
    """One value a feature, broadcast over all else."""
    return c.numel == d and c.shape[-1:] == (d,) and c.ndim <= x.meta["val"].ndim and c.dtype.is_floating_point
