"""What Python code sees while it is traced: stand-ins that record what is done to them, and that never answer for another type.

Plain fx proxies answer some questions wrongly: they are no tensors for `isinstance`, have every attribute for `hasattr`, print
their own name, hash by identity. Each such answer would silently take a wrong branch. Here the answer is that of the value at run
time, or an error that says what is not known.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, fx

from normfuse.capture.symbolic.messages import tells
from normfuse.capture.symbolic.traced_types import type_of

__all__ = ["TracedConstant", "TracedValue", "isinstance_answered"]

# these look at the proxy itself, not at what it stands for
_MACHINERY = ("torch.fx", "torch.nn.modules.module", "torch.nn.parameter", "torch.overrides", "torch.utils._pytree", "normfuse.")
_OF_CONSTANTS = {"ndim", "dtype", "device", "layout", "is_cuda", "is_meta", "requires_grad", "shape"}


class TracedValue(fx.Proxy):
    """A traced value."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name) and type_of(self.node) is Tensor:
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("shape", "data", "grad", "requires_grad", "names") or (not name.startswith("_") and hasattr(Tensor, name)):
            raise fx.proxy.TraceError(f"an assignment to .{name} writes in place")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        raise fx.proxy.TraceError("a value that is looked up in a set or a dictionary is not known")

    def __str__(self) -> str:
        return self._text(sys._getframe(1))

    def __format__(self, spec: str) -> str:
        return self._text(sys._getframe(1))

    def _text(self, reader: FrameType) -> str:
        if tells(reader):
            return f"<{self.node.name}>"
        raise fx.proxy.TraceError("a value that is turned into text is not known")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise fx.proxy.TraceError("an assignment to items writes in place")

    # fx knows no `y += x` and would read it as `y = y + x`, which loses the write where `y` is a view
    def _write(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __imatmul__(self, other: Any) -> Any:
        return self._write(operator.matmul, other)  # tensors have no such write

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)

    def __ipow__(self, other: Any) -> Any:
        return self._write(operator.ipow, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._write(operator.ifloordiv, other)

    def __imod__(self, other: Any) -> Any:
        return self._write(operator.imod, other)

    def __iand__(self, other: Any) -> Any:
        return self._write(operator.iand, other)

    def __ior__(self, other: Any) -> Any:
        return self._write(operator.ior, other)

    def __ixor__(self, other: Any) -> Any:
        return self._write(operator.ixor, other)

    def __ilshift__(self, other: Any) -> Any:
        return self._write(operator.ilshift, other)

    def __irshift__(self, other: Any) -> Any:
        return self._write(operator.irshift, other)


class _Attribute(TracedValue, fx.proxy.Attribute):
    """`x.name`: a call of a method, or a value of its own as soon as somebody reads it."""

    def __init__(self, root: TracedValue, name: str) -> None:
        fx.proxy.Attribute.__init__(self, root, name)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None or self._node._erased:  # an attempt that failed took it back
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return fx.proxy.Attribute.__call__(self, *args, **kwargs)


class TracedConstant(TracedValue):
    """A parameter or buffer: its shape is known, its values are not looked at."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Tensor) -> None:
        super().__init__(node, tracer)
        self.value = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name) if name in _OF_CONSTANTS else super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        return self.value.shape if dim is None else self.value.shape[dim]

    def dim(self) -> int:
        return self.value.ndim

    def numel(self) -> int:
        return self.value.numel()

    def is_floating_point(self) -> bool:
        return self.value.is_floating_point()

    def is_complex(self) -> bool:
        return self.value.is_complex()

    def __len__(self) -> int:
        return len(self.value)


@contextmanager
def isinstance_answered() -> Iterator[None]:
    """Inside the block `isinstance` knows, in every file, what traced values stand for."""
    plain = builtins.isinstance

    def answered(value: Any, kinds: Any) -> bool:
        if not issubclass(type(value), TracedValue) or _asked_by_machinery():
            return plain(value, kinds)
        found = type(value.value) if issubclass(type(value), TracedConstant) else type_of(value.node)
        if found is None:
            raise fx.proxy.TraceError(f"the type of {value.node.name} is not known")
        return issubclass(found, kinds) or issubclass(type(value), kinds)

    builtins.isinstance = answered
    try:
        yield
    finally:
        builtins.isinstance = plain


def _asked_by_machinery() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_MACHINERY)
