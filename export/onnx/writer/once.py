"""What torch's exporter makes anew for every file although it is the same for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = ["made_once"]

_registries: dict[Any, tuple[int, Any]] = {}  # by the arguments that it was made with: what was registered then, and the registry


@contextmanager
def made_once() -> Iterator[None]:
    """Around `torch.onnx.export`, which compiles some five hundred translations, and lists composite operators once a namespace.

    That is more than half of the time of a small file. Within, the translations are those of the last file of this opset, as long
    as no operator has been registered since (torchvision brings some, and has translations of its own), and the operators are
    listed once. A release of torch that has neither function is left as it is.
    """
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    with (
        _replaced(_registration.ONNXRegistry, "from_torchlib", lambda make: staticmethod(_kept(make))),
        _replaced(utils, "_materialize_cpp_cia_ops", cache),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, by: Callable[[Any], Any]) -> Iterator[None]:
    """Attribute `name` is what `by` makes of it, for as long as the block runs; nothing where there is none."""
    held = vars(owner).get(name)
    if held is None:
        yield
        return
    setattr(owner, name, by(getattr(owner, name)))
    try:
        yield
    finally:
        setattr(owner, name, held)


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of the registry that `make` gave for the same arguments, for its reader may register more."""

    def from_torchlib(*args: Any, **kwargs: Any) -> Any:
        asked = args, tuple(kwargs.items())
        operators = hash(tuple(torch._C._dispatch_get_all_op_names()))
        if asked not in _registries or _registries[asked][0] != operators:
            _registries[asked] = operators, make(*args, **kwargs)
        registry = _registries[asked][1]
        copied = copy.copy(registry)
        copied.functions = {operator: list(found) for operator, found in registry.functions.items()}
        return copied

    return from_torchlib
