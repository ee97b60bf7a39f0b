"""`isinstance` on traced values.

A traced value is a `torch.fx.Proxy`, so that `isinstance(x, Tensor)` in a model's code would silently take the wrong branch. While
a model is traced, its files see this `isinstance` instead, which answers for the value that will be there at run time or fails.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.kinds import name_of, placeholder_kind
from normfuse.overloads import returns_one_tensor

__all__ = ["isinstance_answered"]


@contextmanager
def isinstance_answered(root: nn.Module) -> Iterator[None]:
    """Inside the block, `isinstance` in the files of the model's own modules knows what traced values stand for."""
    scopes = [scope for scope in _scopes(root) if "isinstance" not in scope]
    for scope in scopes:
        scope["isinstance"] = _isinstance
    try:
        yield
    finally:
        for scope in scopes:
            del scope["isinstance"]


def _scopes(root: nn.Module) -> list[dict[str, Any]]:
    functions = {inspect.unwrap(type(module).forward) for module in root.modules()}
    own = (f for f in functions if not (getattr(f, "__module__", None) or "").startswith("torch."))
    return list({id(scope): scope for f in own if (scope := getattr(f, "__globals__", None)) is not None}.values())


def _isinstance(value: Any, kinds: Any) -> bool:
    if not builtins.isinstance(value, fx.Proxy):
        return builtins.isinstance(value, kinds)
    found = _type(value.node)
    if found is None:
        raise fx.proxy.TraceError(f"the type of {value.node.name} is not known")
    return issubclass(found, kinds)


def _type(node: fx.Node) -> type | None:
    """The Python type of a value at run time, None when it is open."""
    match node.op:
        case "placeholder":
            kind = placeholder_kind(node)
            return Tensor if kind == "tensor" or (kind is None and node.type is None and not node.args) else None
        case "get_attr":
            return Tensor
        case "call_method":
            return _method_type(node)
        case "call_function":
            return _function_type(node)
    return None


def _method_type(node: fx.Node) -> type | None:
    if not builtins.isinstance(node.args[0], fx.Node) or _type(node.args[0]) is not Tensor:
        return None
    if node.target == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    return Tensor if returns_one_tensor(str(node.target)) else None


def _function_type(node: fx.Node) -> type | None:
    if node.target is builtins.getattr:
        is_shape = node.args[1] == "shape" and _type(node.args[0]) is Tensor  # type: ignore[arg-type]
        return torch.Size if is_shape else None
    if (name := name_of(node.target)) is not None:
        return Tensor if returns_one_tensor(name) else None
    if getattr(node.target, "__module__", "") == "torch.nn.functional":
        return Tensor
    types = {_type(a) if builtins.isinstance(a, fx.Node) else type(a) for a in node.args}
    if node.target is operator.getitem:
        first = _type(node.args[0])  # type: ignore[arg-type]
        return int if first is torch.Size and builtins.isinstance(node.args[1], int) else first if first is Tensor else None
    if getattr(node.target, "__module__", "") != "_operator" or None in types:
        return None
    return Tensor if Tensor in types else int if types == {int} and node.target is not operator.truediv else None
