"""Files of a target given where a model is expected."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.example_inputs import draw, parse_shape, read_inputs
from normfuse.app.source_options import Options
from normfuse.errors import UsageError
from normfuse.export.targets import folder_of

if TYPE_CHECKING:
    import torch

    from normfuse.export.session import Session

__all__ = ["file_inputs", "is_file", "is_onnx", "opened_file", "run_file"]

_TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")


def is_onnx(source: str) -> bool:
    """Is the source named as an ONNX file is?"""
    return Path(source).suffix == ".onnx"


def is_file(source: str) -> bool:
    """Is the source named as a file is that some target writes and the CPU runs?"""
    folder = folder_of(source)
    return folder is not None and not folder.on_gpu


def file_inputs(path: Path, options: Options) -> "dict[str, torch.Tensor]":
    """Inputs for the file at `path` by name: those that the user states, else random ones of the sizes in the file.

    Raises:
        UsageError: there is no such file, or it leaves a size open that the user does not state.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    wanted = opened_file(path, threads=1).inputs
    if options.input is not None:
        return _by_name(path, [i.name for i in wanted], read_inputs(options.input))
    stated = [parse_shape(text) for text in options.shapes]
    named = {name: sizes for name, sizes, _ in stated if name is not None}
    unnamed = [sizes for name, sizes, _ in stated if name is None]
    generator = torch.Generator().manual_seed(options.seed)
    inputs = {}
    for position, wants in enumerate(wanted):
        sizes = named.get(wants.name) or (unnamed[position] if position < len(unnamed) else _declared(path, wants, options))
        kind = _type_of(wants)
        if kind is None:
            raise UsageError(f"{path}: input {wants.name} is a {wants.dtype}; pass its values with --input")
        # a file does not say how many ids it knows, but it knows two
        inputs[wants.name] = draw(f"--shape {wants.name}", sizes, getattr(torch, kind), generator, below=2)
    return inputs


def opened_file(path: Path, *, threads: int | None = None) -> "Session":
    """The file of a target at `path`, in its runtime."""
    folder = folder_of(path)
    assert folder is not None
    return folder.open(path, threads=threads)


def run_file(path: Path, inputs: Any) -> "list[torch.Tensor]":
    """Outputs of the file at `path` in its runtime, in order.

    Args:
        path: a file of a target.
        inputs: tensors by name, or in the order of the graph inputs; flags that are no tensors are left out. Floats are given in
            the dtype that the file takes, which need not be that of the model that it was made of.
    """
    import torch

    opened = opened_file(path)
    types = {i.name: _type_of(i) for i in opened.inputs}
    tensors: Any
    if isinstance(inputs, dict):
        tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    else:
        tensors = tuple(v for v in inputs if isinstance(v, torch.Tensor))
    feeds = _by_name(path, list(types), tensors)
    for name, value in feeds.items():
        wanted = getattr(torch, types[name] or "", value.dtype)
        if value.is_floating_point() and wanted.is_floating_point:
            feeds[name] = value.to(wanted)
    return list(opened.outputs(feeds).values())


def _type_of(value: Any) -> str | None:
    """Torch's name of the dtype of an input; None for one that torch does not have."""
    return value.dtype if value.dtype in _TYPES else None


def _by_name(path: Path, names: list[str], inputs: Any) -> "dict[str, torch.Tensor]":
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        return {n: inputs[n] for n in names}
    values = tuple(inputs.values()) if isinstance(inputs, dict) else tuple(inputs)
    if len(values) != len(names):
        raise UsageError(f"{path} takes {len(names)} inputs ({', '.join(names)}), got {len(values)}")
    return dict(zip(names, values, strict=True))


def _declared(path: Path, wants: Any, options: Options) -> tuple[int, ...]:
    sizes = []
    for axis, size in enumerate(wants.sizes):
        if isinstance(size, int):
            sizes.append(size)
        elif axis == 0:
            sizes.append(options.batch or 1)
        elif axis == 1 and options.tokens is not None:
            sizes.append(options.tokens)
        else:
            raise UsageError(f"{path} leaves the size {size!r} of input {wants.name} open: pass --shape {wants.name}=SIZES")
    return tuple(sizes)
