"""The Python type that a traced value will have at run time, as far as the graph says it."""

from __future__ import annotations

import builtins
import operator

import torch
from torch import Tensor, fx

from normfuse.capture.symbolic.kinds import name_of, placeholder_kind
from normfuse.capture.symbolic.overloads import returns_one_tensor

__all__ = ["type_of"]


_ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size,
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
    "ndim": int,
    **dict.fromkeys(("is_cuda", "is_meta", "requires_grad", "is_sparse", "is_quantized"), bool),
    **dict.fromkeys(("T", "mT", "H", "mH", "data", "real", "imag"), Tensor),
}


def type_of(node: fx.Node) -> type | None:
    """The Python type of the value of `node`, None when it is open."""
    if "type" not in node.meta:
        node.meta["type"] = _type(node)
    return node.meta["type"]  # type: ignore[no-any-return]


def _type(node: fx.Node) -> type | None:
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
    if not isinstance(node.args[0], fx.Node) or type_of(node.args[0]) is not Tensor:
        return None
    if node.target == "size":
        return torch.Size if len(node.args) + len(node.kwargs) == 1 else int
    if node.target in ("dim", "numel", "nelement", "ndimension", "element_size"):
        return int
    return Tensor if returns_one_tensor(str(node.target)) else None


def _function_type(node: fx.Node) -> type | None:
    if node.target is builtins.getattr:
        is_tensor = type_of(node.args[0]) is Tensor  # type: ignore[arg-type]
        return _ATTRIBUTES.get(str(node.args[1])) if is_tensor else None
    if (name := name_of(node.target)) is not None:
        return Tensor if returns_one_tensor(name) else None
    if getattr(node.target, "__module__", "") == "torch.nn.functional":
        return Tensor
    types = {type_of(a) if isinstance(a, fx.Node) else type(a) for a in node.args}
    if node.target is operator.getitem:
        first = type_of(node.args[0])  # type: ignore[arg-type]
        return int if first is torch.Size and isinstance(node.args[1], int) else first if first is Tensor else None
    if getattr(node.target, "__module__", "") != "_operator" or None in types:
        return None
    return Tensor if Tensor in types else int if types == {int} and node.target is not operator.truediv else None
