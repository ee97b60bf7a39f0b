"""What the modules of a folder state, so that a new file is all that it takes to state one more."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = ["stated"]

T = TypeVar("T")


def stated(package: str, path: Iterable[str], kind: type[T]) -> list[T]:
    """Every object of `kind` that a module of the package has a name for, once, in the order of modules.

    Args:
        package: `__name__` of the package.
        path: its `__path__`.
        kind: their class.
    """
    found: dict[int, Any] = {}
    for module in pkgutil.iter_modules(path):
        for value in vars(importlib.import_module(f"{package}.{module.name}")).values():
            if isinstance(value, kind):
                found[id(value)] = value
    return list(found.values())
