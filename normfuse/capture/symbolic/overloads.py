"""Which ATen overload a PyTorch name means, and its arguments in the form that `torch.export` writes them.

`torch.f`, `Tensor.f` and `aten::f` share their names and, up to numpy spellings, the names of their arguments, so one binder
over the schemas stands in for a table of functions. What export does to arguments, and so what is done here: positional unless
keyword-only, ints as lists where the schema has a list, ints as floats where it has a float, trailing defaults dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["Kind", "KindOf", "is_tensor_position", "nodes_in", "resolve", "returns_one_tensor"]

Kind = str | None
"""What a value is at run time: tensor, tensors (list or tuple of them), number, size, dtype, device; None when unknown."""

KindOf = Callable[[fx.Node], Kind]

# torch's own parser takes these spellings too
_SPELLINGS = {"input": "self", "x": "self", "a": "self", "x1": "self", "axis": "dim", "keepdims": "keepdim", "x2": "other"}
# torch's own parser wraps a number into a tensor for these; all others have an overload for numbers
_NUMBERS_AS_TENSORS = {
    f"{name}{suffix}" for name in ("add", "sub", "mul", "div", "floor_divide", "true_divide") for suffix in ("", "_")
}
_NAMED_TYPES = {torch.dtype: "ScalarType", torch.device: "Device", torch.layout: "Layout", torch.memory_format: "MemoryFormat"}
_MISSING = object()
# cost of taking a value whose kind is unknown; a conversion costs 1
_UNKNOWN = 100
# cost of a list that may also be a number: the schema would have to say which
_OPEN = 10_000


def packet(name: str) -> Any:
    """`torch.ops.aten.<name>`, or None when there is no such op."""
    found = getattr(torch.ops.aten, name, None)
    return found if isinstance(found, torch._ops.OpOverloadPacket) else None


def resolve(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], kind: KindOf, *, method: bool = False
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """The overload of `aten::name` that takes these arguments, with the arguments as export writes them.

    Args:
        name: of the function or tensor method.
        args, kwargs: as the model's code passes them.
        kind: what an argument that is a node stands for.
        method: is it a method of a tensor? Only there PyTorch takes a list as separate arguments, as in `x.view(2, 3)`, and only
            where the list is all that the method takes.

    Returns None when no overload does, when it takes no tensor (arithmetic on sizes stays arithmetic), or when a value whose
    kind is unknown leaves the choice open.
    """
    numbers = name in _NUMBERS_AS_TENSORS
    found = []
    for overload in _overloads(name):
        if numbers and overload._overloadname.startswith("Scalar"):
            continue
        bound = _bind(overload._schema, args, kwargs, kind, numbers=numbers, method=method)
        if bound is not None:
            found.append((bound[0], overload, *bound[1:]))
    found.sort(key=lambda f: f[0])
    if not found or found[0][0] >= (_UNKNOWN if len(found) > 1 else _OPEN):
        return None
    return found[0][1:]


@functools.cache
def is_tensor_position(name: str, position: int | str) -> bool:
    """Must this argument of `aten::name` be a tensor (or a list of tensors), whatever the overload?"""
    found = [_argument(overload._schema, position) for overload in _overloads(name)]
    return bool(found) and all(a is not None and str(a.real_type) in ("Tensor", "Optional[Tensor]", "List[Tensor]") for a in found)


@functools.cache
def returns_one_tensor(name: str) -> bool:
    """Is the result of `aten::name` one tensor, whatever the overload?"""
    return bool(found := _overloads(name)) and all([str(r.real_type) for r in o._schema.returns] == ["Tensor"] for o in found)


def _argument(schema: Any, position: int | str) -> Any:
    if isinstance(position, int):
        return schema.arguments[position] if position < len(schema.arguments) else None
    wanted = _SPELLINGS.get(position, position)
    return next((a for a in schema.arguments if a.name in (position, wanted)), None)


@functools.cache
def _overloads(name: str) -> tuple[Any, ...]:
    """Overloads of `aten::name` from tensors to tensors, without the `out=`, named-dimension and TorchScript forms."""
    found = packet(name)
    if found is None:
        return ()
    # upsample ops: torch.nn.functional calls the form with lists of scales
    keys = sorted(found.overloads(), key=lambda key: key != "vec")
    overloads = (getattr(found, key) for key in keys)
    return tuple(o for o in overloads if _usable(o._schema))


def _usable(schema: Any) -> bool:
    types = [str(a.real_type) for a in schema.arguments]
    returns = {str(r.real_type) for r in schema.returns}
    if any(a.is_out for a in schema.arguments) or not returns or returns - {"Tensor", "List[Tensor]"}:
        return False
    foreign = any("Dimname" in t or "Dict" in t or t in ("t", "List[t]") for t in types) or "hacked_twin" in schema.overload_name
    return not foreign and any("Tensor" in t for t in types)


def _bind(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any], kind: KindOf, *, numbers: bool, method: bool) -> Any:
    """(cost, args, kwargs) or None; the cost counts conversions, so that `int` wins over `int[]` for an int."""
    positional = [a for a in schema.arguments if not a.kwarg_only]
    given = _spell(schema, kwargs)
    if given is None:
        return None
    values = list(args)
    if method and len(positional) == 2 and _is_list(positional[1]) and _are_items(values[1:], kind):
        # one number is taken as it is where the schema turns it into a list by itself
        values = values if len(values) == 2 and positional[1].N is not None else [values[0], values[1:]]
    if len(values) > len(positional):
        return None
    named = {a.name: v for a, v in zip(positional, values, strict=False)}
    if named.keys() & given.keys():
        return None
    named |= given
    cost, bound = 0, {}
    for a in schema.arguments:
        value = named.get(a.name, _MISSING)
        if value is _MISSING and not a.has_default_value():
            return None
        fits = (0, a.default_value) if value is _MISSING else _fit(value, a, kind, numbers=numbers)
        if fits is None:
            return None
        cost, bound[a.name] = cost + fits[0], fits[1]
    keywords = {a.name: bound[a.name] for a in schema.arguments if a.kwarg_only and not _is_default(a, bound[a.name])}
    while positional and _is_default(positional[-1], bound[positional[-1].name]):
        positional.pop()
    return cost, tuple(bound[a.name] for a in positional), keywords


def _spell(schema: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Keyword arguments under the names of the schema; None when one of them is not in it."""
    names = {a.name for a in schema.arguments}
    spelt = {key if key in names else _SPELLINGS.get(key, key): value for key, value in kwargs.items()}
    return spelt if spelt.keys() <= names and len(spelt) == len(kwargs) else None


def _is_default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value():
        return False
    default = argument.default_value
    return type(default) is type(value) and not isinstance(value, fx.Node) and bool(default == value)


def _is_list(argument: Any) -> bool:
    return str(argument.real_type) in ("List[int]", "List[SymInt]", "Optional[List[int]]", "Optional[List[SymInt]]")


def _are_items(values: Sequence[Any], kind: KindOf) -> bool:
    """Are these the items of a list that were passed one by one? One value alone of unknown kind may be the list itself."""
    alone = values[0] if len(values) == 1 else None
    return bool(values) and all(_is_int(v, kind) for v in values) and not (isinstance(alone, fx.Node) and kind(alone) is None)


def _is_int(value: Any, kind: KindOf) -> bool:
    if isinstance(value, fx.Node):
        return kind(value) in (None, "number")
    return isinstance(value, int) and not isinstance(value, bool)


def _fit(value: Any, argument: Any, kind: KindOf, *, numbers: bool) -> tuple[int, Any] | None:
    """(cost, value as the schema has it), or None when the argument does not take the value."""
    expected = str(argument.real_type)
    if expected.startswith("Optional["):
        if value is None:
            return 0, None
        expected = expected[len("Optional[") : -1]
    if expected.startswith("List["):
        return _fit_list(value, argument, expected[len("List[") : -1], kind)
    is_number = isinstance(value, int | float | complex)
    if isinstance(value, fx.Node):
        is_number, fits = kind(value) == "number", _fit_node(kind(value), value, expected)
        if fits is not None or expected != "Tensor":
            return fits
    match expected:
        case "Tensor":
            return (1, value) if numbers and is_number and argument.name == "other" else None
        case "int" | "SymInt":
            return (0, value) if _is_int(value, kind) else None
        case "float":
            return (0, float(value)) if is_number and not isinstance(value, bool | complex) else None
        case "number" | "Scalar":
            return (0, value) if is_number else None
        case "bool":
            return (0, value) if isinstance(value, bool) else None
        case "str":
            return (0, value) if isinstance(value, str) else None
        case _:
            return (0, value) if expected == _NAMED_TYPES.get(type(value)) else None


def _fit_node(found: Kind, node: fx.Node, expected: str) -> tuple[int, Any] | None:
    wanted = {"Tensor": "tensor", "ScalarType": "dtype", "Device": "device", "bool": "number", "str": "text"}.get(
        expected, "number"
    )
    if found is None:
        return _UNKNOWN, node
    return (0, node) if found == wanted else None


def _fit_list(value: Any, argument: Any, element: str, kind: KindOf) -> tuple[int, Any] | None:
    if isinstance(value, fx.Node):
        found = kind(value)
        whole = {"Tensor": "tensors", "int": "size", "SymInt": "size"}.get(element)
        if found is not None and found == whole:
            return 0, value
        if found is None:
            return _OPEN, value
    if isinstance(value, torch.Size | tuple | list):
        items = [_fit_item(v, element, kind) for v in value]
        return None if None in items else (sum(i[0] for i in items if i), [i[1] for i in items if i])
    if argument.N is not None and (item := _fit_item(value, element, kind)) is not None:
        return item[0] + 1, [item[1]] * argument.N
    return None


def _fit_item(value: Any, element: str, kind: KindOf) -> tuple[int, Any] | None:
    if element.startswith("Optional[") and value is None:
        return 0, None
    element = element.removeprefix("Optional[").removesuffix("]")
    if isinstance(value, fx.Node):
        return _fit_node(kind(value), value, element)
    if element in ("int", "SymInt"):
        return (0, value) if _is_int(value, kind) else None
    if element == "float":
        return (0, float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return (0, value) if element == "bool" and isinstance(value, bool) else None


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """Nodes in a value, inside lists and tuples as well."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from nodes_in(item)
