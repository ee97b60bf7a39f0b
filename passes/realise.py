"""Affines that found no place become the cheapest operator that computes them: where they started, never slower."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from normfuse.ir.aliases import copy_is_needed
from normfuse.ir.constants import Constant
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Add, Affine, BatchNorm, GroupNorm, Identity, InstanceNorm, LayerNorm, Mul, Op, RmsNorm, Value
from normfuse.passes.affine.broadcast import axes, collapse, is_one, is_zero, per_channel
from normfuse.passes.patterns.known import dtype_of, infer

__all__ = ["Realise"]


def into_norm(op: Op) -> Value | None:
    """s N(x) + t  =  the norm N with γ = s and β = t;   RMSNorm has no β, so s N(x) + t = RMSNorm(x; γ = s) + t"""
    match op:
        case Affine(LayerNorm(x, shape, None, None, eps) as norm, s, t) if norm.sole_use and _feature(s, t):
            n = shape[-1]
            gamma = None if is_one(s) and is_zero(t) else _whole(s, n)
            beta = None if is_zero(t) else _whole(t, n).cast(s.dtype)
            return LayerNorm(x, shape, gamma, beta, eps) if len(shape) == 1 else None
        case Affine(RmsNorm(x, shape, None, eps) as norm, s, t) if norm.sole_use and _feature(s, t) and len(shape) == 1:
            scaled = RmsNorm(x, shape, None if is_one(s) else _whole(s, shape[-1]), eps)
            return scaled if is_zero(t) else Add(scaled, _stored(_whole(t, shape[-1]), op))
        case Affine(GroupNorm(x, groups, None, None, eps) as norm, s, t) if norm.sole_use and x.rank and axes(s, t) <= {1 - x.rank}:
            n = max(s.numel, t.numel)
            return GroupNorm(x, groups, per_channel(s, 1 - x.rank, n), per_channel(t, 1 - x.rank, n).cast(s.dtype), eps)
        case _:
            return None


def into_batch_norm(op: Op) -> Value | None:
    """s x + t  =  BatchNorm(x; γ = s, β = t, μ = 0, σ² = 1, ε = 0) over axis 1 of a value with further axes: one operator

    Where a norm was; a model that multiplies and adds goes on doing so, and no norm appears where there was none.
    """
    match op:
        case Affine(x, s, t) if (
            _was_norm(op)
            and x.rank is not None
            and x.rank > 2
            and axes(s) == {1 - x.rank}
            and not is_one(s)
            and not is_zero(t)
            and axes(t) <= axes(s)
        ):
            c, of = s.numel, s.name.removesuffix("weight") or "affine."
            zero, one = (
                Constant.of(torch.full((c,), v, dtype=torch.float64)).cast(s.dtype).named(f"{of}{n}")
                for n, v in (("running_mean", 0.0), ("running_var", 1.0))
            )
            gamma, beta = per_channel(s, 1 - x.rank, c), per_channel(t, 1 - x.rank, c).cast(s.dtype)
            return BatchNorm(x, gamma, beta, zero, one, False, 0.0, 0.0, False)
        case _:
            return None


def into_arithmetic(op: Op) -> Value | None:
    """s x + t  as a product, a sum, or both"""
    match op:
        case Affine(x, s, t):
            if is_one(s) and is_zero(t):
                return Identity(x) if op.node is not None and copy_is_needed(op.node) else x
            scaled = x if is_one(s) else Mul(x, _operand(s, op))
            return scaled if is_zero(t) else Add(scaled, _operand(t, op))
        case _:
            return None


class Realise(Pass):
    """What is left of y = s x + t becomes γ and β of the norm before it, one BatchNorm, or a product and a sum."""

    name = "realise"
    rules = (into_norm, into_batch_norm, into_arithmetic)

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        infer(graph)
        for node in graph:
            op = graph.view(node, 2)
            if isinstance(op, Affine):  # a change of form, which needs no permission
                graph.replace(node, next(v for v in (rule(op) for rule in (_origin, *self.rules)) if v is not None))


def _origin(op: Op) -> Value | None:
    """The operator that the affine was read from, with its own constants, if nothing has changed it since."""
    assert op.node is not None
    assert isinstance(op, Affine)
    origin: Any = op.node.meta.get("origin")
    if origin is None or op.node.meta.get("composed"):
        return None
    match origin, op.x:
        case (
            (LayerNorm(), LayerNorm(x, gamma=None, beta=None))
            | (RmsNorm(), RmsNorm(x, gamma=None))
            | (GroupNorm(), GroupNorm(x, gamma=None, beta=None))
        ):
            restored: Value = dataclasses.replace(origin, x=x, node=None)
            return restored if op.x.sole_use else None
        case ((LayerNorm() | RmsNorm() | GroupNorm()), _):
            return None
    sides: dict[str, Any] = {side: op.x for side in ("x", "y") if isinstance(getattr(origin, side, None), Value)}
    whole: Value = dataclasses.replace(origin, node=None, **sides)
    return whole


def _feature(s: Constant, t: Constant) -> bool:
    return axes(s, t) <= {-1}


def _whole(c: Constant, size: int) -> Constant:
    return per_channel(c, -1, size)


def _operand(c: Constant, op: Affine) -> Constant | float:
    return float(c.value.reshape(-1)[0]) if not axes(c) else _stored(collapse(c), op)


def _stored(c: Constant, op: Affine) -> Constant:
    """The constant in the dtype of the value, which it must not promote."""
    return c.cast(dtype_of(op.x) or c.dtype)


def _was_norm(op: Op) -> bool:
    origin = None if op.node is None else op.node.meta.get("origin")
    return isinstance(origin, (BatchNorm, InstanceNorm, LayerNorm, RmsNorm, GroupNorm))
