"""The nesting of arguments, in the releases of PyTorch that spell it differently."""

from typing import Any

__all__ = ["children"]


def children(spec: Any) -> list[Any]:
    """The specs of what a container holds: a method since PyTorch 2.10, an attribute before."""
    found: list[Any] = spec.children() if hasattr(spec, "children") else spec.children_specs
    return found
