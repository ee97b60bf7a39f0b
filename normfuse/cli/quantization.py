"""--calibration: files or factories into batches."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.data.inputs import as_call, named_example
from normfuse.app.data.samples import Reading, batches_of, is_collection
from normfuse.app.data.texts import TEXT_SUFFIXES
from normfuse.app.factories import find
from normfuse.app.sources import Source
from normfuse.errors import MissingExtra, NormfuseError, UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["calibration_batches"]

_log = logging.getLogger(__name__)
_FILES = (".npz", ".npy", ".safetensors")
_FACTORY = "package.module:factory or FILE.py:factory"


def calibration_batches(text: str, loaded: Source, how: Reading | None = None) -> Iterable[Any]:
    """Batches of inputs from what `--calibration` names.

    That is a folder of images, a data set on disk, a file of texts, a file of arrays whose leading axis counts samples, or a
    factory that returns an iterable. All but the last are cut into batches of the example's size; what is left over is not used.

    Raises:
        UsageError: there is no such file or factory, or what it holds does not fit the model's inputs.
    """
    path = Path(text)
    if path.exists() and is_collection(path):
        try:
            return _Loader(text, batches_of(path, loaded, how or Reading()))
        except MissingExtra:
            raise
        except UsageError as e:
            said = str(e) if str(e).startswith("--") else f"--calibration {text}: {str(e).removeprefix(f'{text}: ')}"
            raise UsageError(said) from e
    if path.suffix in _FILES or path.exists():
        return _from_file(path, loaded)
    if ":" not in text:
        raise UsageError(
            f"--calibration {text}: expected a folder of images, a file ({', '.join((*_FILES, *TEXT_SUFFIXES))}), {_FACTORY}"
        )
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
        except NormfuseError:
            raise
        except Exception as e:
            raise UsageError(f"--calibration {self.text}: batch {i} could not be loaded: {type(e).__name__}: {e}") from e


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
    example = named_example(loaded)
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
        as_call({**example, **{k: t[i : i + size] for k, t in given.items()}}, len(loaded.args))
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
