"""A file that a runtime runs: `.onnx`, `.pt2`, a TensorRT engine; opened once and called as often as there are batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.cli.export import ENGINE_SUFFIXES
from normfuse.cli.onnx_files import by_name, is_onnx, type_of
from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILES", "opened_file"]

FILES = (".onnx", ".pt2", *ENGINE_SUFFIXES)
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
    if is_onnx(str(path)):
        return _onnx(path)
    return _program(path, trust=trust) if path.suffix == ".pt2" else _engine(path)


def _onnx(path: Path) -> Called:
    import torch

    from normfuse.export.onnx.runtime import run, session

    opened = session(path)
    types = {i.name: type_of(i) for i in opened.get_inputs()}

    def called(inputs: Any) -> dict[str, Tensor]:
        feeds = by_name(path, list(types), _tensors(inputs))
        for name, value in feeds.items():
            wanted = getattr(torch, types[name] or "", value.dtype)
            if value.is_floating_point() and wanted.is_floating_point:
                feeds[name] = value.to(wanted)
        return run(opened, feeds)

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


def _engine(path: Path) -> Called:
    from normfuse.export.tensorrt.flavour import find, load
    from normfuse.export.tensorrt.inspect import header
    from normfuse.export.tensorrt.runtime import open_engine

    opened = open_engine(path, load(find(header(path).module)))
    return lambda inputs: {name: value.cpu() for name, value in opened.run(inputs).items()}


def _tensors(inputs: Any) -> Any:
    """Without flags that are no tensors."""
    import torch

    if isinstance(inputs, Mapping):
        return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return tuple(v for v in inputs if isinstance(v, torch.Tensor))
