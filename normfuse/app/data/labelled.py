"""Samples with the class of each: folders of images a class, arrays with labels, data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.data.datasets import Column, column_of_images, column_of_labels, is_dataset, open_dataset, rows_evenly
from normfuse.app.data.images import evenly, image_files, opened
from normfuse.app.data.inputs import as_call, named_example, tensors_of
from normfuse.app.data.samples import Reading, prepared
from normfuse.app.example_inputs import read_inputs
from normfuse.app.sources import Source
from normfuse.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Labelled", "labelled"]

_KEYS = ("label", "labels", "y", "target", "targets", "class")
_FILES = (".npz", ".safetensors")


@dataclass(frozen=True)
class Labelled:
    """Samples, and the class of each where it is known.

    Attributes:
        inputs: for each input of the model, its samples: a sequence of tensors without the batch axis.
        labels: the class of each sample, as an index or a name; None without classes.
        example: the example inputs by name.
        positional: how many of them are given by position.
    """

    inputs: Mapping[str, Sequence[Tensor]]
    labels: Sequence[int | str] | None
    example: dict[str, Any]
    positional: int

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def _size(self) -> int:
        return int(next(iter(tensors_of(self.example).values())).shape[0])

    @property
    def batches(self) -> int:
        """How many there are."""
        return -(-len(self) // self._size)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Calls of the example's batch size, and how many of the rows count: the last ones may be repeated."""
        import torch

        size = self._size
        for start in range(0, len(self), size):
            rows = [min(i, len(self) - 1) for i in range(start, start + size)]
            batch = {k: torch.stack([v[i] for i in rows]).to(self.example[k].dtype) for k, v in self.inputs.items()}
            yield as_call(self.example | batch, self.positional), min(size, len(self) - start)


@dataclass(frozen=True)
class _Prepared(Sequence[Any]):
    """Images, each made an input when it is asked for; the last one is kept, as it may be asked for again."""

    images: Any
    prepare: Any
    like: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: Any) -> Any:
        value = self.images[i]
        _, channels, height, width = (int(n) for n in self.like.shape)
        return self.prepare(opened(value) if isinstance(value, Path) else value, channels, height, width)


def labelled(path: Path, loaded: Source, how: Reading) -> Labelled:
    """The samples at `path`.

    Raises:
        UsageError: there is nothing that the model takes.
    """
    if not loaded.has_inputs:
        raise UsageError(f"{loaded.name} declares no inputs: pass --shape or --input")
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.is_dir():
        return _images(path, loaded, how)
    if path.suffix not in _FILES:
        raise UsageError(f"expected a folder of images, a data set on disk, or a file ({', '.join(_FILES)}) with the entry label")
    return _arrays(path, loaded, how)


def _images(path: Path, loaded: Source, how: Reading) -> Labelled:
    prepare, name, like = prepared(loaded, how)
    labels: list[int | str] | None
    if is_dataset(path):
        data = open_dataset(path)
        rows, column, label = rows_evenly(data, how.most), column_of_images(data), column_of_labels(data)
        if column is None:
            raise UsageError(f"the data set holds no images ({', '.join(data.features)})")
        images: Any = Column(data, column, rows)
        names = getattr(data.features[label], "names", None) if label else None
        labels = None if label is None else [names[v] if names else int(v) for v in Column(data, label, rows)]
    else:
        images = evenly(image_files(path), how.most)
        classes = [file.parent.relative_to(path).parts for file in images]
        labels = [c[0] for c in classes] if all(classes) and len(set(classes)) > 1 else None
    return Labelled({name: _Prepared(images, prepare, like)}, labels, named_example(loaded), len(loaded.args))


def _arrays(path: Path, loaded: Source, how: Reading) -> Labelled:
    example = named_example(loaded)
    tensors = tensors_of(example)
    found = read_inputs(path)
    if not isinstance(found, Mapping):
        raise UsageError(f"its arrays have no names: name them {', '.join(tensors)} and label")
    missing = [k for k in tensors if k not in found]
    if missing:
        raise UsageError(f"it holds {', '.join(found)}, and {missing[0]} is missing{did_you_mean(missing[0], found)}")
    label = next((k for k in _KEYS if k in found and k not in tensors), None)
    count = len(found[next(iter(tensors))])
    for k in (*tensors, *([label] if label else ())):
        if found[k].shape[:1] != (count,):
            raise UsageError(f"{k} counts {found[k].shape[0] if found[k].ndim else 'no'} samples along its first axis, not {count}")
    for k, like in tensors.items():
        if found[k].shape[1:] != like.shape[1:] or found[k].is_floating_point() != like.is_floating_point():
            given, wanted = (f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}" for t in (found[k], like))
            raise UsageError(f"a sample of {k} is {given}, and the model takes {wanted}")
    rows = evenly(range(count), how.most)
    labels = None if label is None else [int(found[label][i]) for i in rows]
    return Labelled({k: [found[k][i] for i in rows] for k in tensors}, labels, example, len(loaded.args))
