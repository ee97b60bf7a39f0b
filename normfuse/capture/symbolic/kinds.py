"""What the values of a traced graph are at run time - tensors, numbers, sizes - as far as the graph itself proves it.

Arithmetic on a tensor and on a size look the same in Python; only the former has an ATen form.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.capture.symbolic.overloads import Kind, is_tensor_position, nodes_in

__all__ = ["attribute_kind", "name_of", "overload_kind", "placeholder_kind", "proven_tensors"]

# methods of plain Python values: a call of one of these does not prove a tensor
_AMBIGUOUS = {name for t in (dict, list, tuple, set, int, float) for name in dir(t)}
_ATTRIBUTES: dict[str, Kind] = {"shape": "size", "dtype": "dtype", "device": "device", "ndim": "number", "requires_grad": "number"}
_NAMESPACES = [getattr(torch._C, name) for name in ("_VariableFunctions", "_nn", "_linalg", "_special", "_fft")]
_ARITHMETIC = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.pow,
    operator.iadd,
    operator.isub,
    operator.imul,
}
_UNARY = {operator.neg, operator.abs, operator.pos}


def name_of(target: Any) -> str | None:
    """The ATen name of a built-in function of torch (`torch.relu`, `torch._C._nn.gelu`); None for anything else."""
    name = getattr(target, "__name__", None)
    if name is None or not any(getattr(space, name, None) is target for space in _NAMESPACES):
        return None
    return str(name)


def placeholder_kind(node: fx.Node) -> Kind:
    """From the annotation of a forward argument."""
    text = node.type if isinstance(node.type, str) else getattr(node.type, "__name__", str(node.type))
    if text in ("int", "float", "bool"):
        return "number"
    optional = str(node.type).replace("torch.Tensor", "Tensor")
    tensor = (
        node.type is Tensor
        or text in ("Tensor", "torch.Tensor")
        or optional in ("Optional[Tensor]", "typing.Optional[Tensor]", "Tensor | None")
    )
    return "tensor" if tensor else None


def attribute_kind(name: str) -> Kind:
    """What an attribute of a tensor gives; None if nobody has said so."""
    return _ATTRIBUTES.get(name)


def overload_kind(overload: torch._ops.OpOverload) -> Kind:
    """What the overload returns."""
    returns = [str(r.real_type) for r in overload._schema.returns]
    if len(returns) > 1 or returns == ["List[Tensor]"]:
        return "tensors"
    return (
        {"Tensor": "tensor", "int": "number", "SymInt": "number", "float": "number", "bool": "number"}.get(returns[0])
        if returns
        else None
    )


def proven_tensors(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that some user reads as a tensor: no other value would get through it."""
    proven: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        match node.op:
            case "call_module":
                proven.update(nodes_in(list(node.args[:1])))
            case "call_method" if node.target not in _AMBIGUOUS:
                _add_operands(str(node.target), node, proven)
            case "call_function" if (name := name_of(node.target)) is not None:
                _add_operands(name, node, proven)
            case "call_function" if isinstance(node.target, torch._ops.OpOverload):
                _add_operands(node.target._schema.name.removeprefix("aten::"), node, proven)
            case "call_function":
                _add_operator(node, proven)
    return proven


def _add_operands(name: str, node: fx.Node, proven: set[fx.Node]) -> None:
    for position, value in (*enumerate(node.args), *node.kwargs.items()):
        if is_tensor_position(name, position):
            proven.update(nodes_in(value))


def _add_operator(node: fx.Node, proven: set[fx.Node]) -> None:
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    if getattr(node.target, "__module__", "") == "torch.nn.functional" or node.target is operator.matmul:
        proven.update(nodes_in(list(node.args[: 2 if node.target is operator.matmul else 1])))
    elif _reads_as_tensor(node):
        proven.update(nodes_in(node.args[0]))
    elif node in proven and (node.target in _UNARY or (node.target in _ARITHMETIC and len(operands) == 1)):
        # tensor = f(x, number): x is the tensor
        proven.update(operands)


def _reads_as_tensor(node: fx.Node) -> bool:
    """`x.shape` and its kin, or `x[:, 0]`: no list and no dictionary takes several indices."""
    attribute = node.target is builtins.getattr and node.args[1] in _ATTRIBUTES
    return attribute or (node.target is operator.getitem and isinstance(node.args[1], tuple))
