"""The nesting of arguments and results, in the releases of PyTorch that spell it differently."""

import dataclasses
from collections import namedtuple
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["children", "named_leaves"]


def children(spec: Any) -> list[Any]:
    """The specs of what a container holds: a method since PyTorch 2.10, an attribute before."""
    found: list[Any] = spec.children() if hasattr(spec, "children") else spec.children_specs
    return found


def named_leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The leaves of nested values in PyTorch's order, each with the keys, fields and positions that lead to it.

    Libraries register their output classes with or without a function for keys; without one, a leaf is called after the key of a
    mapping, the field of a named tuple or of a dataclass, or its position.
    """
    kind = type(value)
    named_tuple = isinstance(value, tuple) and hasattr(value, "_fields")
    known = pytree.SUPPORTED_NODES.get(kind) or (pytree.SUPPORTED_NODES.get(_NAMED) if named_tuple else None)
    if known is None:
        yield path, value
        return
    held, context = known.flatten_fn(value)
    held = list(held)
    for name, inner in zip(_names(value, held, context), held, strict=True):
        yield from named_leaves(inner, (*path, name))


_NAMED: Any = namedtuple  # the function, under which PyTorch keeps all named tuples


def _names(value: Any, held: list[Any], context: Any) -> list[str]:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value._fields)
    if isinstance(value, Mapping):
        # some flatten in another order than they iterate in, and keep the keys as their context
        for keys in (context, list(value)):
            listed = isinstance(keys, (list, tuple)) and len(keys) == len(held)
            if listed and all(k in value and value[k] is v for k, v in zip(keys, held, strict=True)):
                return [str(k) for k in keys]
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        found: list[str] = []
        for v in held:
            name = next((f for f in fields if f not in found and getattr(value, f) is v), None)
            found.append(str(len(found)) if name is None else name)
        return found
    return [str(i) for i in range(len(held))]
