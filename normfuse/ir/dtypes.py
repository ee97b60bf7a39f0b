"""The dtypes that a value may take, as far as a graph without shapes says: `node.meta["dtypes"]`, a set.

Nobody has said whether an input is an image of bytes or of floats, but a convolution takes the dtype of its weight only, so that
its input is known, and what that input is made of. Tables hold what operators with weights demand; every other operator is run on
small tensors without data, one for each combination of dtypes, and says itself what it returns and what it does not take.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.ir import operators
from normfuse.ir.operators import CONVOLUTIONS, DROPOUTS, INTERPOLATIONS, PARTS, POOLS

__all__ = ["ALL", "FLOATS", "default_eps", "dtype_of", "floating", "possible", "propagate_dtypes"]

aten = torch.ops.aten

_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Real and floating."""
ALL = _INTEGERS | FLOATS | {torch.complex32, torch.complex64, torch.complex128}
"""What a value may be of which nothing is known."""

Dtypes = frozenset[torch.dtype]
_Trial = tuple[Any, tuple[torch.dtype, ...]]  # what a call returned for these dtypes of its tensors

# all tensors, and the result, have one dtype
_EQUAL = CONVOLUTIONS | {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention", "bilinear"}
# what the first tensor may be; the result is like it
_NORMS = dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "instance_norm"), FLOATS) | {"rms_norm": ALL - _INTEGERS}
# the result is like the first tensor, whatever the sizes
_SAME = {
    *DROPOUTS,
    *POOLS,
    *INTERPOLATIONS,
    *("clone", "roll", "flip", "repeat", "repeat_interleave", "tile", "pad"),
    *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "index_select"),
    *("gather", "masked_fill", "index", "rot90", "tril", "triu", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("relu", "neg", "im2col", "col2im", "unfold", "take_along_dim", "index_fill", "scatter"),
}
_PARTS = PARTS | {"unbind"}
_REINTERPRETED = {"view_as_real", "view_as_complex", "real", "imag"}
_SIZE, _RANK = 12, 4  # of the tensors without data, where nothing else is known
_MOST = 700  # combinations of dtypes that are tried

_tried: dict[Any, list[_Trial]] = {}


def floating(node: fx.Node) -> bool | None:
    """Is the value a tensor of real floating-point numbers? None where that is open until there are inputs."""
    found = possible(node)
    return True if found <= FLOATS else False if not found & FLOATS else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a value, None where several are possible."""
    found = possible(node)
    return next(iter(found)) if len(found) == 1 else None


def possible(node: fx.Node) -> Dtypes:
    """The dtypes that the value of a node may take: its own where it was captured with inputs, else what follows from the graph."""
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return frozenset({val.dtype})
    known: Dtypes | None = node.meta.get("dtypes")
    return known if known is not None else _forward(node)


def default_eps(dtype: torch.dtype) -> float:
    """What `rms_norm` adds with eps=None: the epsilon of the dtype that it computes in, which is float32 for the half ones."""
    return torch.finfo(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype).eps


def propagate_dtypes(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Fill in `meta["dtypes"]` for every node that may be a tensor, forward and backward until nothing changes.

    What stands there already, because a layer says what it takes, is kept.
    """
    for node in graph.nodes:
        value: Any = root if node.op == "get_attr" else None
        for name in str(node.target).split(".") if value is not None else ():
            value = getattr(value, name, None)
        node.meta["dtypes"] = frozenset({value.dtype}) if isinstance(value, Tensor) else node.meta.get("dtypes", ALL)
    changed = True
    while changed:
        forward = [_narrow(node, _forward(node)) for node in graph.nodes if node.op != "get_attr"]
        backward = [_narrow(x, dtypes) for node in reversed(graph.nodes) for x, dtypes in _backward(node)]
        changed = any(forward) or any(backward)
    return graph


def _narrow(node: fx.Node, dtypes: Dtypes) -> bool:
    """Only those stay that were possible before; none left means that no input can pass, about which nothing need be known."""
    before = node.meta["dtypes"]
    node.meta["dtypes"] = before & dtypes or before
    return bool(node.meta["dtypes"] != before)


# -- what follows for results ---------------------------------------------------------------------------------------------------


def _forward(node: fx.Node) -> Dtypes:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _part(node.args[0], node.args[1])
    if getattr(node.target, "__name__", "") == "affine":
        return _results(node, aten.add.Tensor)
    name = _name(node)
    if not name:
        return ALL
    if (stated := _stated(node)) is not None:
        return stated
    tensors = _tensors(node)
    if name in _EQUAL and tensors:
        return _common(tensors[:3])  # behind them stands a mask of attention
    if name == "embedding":
        return possible(tensors[0])
    if name in _NORMS:
        return possible(tensors[0]) & _NORMS[name] or _NORMS[name]
    if _is_same(node, name):
        return possible(tensors[0]) if tensors else ALL
    return _results(node, node.target)


def _stated(node: fx.Node) -> Dtypes | None:
    """What a call says itself: `dtype=`, or a tensor whose dtype it takes."""
    if _name(node) == "type_as" or node.target is aten.to.other:
        return possible(node.args[1])  # type: ignore[arg-type]
    schema = node.target._schema  # type: ignore[union-attr]
    place = next((i for i, a in enumerate(schema.arguments) if a.name in ("dtype", "output_dtype")), None)
    if place is None:
        return None
    given = node.args[place] if place < len(node.args) else node.kwargs.get(schema.arguments[place].name)
    return None if given is None else frozenset({given}) if isinstance(given, torch.dtype) else ALL


def _is_same(node: fx.Node, name: str) -> bool:
    """A view, or one of the operators that only move values."""
    schema = node.target._schema  # type: ignore[union-attr]
    alias = schema.returns[0].alias_info if len(schema.returns) == 1 else None
    view = alias is not None and not alias.is_write and name not in _REINTERPRETED and node.target is not aten.view.dtype
    return name in _SAME or name in _PARTS or view


def _part(source: fx.Node, index: Any) -> Dtypes:
    """One of several results."""
    name = _name(source)
    if name in _PARTS:
        return possible(source.args[0])  # type: ignore[arg-type]
    if not name or not isinstance(index, int):
        return ALL
    found = [out[index] for out, _ in _trials(source, source.target) if isinstance(out, tuple) and -len(out) <= index < len(out)]
    return frozenset(found) or ALL


def _results(node: fx.Node, target: Any) -> Dtypes:
    return frozenset(out for out, _ in _trials(node, target) if isinstance(out, torch.dtype)) or ALL


# -- what follows for arguments -------------------------------------------------------------------------------------------------


def _backward(node: fx.Node) -> Iterator[tuple[fx.Node, Dtypes]]:
    name, out = _name(node), node.meta["dtypes"]
    tensors = _tensors(node)
    if not name or not tensors:
        return
    if name in _EQUAL:
        yield from ((x, _common(tensors[:3]) & out) for x in tensors[:3])
    elif name in _NORMS:
        yield tensors[0], _NORMS[name] & out
    elif _stated(node) is None and name != "embedding":
        if _is_same(node, name):
            if name not in _PARTS:
                yield tensors[0], out
        elif len({*tensors}) == len(tensors):
            passed = [
                dtypes for result, dtypes in _trials(node, node.target) if not isinstance(result, torch.dtype) or result in out
            ]
            if passed:
                yield from ((x, frozenset(d[i] for d in passed)) for i, x in enumerate(tensors))


def _common(tensors: Iterable[fx.Node]) -> Dtypes:
    found = ALL
    for x in tensors:
        found &= possible(x)
    return found


# -- trials ---------------------------------------------------------------------------------------------------------------------


def _trials(node: fx.Node, target: Any) -> list[_Trial]:
    """What the call returns for every combination of dtypes that its tensors may have; nothing where it cannot be tried."""
    tensors = _tensors(node)
    sets = [sorted(possible(x), key=str) for x in tensors]
    ranks = [_ranks(x, alone=len(tensors) == 1) for x in tensors]
    combinations = 1
    for dtypes, several in zip(sets, ranks, strict=True):
        combinations *= len(dtypes) * len(several)
    if combinations > _MOST:
        return []
    place = {x: i for i, x in enumerate(tensors)}
    stand: Any = lambda n: _Stand(place.get(n, -1))  # noqa: E731 - map_arg has no type for it
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), stand)
    if not tensors and any(a.name == "device" for a in target._schema.arguments):
        kwargs = {**kwargs, "device": "meta"}
    args = (args[:2], {}) if getattr(node.target, "__name__", "") == "affine" else (args, kwargs)
    key = (target, repr(args), tuple(map(tuple, sets)), tuple(ranks), torch.get_default_dtype())
    if key not in _tried:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _tried[key] = list(_try(target, args, sets, ranks))
    return _tried[key]


class _Stand:
    """The place of a tensor among those of the call; −1, the last place, for a number that is computed."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"%{self.place}"


def _try(target: Any, arguments: Any, sets: list[list[torch.dtype]], ranks: list[tuple[int, ...]]) -> Iterator[_Trial]:
    numbers = (1, 1.0) if "%-1" in repr(arguments) else (1,)
    for dtypes in itertools.product(*sets):
        for *shape, number in itertools.product(*ranks, numbers):
            made = [torch.empty((_SIZE,) * int(r), dtype=d, device="meta") for d, r in zip(dtypes, shape, strict=True)]
            args, kwargs = _filled(arguments, [*made, number])
            try:
                out = target(*args, **kwargs)
            except Exception:  # not for these dtypes, or not for these sizes
                continue
            found = tuple(o.dtype for o in out) if isinstance(out, tuple | list) else getattr(out, "dtype", None)
            yield found, dtypes


def _filled(value: Any, made: list[Any]) -> Any:
    if isinstance(value, _Stand):
        return made[value.place]
    if isinstance(value, dict):
        return {k: _filled(v, made) for k, v in value.items()}
    return type(value)(_filled(v, made) for v in value) if isinstance(value, tuple | list) else value


def _ranks(x: fx.Node, *, alone: bool) -> tuple[int, ...]:
    """Numbers of dimensions to try: promotion asks whether a tensor has none."""
    val = x.meta.get("val")
    rank = val.ndim if isinstance(val, Tensor) else x.meta.get("rank")
    return (rank,) if rank is not None else (_RANK,) if alone else (0, _RANK)


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Arguments that may be tensors, each once, in order."""
    return [x for x in node.all_input_nodes if x.meta.get("kind") not in ("number", "size", "dtype", "device")]


def _name(node: fx.Node) -> str:
    return operators.name(node.target) if node.op == "call_function" else ""
