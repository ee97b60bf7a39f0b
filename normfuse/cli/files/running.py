"""A file that a runtime runs, that of a target or a `.pt2`; opened once and called as often as there are batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.cli.files.given import by_name, session_of, type_of
from normfuse.errors import UsageError
from normfuse.export.targets import FOLDERS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILES", "opened_file"]

FILES = (*(suffix for folder in FOLDERS.values() for suffix in folder.suffixes), ".pt2")
Called = Callable[[Any], "dict[str, Tensor]"]


def opened_file(path: Path, *, trust: bool = False) -> Called:
    """What runs the file: it takes a tuple or a dictionary of tensors and gives the outputs by name.

    Raises:
        UsageError: there is no such file, or it is of another kind.
    """
    if path.suffix not in FILES:
        raise UsageError(f"{path}: expected a file that a runtime runs ({', '.join(FILES)})")
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return _program(path, trust=trust) if path.suffix == ".pt2" else _target(path)


def _target(path: Path) -> Called:
    """Floats are given in the dtype that the file takes, which need not be that of the model that it was made of."""
    import torch

    opened = session_of(path)
    types = {i.name: type_of(i) for i in opened.inputs}

    def called(inputs: Any) -> dict[str, Tensor]:
        feeds = by_name(path, list(types), _tensors(inputs))
        for name, value in feeds.items():
            wanted = getattr(torch, types[name] or "", value.dtype)
            if value.is_floating_point() and wanted.is_floating_point:
                feeds[name] = value.to(wanted)
        return opened.outputs(feeds)

    return called


def _program(path: Path, *, trust: bool) -> Called:
    import torch
    from torch.utils import _pytree as pytree

    from normfuse.pt2 import load_program

    program = load_program(path, trust=trust)
    module = program.module()
    named = [str(o.arg.name) for o in program.graph_signature.output_specs if o.kind.name == "USER_OUTPUT"]

    def called(inputs: Any) -> dict[str, Tensor]:
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
        with torch.inference_mode():
            leaves = pytree.tree_leaves(module(*args, **kwargs))
        names = named if len(named) == len(leaves) else [f"output_{i}" for i in range(len(leaves))]
        return {k: v for k, v in zip(names, leaves, strict=True) if isinstance(v, torch.Tensor)}

    return called


def _tensors(inputs: Any) -> Any:
    """Without flags that are no tensors."""
    import torch

    if isinstance(inputs, Mapping):
        return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return tuple(v for v in inputs if isinstance(v, torch.Tensor))
