"""New nodes in an ONNX graph."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Build", "Numbers", "Shared", "Size", "const_of", "dims", "given", "module_of", "same_size", "take_over"]

Size = int | str
Numbers = npt.NDArray[Any]
"""What a constant holds."""
Shared = dict[Any, Any]
"""What several places of a graph need, once, by a key that says what it is."""
_CONSTANTS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


class Build:
    """Adds nodes in front of `before`; they inherit its place in the module tree.

    A value that several places need (a mask) is built once: `shared` keeps it by key.
    """

    def __init__(self, model: ir.Model, before: ir.Node, shared: Shared | None = None) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.graph = model.graph
        self.opset: int = model.opset_imports.get("", 18)
        self.before = before
        self.shared = {} if shared is None else shared

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        dtype: ir.DataType | None = None,
        shape: tuple[Size | None, ...] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """One node; returns its only output."""
        node: ir.Node = self.ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=1)
        node.metadata_props.update(self.before.metadata_props)
        out = node.outputs[0]
        if dtype is not None:
            out.dtype = dtype
        if shape is not None:
            out.shape = self.ir.Shape(shape)
        self.graph.insert_before(self.before, [node])
        return out

    def const(self, array: npt.ArrayLike) -> ir.Value:
        """An initializer holding `array`."""
        array = np.asarray(array)
        key = ("const", array.dtype.str, array.shape, array.tobytes()) if array.size <= 16 else None
        if key is not None and key in self.shared:
            known: ir.Value = self.shared[key]
            return known
        n = len(self.graph.initializers)
        while (name := f"const_{n}") in self.graph.initializers:
            n += 1
        tensor: ir.TensorProtocol = self.ir.tensor(array, name=name)
        value: ir.Value = self.ir.Value(name=name, const_value=tensor)
        value.dtype, value.shape = tensor.dtype, tensor.shape  # type: ignore[assignment]
        self.graph.register_initializer(value)
        if key is not None:
            self.shared[key] = value
        return value

    @staticmethod
    def known(value: ir.Value | None) -> Numbers | None:
        """The numpy array of a constant value; None for a computed one."""
        return const_of(value)


def dims(value: ir.Value | None) -> tuple[Size | None, ...] | None:
    """Sizes of `value`: an int, the expression of a symbolic size, or None where it is unknown; None without a rank."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape.dims)


def same_size(a: Size | None, b: Size | None) -> bool:
    """Provably one size."""
    return a is not None and a == b


def module_of(node: ir.Node) -> str:
    """Where in the module tree a translated node stands; its own name if that is not known."""
    names = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return next((n for n in reversed(names[:-1]) if n), None) or node.name or node.op_type


def given(node: ir.Node, i: int = 0) -> ir.Value:
    """An input that the op always has."""
    found = node.inputs[i]
    assert found is not None
    return found


def const_of(value: ir.Value | None) -> Numbers | None:
    """The numpy array of a constant value; None for a computed one."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain:
        return None
    ((name, attribute),) = node.attributes.items()
    if name == "value":
        tensor: ir.TensorProtocol = attribute.value
        return tensor.numpy()
    return np.asarray(attribute.value, _CONSTANTS[name]) if name in _CONSTANTS else None


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` in the place of `old`, as a graph output too."""
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None and old.dtype is not None:
        new.dtype = old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)
