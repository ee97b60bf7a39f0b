"""--quantize, --keep and --calibration: text into a `ShiftQuant`, and files or factories into batches."""

import dataclasses
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.factories import find
from normfuse.app.sources import Source
from normfuse.errors import NormfuseError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from normfuse.quant.spec import ShiftQuant

__all__ = ["calibration_batches", "parse_quantize"]

_WIDTHS = re.compile(r"w(\d+)(?:a(\d+))?")
_EXAMPLE = "e.g. w4a8 or w4a8,static,groups=1"
_ELSEWHERE = {"keep": "--keep PATTERN", "overrides": "overrides= in Python", "weight_bits": "w4a8", "activation_bits": "w4a8"}
_log = logging.getLogger(__name__)
_FILES = (".npz", ".npy", ".safetensors")
_FACTORY = "package.module:factory or FILE.py:factory"


def parse_quantize(text: str, keep: tuple[str, ...] = ()) -> "ShiftQuant":
    """`w4a8[,WORD][,NAME=VALUE]…` as a specification.

    A word is a value that only one field of `ShiftQuant` takes: `static`, `gptq`, `size`. Names and values are those of
    `ShiftQuant`.

    Raises:
        UsageError: a word, a name or a value is not known.
    """
    from normfuse.quant.spec import ShiftQuant

    values: dict[str, Any] = {"keep": keep}
    for part in (p.strip() for p in text.split(",")):
        widths = _WIDTHS.fullmatch(part)
        name, equals, value = (p.strip() for p in part.partition("="))
        if widths is not None:
            values["weight_bits"] = int(widths[1])
            values |= {"activation_bits": int(widths[2])} if widths[2] else {}
        elif equals:
            values[name] = _value(text, name, value)
        elif part in _words():
            values[_words()[part]] = part
        else:
            raise UsageError(f"--quantize {text}: {part!r} is not understood{_meant(part)}; {_EXAMPLE}")
    try:
        return ShiftQuant(**values)
    except UsageError as e:
        raise UsageError(f"--quantize {text}: {e}") from e


def calibration_batches(text: str, loaded: Source) -> Iterable[Any]:
    """Batches of inputs from a file, whose leading axis counts samples, or from a factory that returns an iterable.

    Samples of a file are cut into batches of the example's batch size; what is left over is not used.

    Raises:
        UsageError: there is no such file or factory, or what it holds does not fit the model's inputs.
    """
    path = Path(text)
    if path.suffix in _FILES or path.exists():
        return _from_file(path, loaded)
    if ":" not in text:
        raise UsageError(f"--calibration {text}: expected a file ({', '.join(_FILES)}), {_FACTORY}")
    found = _called(text)
    if isinstance(found, Mapping) or not isinstance(found, Iterable):
        raise UsageError(f"--calibration {text}: the factory returned a {type(found).__name__}; expected an iterable of batches")
    return _Loader(text, found)


@dataclasses.dataclass(frozen=True)
class _Loader:
    """The user's batches; what goes wrong in there is told as theirs."""

    text: str
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        i = 0
        try:
            for i, batch in enumerate(self.batches, 1):  # noqa: B007 (counts for the message)
                yield batch
        except Exception as e:
            raise UsageError(f"--calibration {self.text}: batch {i} could not be loaded: {type(e).__name__}: {e}") from e


# -- specification -------------------------------------------------------------------------------------------------------


def _fields() -> dict[str, Any]:
    from normfuse.quant.spec import ShiftQuant

    return {f.name: f.default for f in dataclasses.fields(ShiftQuant) if f.name not in _ELSEWHERE}


def _words() -> dict[str, str]:
    """Values that stand for themselves, with the field that takes them."""
    return {
        "static": "activations", "dynamic": "activations", "per_tensor": "granularity", "per_channel": "granularity",
        "search": "exponents", "range": "exponents", "minmax": "observer", "mse": "observer", "nearest": "rounding",
        "stochastic": "rounding", "gptq": "rounding", "speed": "prefer", "size": "prefer",
    }  # fmt: skip


def _value(text: str, name: str, value: str) -> Any:
    fields = _fields()
    if name not in fields:
        where = f"; set it with {_ELSEWHERE[name]}" if name in _ELSEWHERE else did_you_mean(name, list(fields))
        raise UsageError(f"--quantize {text}: ShiftQuant has no {name!r} to set here{where}")
    if value.lower() in ("none", "off") and name in ("embedding_bits", "size_budget", "sqnr_budget"):
        return None
    if isinstance(fields[name], bool):
        if value.lower() not in ("true", "false", "on", "off", "1", "0"):
            raise UsageError(f"--quantize {text}: {name}={value}: expected true or false")
        return value.lower() in ("true", "on", "1")
    if isinstance(fields[name], str):
        return value
    try:
        return float(value) if name in ("percentile", "size_budget", "sqnr_budget") else int(value)
    except ValueError as e:
        raise UsageError(f"--quantize {text}: {name}={value}: expected a number") from e


def _meant(part: str) -> str:
    """int8 and its like are what others call it."""
    bits = re.fullmatch(r"u?int(\d)|(?:q|i)(\d)", part.lower())
    if bits is not None:
        return f"; did you mean w{bits[1] or bits[2]}a8 (weights of {bits[1] or bits[2]} bits, activations of 8)?"
    return did_you_mean(part, [*_words(), *_fields()])


def _called(text: str) -> Any:
    """What the factory returns; a generator function, a list or a loader are all fine."""
    try:
        factory = find(text, f"a file ({', '.join(_FILES)}), {_FACTORY}")
    except NormfuseError as e:
        raise UsageError(f"--calibration {e}") from e
    if not callable(factory) or isinstance(factory, Iterable):
        return factory
    try:
        return factory()
    except NormfuseError:
        raise
    except Exception as e:
        raise UsageError(f"--calibration {text}: the factory failed: {type(e).__name__}: {e}") from e


# -- data ----------------------------------------------------------------------------------------------------------------


def _from_file(path: Path, loaded: Source) -> list[Any]:
    from normfuse.app.example_inputs import read_inputs

    if path.suffix not in _FILES:
        raise UsageError(f"--calibration {path}: expected {', '.join(_FILES)}, {_FACTORY}")
    try:
        data = read_inputs(path)
    except UsageError as e:
        raise UsageError(str(e).replace("--input", "--calibration", 1)) from e
    if not loaded.has_inputs:
        raise UsageError(f"--calibration {path}: the batch size is that of the example inputs: pass --shape or --input")
    example = _example(loaded)
    tensors = {k: v for k, v in example.items() if hasattr(v, "shape")}
    given = _for_inputs(path, data, list(tensors))
    flat = [str(k) for k, t in given.items() if not t.ndim]
    if flat:
        raise UsageError(f"--calibration {path}: {', '.join(flat)} is a single number; its leading axis should count samples")
    size = _batch_size(path, given, tensors)
    samples = min(len(t) for t in given.values())
    if not samples:
        raise UsageError(f"--calibration {path}: it holds no samples")
    if samples < size:
        raise UsageError(
            f"--calibration {path}: it holds {samples} samples, one batch of the example inputs has {size}; pass --batch 1"
        )
    return [
        _call({**example, **{k: t[i : i + size] for k, t in given.items()}}, len(loaded.args))
        for i in range(0, samples - size + 1, size)
    ]


def _batch_size(path: Path, given: dict[str, "Tensor"], example: dict[str, "Tensor"]) -> int:
    sizes = {v.shape[0] for v in example.values() if v.ndim}
    if len(sizes) != 1:
        raise UsageError(f"--calibration {path}: the inputs of the model have no batch axis in common; use {_FACTORY}")
    if len({len(t) for t in given.values()}) != 1:
        raise UsageError(f"--calibration {path}: its arrays have different numbers of samples along their leading axis")
    for k, t in given.items():
        if t.dtype.is_floating_point != example[k].dtype.is_floating_point:
            raise UsageError(
                f"--calibration {path}: {k} is {str(t.dtype).removeprefix('torch.')}, the model takes "
                f"{str(example[k].dtype).removeprefix('torch.')}"
            )
        given[k] = t.to(example[k].dtype)
    return int(next(iter(sizes)))


def _example(loaded: Source) -> dict[str, Any]:
    """The example inputs by the names of the model's parameters."""
    names = list(inspect.signature(loaded.module.forward).parameters)
    names += [f"arr_{i}" for i in range(len(names), len(loaded.args))]
    return dict(zip(names, loaded.args, strict=False)) | loaded.kwargs


def _for_inputs(path: Path, data: Any, wanted: list[str]) -> dict[str, Any]:
    """The arrays of the file by the inputs that they are for; what no input takes is left out, with a warning."""
    if not isinstance(data, Mapping):
        if len(data) == len(wanted):
            return dict(zip(wanted, data, strict=True))
        raise UsageError(f"--calibration {path}: it holds {len(data)} arrays; the model takes {len(wanted)}: {', '.join(wanted)}")
    if set(wanted) <= set(data):
        if left := [k for k in data if k not in wanted]:
            _log.warning("--calibration %s: %s left out, the model takes %s", path, ", ".join(left), ", ".join(wanted))
        return {k: data[k] for k in wanted}
    missing = [k for k in wanted if k not in data]
    held = ", ".join(data)
    names = ", ".join(f"{k}={k if k in data else '...'}" for k in wanted)
    save = f"np.savez({path.name!r}, {names})"
    raise UsageError(
        f"--calibration {path}: it holds {held}; the model takes {', '.join(wanted)}, and {', '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} missing{did_you_mean(missing[0], data, most=3)}; "
        f"name the arrays as the inputs: {save}"
    )


def _call(batch: dict[str, Any], positional: int) -> Any:
    """A tuple where the model is called by position, else a dictionary."""
    return tuple(batch.values())[:positional] if positional == len(batch) else batch
