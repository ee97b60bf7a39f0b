"""New nodes in an ONNX graph."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Build", "const_of", "dims", "module_of", "same_size", "take_over"]

Size = int | str
_CONSTANTS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


class Build:
    """Adds nodes in front of `before`; they inherit its place in the module tree.

    A value that several places need (a mask) is built once: `shared` keeps it by key.
    """

    def __init__(self, model: Any, before: Any, shared: dict[Any, Any] | None = None) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.graph = model.graph
        self.opset: int = model.opset_imports.get("", 18)
        self.before = before
        self.shared = {} if shared is None else shared

    def op(
        self,
        op_type: str,
        *inputs: Any,
        domain: str = "",
        dtype: Any = None,
        shape: tuple[Size | None, ...] | None = None,
        **attributes: Any,
    ) -> Any:
        """One node; returns its only output."""
        node = self.ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=1)
        node.metadata_props.update(self.before.metadata_props)
        out = node.outputs[0]
        if dtype is not None:
            out.dtype = dtype
        if shape is not None:
            out.shape = self.ir.Shape(shape)
        self.graph.insert_before(self.before, [node])
        return out

    def const(self, array: Any) -> Any:
        """An initializer holding `array`."""
        array = np.asarray(array)
        key = ("const", array.dtype.str, array.shape, array.tobytes()) if array.size <= 16 else None
        if key is not None and key in self.shared:
            return self.shared[key]
        n = len(self.graph.initializers)
        while (name := f"const_{n}") in self.graph.initializers:
            n += 1
        value = self.ir.Value(name=name, const_value=self.ir.tensor(array, name=name))
        value.dtype = value.const_value.dtype
        value.shape = value.const_value.shape
        self.graph.register_initializer(value)
        if key is not None:
            self.shared[key] = value
        return value

    @staticmethod
    def known(value: Any) -> Any:
        """The numpy array of a constant value; None for a computed one."""
        return const_of(value)


def dims(value: Any) -> tuple[Size | None, ...] | None:
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


def const_of(value: Any) -> Any:
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
        return attribute.value.numpy()
    return np.asarray(attribute.value, _CONSTANTS[name]) if name in _CONSTANTS else None


def take_over(old: Any, new: Any) -> None:
    """`new` in the place of `old`, as a graph output too."""
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None:
        new.dtype = old.dtype
    old.replace_all_uses_with(new, replace_graph_outputs=True)
