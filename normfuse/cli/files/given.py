"""Files of a target given where a model is expected."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.example_inputs import draw, parse_shape, read_inputs
from normfuse.app.source_options import Options
from normfuse.errors import UsageError, did_you_mean
from normfuse.export.targets import folder_of

if TYPE_CHECKING:
    import torch

    from normfuse.export.session import Session

__all__ = ["by_name", "file_inputs", "is_file", "is_onnx", "session_of", "type_of"]

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
    wanted = session_of(path, threads=1).inputs
    if options.input is not None:
        return by_name(path, [i.name for i in wanted], read_inputs(options.input))
    stated = [parse_shape(text) for text in options.shapes]
    named = {name: sizes for name, sizes, _ in stated if name is not None}
    unnamed = [sizes for name, sizes, _ in stated if name is None]
    known = [i.name for i in wanted]
    for name in named:
        if name not in known:
            raise UsageError(f"--shape: {path} has no input {name!r}{did_you_mean(name, known)} (inputs: {', '.join(known)})")
    if len(unnamed) > len(known):
        raise UsageError(f"--shape: {path} takes {len(known)} inputs ({', '.join(known)}), and {len(unnamed)} are stated")
    generator = torch.Generator().manual_seed(options.seed)
    inputs = {}
    for position, wants in enumerate(wanted):
        sizes = named.get(wants.name) or (unnamed[position] if position < len(unnamed) else _declared(path, wants, options))
        kind = type_of(wants)
        if kind is None:
            raise UsageError(f"{path}: input {wants.name} is a {wants.dtype}; pass its values with --input")
        # a file does not say how many ids it knows, but it knows two
        inputs[wants.name] = draw(f"--shape {wants.name}", sizes, getattr(torch, kind), generator, below=2)
    return inputs


def session_of(path: Path, *, threads: int | None = None) -> "Session":
    """The file of a target at `path`, in its runtime."""
    folder = folder_of(path)
    assert folder is not None
    return folder.open(path, threads=threads)


def type_of(value: Any) -> str | None:
    """Torch's name of the dtype of an input; None for one that torch does not have."""
    return value.dtype if value.dtype in _TYPES else None


def by_name(path: Path, names: list[str], inputs: Any) -> "dict[str, torch.Tensor]":
    """The inputs, positional or named, by the names that the file has for them."""
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
