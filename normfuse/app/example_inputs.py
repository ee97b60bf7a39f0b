"""What a model is called with on the command line: `--shape`, `--input`, or what it declares."""

import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.source_options import Options
from normfuse.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["draw", "inputs_for", "parse_shape", "read_inputs"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dims>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "bool")


def inputs_for(model: Any, options: Options, own: Any = None) -> Inputs | None:
    """Example inputs of `model`: what the user states, else what the source brings, else what the model declares.

    Args:
        model: a module or an `ExportedProgram`.
        options: what the user states.
        own: inputs that the source brings, e.g. what a factory returned beside its model.
    """
    import torch

    from normfuse.given.declared_inputs import declared_inputs

    batch = 1 if options.batch is None else options.batch
    if batch < 1 or (options.tokens is not None and options.tokens < 1):
        raise UsageError("--batch and --seq must be at least 1")
    if options.input is not None:
        return _taken(model, _named(model, read_inputs(options.input)), f"--input {options.input}")
    if options.shapes:
        return _taken(model, _named(model, _drawn(model, options)), "--shape")
    if isinstance(model, torch.export.ExportedProgram):
        found = model.example_inputs
        return None if found is None else (tuple(found[0]), dict(found[1]))
    if own is not None:
        return _named(model, own)
    return declared_inputs(model, batch=batch, tokens=options.tokens)


def parse_shape(text: str) -> tuple[str | None, tuple[int, ...], str | None]:
    """`[NAME=]DIMxDIM...[:DTYPE]` as (name, sizes, dtype), e.g. `input_ids=1x128:int64`."""
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--shape {text!r}: expected [NAME=]SIZES[:DTYPE], e.g. 1x3x224x224 or input_ids=1x128:int64")
    dtype = found["dtype"]
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--shape {text!r}: unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    return found["name"], tuple(int(n) for n in found["dims"].split("x")), dtype


def _drawn(model: Any, options: Options) -> tuple[Any, ...] | dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    native = _native_dtype(model)
    drawn: list[tuple[str | None, Any]] = []
    for text in options.shapes:
        name, sizes, dtype_name = parse_shape(text)
        dtype = getattr(torch, dtype_name) if dtype_name else torch.int64 if name and name.endswith("_ids") else native
        value = draw(f"--shape {text}", sizes, dtype, generator, below=_vocabulary(model))
        drawn.append((name, _mask(value) if name and "mask" in name and not dtype.is_floating_point else value))
    names = [name for name, _ in drawn]
    if all(n is None for n in names):
        return tuple(value for _, value in drawn)
    if any(n is None for n in names) or len(set(names)) < len(names):
        raise UsageError("--shape: name all inputs, each once, or none of them")
    return {str(name): value for name, value in drawn}


def _mask(like: "torch.Tensor") -> "torch.Tensor":
    """Ones, and zeros at the end of the first sample: nothing masked would prove no masking."""
    import torch

    mask = torch.ones_like(like)
    if mask.ndim:
        mask[0, ..., mask.shape[-1] - mask.shape[-1] // 4 :] = 0
    return mask


def draw(text: str, sizes: Sequence[int], dtype: "torch.dtype", generator: "torch.Generator", *, below: int) -> "torch.Tensor":
    """Random values of these sizes; integers are at least 0 and less than `below`.

    Raises:
        UsageError: the memory of this machine does not hold them; `text` is what asked for it.
    """
    import torch

    size = math.prod(sizes) * 8
    if size > _memory():
        raise UsageError(f"{text}: {size / (1 << 30):.3g} GiB of values do not fit into the memory of this machine")
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, below, tuple(sizes), generator=generator).to(dtype)


def _memory() -> int:
    """Bytes of this machine; plenty where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1 << 40


def _taken(model: Any, inputs: Inputs, text: str) -> Inputs:
    """`inputs`, of which those of another kind or width than the weights are tried: some models convert them, most cannot.

    Raises:
        UsageError: the model does not run on them.
    """
    import torch
    from torch.utils import _pytree as pytree

    if not isinstance(model, torch.nn.Module):
        return inputs
    native = _native_dtype(model)
    looks_up = any(isinstance(m, (torch.nn.Embedding, torch.nn.EmbeddingBag)) for m in model.modules())
    names = list(inspect.signature(model.forward).parameters)
    named = dict(zip(names, inputs[0], strict=False)) | inputs[1]
    other = {
        name: str(x.dtype).removeprefix("torch.")
        for name, x in named.items()
        if isinstance(x, torch.Tensor) and x.dtype != native and (x.is_floating_point() or not looks_up)
    }
    if not other:
        return inputs
    args, kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=()):
            model(*args, **kwargs)
    except Exception as e:
        told = ", ".join(f"input {name} is {dtype}" for name, dtype in other.items())
        width = str(native).removeprefix("torch.")
        raise UsageError(
            f"{text}: {told}, the model computes in {width}, and does not run on it ({_first_line(e)}); give it as {width}"
        ) from e
    return inputs


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def _native_dtype(model: Any) -> "torch.dtype":
    import torch

    parameters = model.parameters() if hasattr(model, "parameters") and callable(model.parameters) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def _vocabulary(model: Any) -> int:
    """Ids below this are safe to look up; without any table, two values."""
    import torch

    if isinstance(size := getattr(getattr(model, "config", None), "vocab_size", None), int):
        return size
    if not isinstance(model, torch.nn.Module):
        return 2
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return max(2, tables[0]) if tables else 2


def read_inputs(path: Path) -> tuple[Any, ...] | dict[str, Any]:
    """Inputs in a file: `.npz` and `.safetensors` by name (`arr_0`, `arr_1`, ... by position), `.npy`, `.pt`.

    Raises:
        UsageError: the file is missing, of another kind, damaged, or holds anything but tensors.
    """
    import torch

    if not path.is_file():
        raise UsageError(f"--input {path} does not exist")
    arrays: Any
    try:
        if path.suffix in (".npz", ".npy"):
            import numpy as np

            loaded = np.load(path, allow_pickle=False)
            arrays = {k: torch.from_numpy(loaded[k]) for k in loaded} if path.suffix == ".npz" else torch.from_numpy(loaded)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            arrays = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            arrays = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UsageError(f"--input {path}: expected .npz, .npy, .pt or .safetensors")
    except UsageError:
        raise
    except Exception as e:
        raise UsageError(f"--input {path} cannot be read as tensors: {type(e).__name__}: {str(e).splitlines()[0]}") from e
    if isinstance(arrays, torch.Tensor):
        return (arrays,)
    if isinstance(arrays, Mapping):
        positional = [f"arr_{i}" for i in range(len(arrays))]
        return tuple(arrays[k] for k in positional) if set(positional) == set(arrays) else dict(arrays)
    if isinstance(arrays, (tuple, list)):
        return tuple(arrays)
    raise UsageError(f"--input {path} holds a {type(arrays).__name__}: expected a tensor, a tuple of tensors or a dict of tensors")


def _named(model: Any, inputs: Any) -> Inputs:
    """Positional and keyword inputs; names that the model does not take are an error."""
    import torch

    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if not isinstance(inputs, Mapping):
        return tuple(inputs), {}
    if isinstance(model, torch.nn.Module) and not isinstance(model, torch.fx.GraphModule):
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        unknown = [k for k in inputs if k not in parameters]
        if unknown and not open_ended:
            raise UsageError(f"{type(model).__name__}.forward takes no {', '.join(unknown)}; it takes {', '.join(parameters)}")
    return (), dict(inputs)
