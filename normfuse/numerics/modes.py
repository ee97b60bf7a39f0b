"""Other arithmetic under a model that does not know of it: in float64, or with every rounding stirred.

Both are modes of PyTorch's dispatcher. They see each operator that runs, in a module as in a graph, and are local to the thread,
which `torch.set_default_dtype` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NARROW", "Float64", "NoFloat64", "Stirred", "Untouched", "WritesWeights", "widened"]

aten = torch.ops.aten
hops = torch.ops.higher_order

NARROW = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128, torch.complex32: torch.complex128,
}  # fmt: skip
"""Floating dtypes that a float64 run widens, and what to."""

_BITS = {aten.view.dtype}  # reads the bits of a dtype
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


_BOUNDED = {aten.sigmoid, aten.tanh, aten.erf, aten.sin, aten.cos, aten._softmax, aten.hardsigmoid}
"""Approximated with an error that is relative to their range, [-1, 1], not to their value."""


_MOVES = {
    aten.clone, aten._to_copy, aten.copy, aten.cat, aten.stack, aten.index, aten.index_select, aten.gather, aten.embedding,
    aten.constant_pad_nd, aten.roll, aten.flip, aten.repeat, aten.neg, aten.abs, aten.relu, aten.sort, aten.topk, aten.max,
    aten.min, aten.lift_fresh_copy, aten.full, aten.zeros, aten.ones, aten.scalar_tensor, aten.empty, aten.arange,
    aten.where, aten.masked_fill,
}  # fmt: skip
"""Results are values that went in: nothing rounds."""


class NoFloat64(Exception):
    """An operator has no float64 form; the message names it."""


class WritesWeights(Exception):
    """A model writes to its weights while it runs."""


def widened(value: Any) -> Any:
    """A narrow tensor in float64 (complex128), a narrow dtype as the wide one, anything else as it is."""
    if isinstance(value, torch.dtype):
        return NARROW.get(value, value)
    return value.to(NARROW[value.dtype]) if isinstance(value, Tensor) and value.dtype in NARROW else value


class Float64(TorchDispatchMode):
    """While it is on, operators compute in float64: narrow operands are widened, and so are dtypes that a model asks for.

    Weights are widened one at a time, as they are read, so that no wide copy of a model is made. An operator between integers that
    gives a float (7 / 2) computes in float64 too.

    Raises:
        NoFloat64: an operator reads bits, writes into a narrow tensor, or runs a region that is not known here.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._region(func, args)
        if func is aten._assert_tensor_metadata.default:
            return None
        if func in _BITS:
            raise NoFloat64(f"{func} reads the bits of a dtype")
        if any(_is_narrow(v) for v in _written(func, args, kwargs)):
            raise NoFloat64(f"{func} writes into a tensor that is not float64")
        args, kwargs = pytree.tree_map(_wide, (args, kwargs))
        random = torch.Tag.nondeterministic_seeded in func.tags  # draws what the model draws, then widens it
        if not random and _makes_floats(func, args, kwargs):
            kwargs["dtype"] = torch.float64
        out = func(*args, **kwargs)
        if not _narrow(out):
            return out
        told = random or func.namespace != "aten"  # the integers of a library's own operators are codes or indices
        return pytree.tree_map(_wide, out if told else _from_integers(func, args, kwargs))

    def _region(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func is hops.cond:
            pred, yes, no, operands = args
            return self._on(yes if pred else no, operands)
        if func is hops.wrap_with_autocast:
            return self._on(args[4], args[5:])  # its casts would be widened anyway
        if func is hops.wrap_with_set_grad_enabled:
            return self._on(args[1], args[2:])
        raise NoFloat64(f"{func.name()} is a region of another kind")

    def _on(self, body: Any, operands: Any) -> Any:
        with self:
            return body(*operands)


class Stirred(TorchDispatchMode):
    """While it is on, every result of arithmetic moves by up to one rounding: what another, equally good, runtime might compute.

    Args:
        seed: of the generator that draws the moves.
        unit: a rounding, relative; None for that of each result's dtype.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int, unit: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._unit = unit

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator):
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if (
            func.overloadpacket in _MOVES
            or torch.Tag.nondeterministic_seeded in func.tags
            or any(r.alias_info is not None for r in func._schema.returns)
        ):
            return out
        return pytree.tree_map(lambda v: self._stir(v, bounded=func.overloadpacket in _BOUNDED), out)

    def _stir(self, value: Any, *, bounded: bool) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel() or type(value) not in _PLAIN:
            return value
        try:
            unit = self._unit or torch.finfo(value.dtype).eps
        except TypeError:  # no arithmetic in that dtype
            return value
        drawn = torch.rand(value.shape, generator=self._generator, dtype=torch.float32, device="cpu")
        move = 2 * drawn.to(value.device, value.dtype) - 1
        return torch.where(value.isfinite(), value + unit * move * (1 if bounded else value), value)


class Untouched(TorchDispatchMode):
    """While it is on, an operator that would write to one of these tensors, or to a view of one, raises instead.

    Raises:
        WritesWeights: before anything is written.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = {_storage(t) for t in tensors} - {None}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.HigherOrderOperator) and func._schema.is_mutable:
            for value in _written(func, args, kwargs):
                if _storage(value) in self._held:
                    raise WritesWeights(f"{func} writes to a weight")
        return func(*args, **kwargs)


def _storage(value: Any) -> int | None:
    try:
        return value.untyped_storage().data_ptr() or None
    except (AttributeError, NotImplementedError, RuntimeError):  # sparse, opaque: no storage of its own
        return None


def _wide(value: Any) -> Any:
    return widened(value) if not isinstance(value, Tensor) or type(value) in _PLAIN else value


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in NARROW


def _narrow(out: Any) -> bool:
    return any(_is_narrow(v) for v in pytree.tree_leaves(out))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that an operator writes to; a batch norm writes to its statistics only in training."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    bound = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    if bound.get("training") is False or bound.get("use_input_stats") is False:
        return []
    return [
        v
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
        for v in pytree.tree_leaves(bound.get(a.name))
    ]


def _makes_floats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Is it a factory that was not told a dtype and would take the default one?"""
    if kwargs.get("dtype") is not None or not any(a.name == "dtype" for a in func._schema.arguments):
        return False
    if any(isinstance(v, Tensor) for v in pytree.tree_leaves((args, kwargs))):
        return False
    try:
        made = func(*args, **{**kwargs, "device": "meta", "pin_memory": None} if "device" in kwargs else kwargs)
    except Exception:  # the operator itself says what is wrong
        return False
    return isinstance(made, Tensor) and made.dtype in NARROW


def _from_integers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result in float64 of an operator that makes floats of integers."""

    def as_float(value: Any) -> Any:
        whole = isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        return value.double() if whole else value

    try:
        return func(*pytree.tree_map(as_float, args), **pytree.tree_map(as_float, kwargs))
    except (RuntimeError, TypeError, NotImplementedError, IndexError):  # its integers are indices, or must be integers
        return func(*args, **kwargs)
