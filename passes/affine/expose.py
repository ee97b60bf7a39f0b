"""Static normalizations become `Affine`: one object that the algebra can move."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass, Rewriting, under
from normfuse.ir.views import Add, Affine, BatchNorm, Div, GroupNorm, InstanceNorm, LayerNorm, Mul, Op, RmsNorm, Sub, Value
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, axes, channelwise, keeps_shape
from normfuse.passes.affine.enclosed import enclosed
from normfuse.passes.patterns.known import dtype_of, infer, inherit, is_floating, may_be_floating

__all__ = ["Expose"]

Number = Constant | float

_HUGE = 1e30  # what a mask adds


def batch_norm_is_affine(op: Op) -> Value | None:
    """γ (x − μ) / √(σ² + ε) + β  =  s x + t,   s = γ / √(σ² + ε),   t = β − s μ"""
    match op:
        case BatchNorm(training=True) | BatchNorm(mean=None) | BatchNorm(var=None):
            raise Refuse("uses batch statistics, which are not constants", remedy="train with track_running_stats=True")
        case InstanceNorm(use_input_stats=True):
            raise Refuse("uses the statistics of each instance, which are not constants")
        case BatchNorm(x, gamma, beta, Constant() as mean, Constant() as var, eps=eps):
            pass
        case InstanceNorm(x, gamma, beta, Constant() as mean, Constant() as var, eps=eps):
            pass
        case _:
            return None
    if x.rank is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    s = (var + eps).rsqrt()
    s = s if gamma is None else gamma * s
    t = -(s * mean) if beta is None else beta - s * mean
    return Affine(x, channelwise(s, 1, x.rank), channelwise(t.cast(s.dtype), 1, x.rank))


def norm_is_core_and_affine(op: Op) -> Value | None:
    """γ N(x) + β  with N the normalization itself, for LayerNorm, RMSNorm (β = 0) and GroupNorm"""
    match op:
        case LayerNorm(x, shape, Constant() as gamma, beta, eps):
            return Affine(LayerNorm(x, shape, None, None, eps), gamma, _number(0.0, gamma.dtype) if beta is None else beta)
        case LayerNorm(x, shape, None, Constant() as beta, eps):
            return Affine(LayerNorm(x, shape, None, None, eps), _number(1.0, beta.dtype), beta)
        case RmsNorm(x, shape, Constant() as gamma, eps):
            return Affine(RmsNorm(x, shape, None, eps), gamma, _number(0.0, gamma.dtype))
        case GroupNorm(x, groups, gamma, beta, eps) if gamma is not None or beta is not None:
            if x.rank is None:
                raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
            some = gamma if gamma is not None else beta
            assert some is not None
            s = _number(1.0, some.dtype) if gamma is None else gamma
            t = _number(0.0, some.dtype) if beta is None else beta
            return Affine(GroupNorm(x, groups, None, None, eps), channelwise(s, 1, x.rank), channelwise(t, 1, x.rank))
        case _:
            return None


def constant_arithmetic_is_affine(op: Op) -> Value | None:
    """x ⊙ c,  x / c,  x + c,  x − c,  c − x   for a constant c that varies along one axis at most"""
    parts = _parts(op)
    if parts is None:
        return None
    x, c, s, t = parts
    if not _vector(c, x, op):
        return None
    dtype = dtype_of(x) or (c.dtype if isinstance(c, Constant) else torch.get_default_dtype())
    s, t = (v.cast(dtype) if isinstance(v, Constant) else _number(v, dtype) for v in (s, t))
    return Affine(x, s, t)


def _parts(op: Op) -> tuple[Value, Number, Number, Number] | None:
    """x, c, s, t with op = s x + t, for arithmetic on a value x and a constant c."""
    match op:
        case Mul(Value() as x, Constant() | float() | int() as c) | Mul(Constant() | float() | int() as c, Value() as x):
            return x, c, c, 0.0
        case Div(Value() as x, Constant() as c) if c.dtype.is_floating_point and bool(c.value.all()):
            return x, c, c.reciprocal(), 0.0
        case Div(Value() as x, float() | int() as c) if c != 0:
            return x, c, 1.0 / c, 0.0
        case Add(Value() as x, Constant() | float() | int() as c) | Add(Constant() | float() | int() as c, Value() as x):
            return x, c, 1.0, c
        case Sub(Value() as x, Constant() | float() | int() as c):
            return x, c, 1.0, -c
        case Sub(Constant() | float() | int() as c, Value() as x):
            return x, c, -1.0, c
        case _:
            return None


def _vector(c: Number, x: Value, op: Op) -> bool:
    """Is c a finite scalar or vector, so that the result has shape and dtype of x? Anything else is a table or a mask.

    Raises:
        Refuse: the shape or the dtype of x is not known; an integer would be promoted.
    """
    if not may_be_floating(x) or (isinstance(c, bool) if not isinstance(c, Constant) else not c.dtype.is_floating_point):
        return False
    if isinstance(c, Constant):
        if len(axes(c)) > 1 or not keeps_shape(c, x):
            return False
        if dtype_of(x) is not None and dtype_of(x) != (dtype_of(op) or c.dtype):
            return False
    elif abs(c) >= _HUGE:
        return False
    if not is_floating(x):
        raise Refuse("dtype unknown: integers would be promoted", remedy=PASS_INPUTS)
    return True


def _number(value: float, dtype: torch.dtype) -> Constant:
    """A single number, to be stored in `dtype`."""
    return Constant.of(torch.tensor([value], dtype=torch.float64)).cast(dtype)


class Expose(Pass):
    """Static normalizations become y = s x + t: BatchNorm, and the γ, β of every norm, LayerScale, constant gains.

    A change of form only, which `realise` takes back where nothing came of it; so nothing is reported as applied.
    """

    name = "expose"
    rules = (batch_norm_is_affine, norm_is_core_and_affine, constant_arithmetic_is_affine)
    depth = 2

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        infer(graph)
        mixed = len({c.dtype for c in graph.constants.values() if c.dtype.is_floating_point}) > 1
        for node in graph:
            found = work.found(self.rule, node, partial(self._exposed, graph, node, mixed))
            if found is not None and work.permits(found.rule, node):
                new = graph.replace(node, found.value)
                new.meta["origin"] = graph.view(node, 2)
                inherit(new, node)
        work.refused += enclosed(graph)

    def _exposed(self, graph: Graph, node: fx.Node, mixed: bool) -> Change | None:
        """The change, unless a constant might promote the value: in a model of one dtype it does not, whatever the input is.

        Args:
            mixed: the model has constants of several floating dtypes.
        """
        found, op = self.change(graph, node), graph.view(node, 2)
        if not mixed or found is None or not isinstance(op, Op):
            return found
        match _parts(op):
            case x, Constant() as c, _, _ if c.ndim and dtype_of(x) is None:
                with under(constant_arithmetic_is_affine.__name__):
                    raise Refuse("dtype unknown: a constant of another dtype might promote it", remedy=PASS_INPUTS)
        return found
