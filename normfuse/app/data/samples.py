"""Batches for a model out of a folder of images, a data set on disk, or a file of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.app.data.datasets import Column, column_of_images, column_of_texts, is_dataset, open_dataset, rows_evenly
from normfuse.app.data.images import evenly, image_files, opened
from normfuse.app.data.inputs import as_call, image_input, named_example, tensors_of
from normfuse.app.data.preprocess import Preprocess
from normfuse.app.data.preprocess_of import preprocess_of
from normfuse.app.data.texts import TEXT_SUFFIXES, read_texts, text_batches
from normfuse.app.hf_folder import local_folder
from normfuse.app.sources import Source
from normfuse.app.tokenizers import tokenizer_in
from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reading", "batches_of", "is_collection", "prepared"]


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        preprocess: `--preprocess`; None for the model's own.
        most: samples that are read, evenly spread over what there is.
        trust: code of the model's folder may run, for its tokenizer.
    """

    preprocess: str | None = None
    most: int = 256
    trust: bool = False


def is_collection(path: Path) -> bool:
    """Is it for this module: a folder, or a file of texts?"""
    return path.is_dir() or path.suffix in TEXT_SUFFIXES


def batches_of(path: Path, loaded: Source, how: Reading) -> Iterable[Any]:
    """Calls of the model with what is there, each of the example's batch size; what is left over is not used.

    Raises:
        UsageError: it holds nothing that the model takes.
    """
    if not loaded.has_inputs:
        raise UsageError(f"{path}: the batch size is that of the example inputs: pass --shape or --input")
    example = named_example(loaded)
    if path.is_dir() and not is_dataset(path):
        files = evenly(image_files(path), how.most)
        return _Pictures(files, *prepared(loaded, how), len(loaded.args), _full(len(files), example, loaded, path))
    if not path.is_dir():
        return _texts(evenly(read_texts(path), how.most), loaded, how)
    data = open_dataset(path)
    rows = rows_evenly(data, how.most)
    if (column := column_of_images(data)) is not None:
        images = Column(data, column, rows)
        return _Pictures(images, *prepared(loaded, how), len(loaded.args), _full(len(rows), example, loaded, path))
    if set(tensors_of(example)) <= set(data.features):
        return _columns(data, rows, example, len(loaded.args), path)
    if (column := column_of_texts(data)) is not None:
        return _texts([str(t) for t in Column(data, column, rows)], loaded, how)
    held = ", ".join(f"{name}" for name in data.features)
    raise UsageError(f"{path} holds {held}; expected an image, a text, or the model's inputs {', '.join(tensors_of(example))}")


def prepared(loaded: Source, how: Reading) -> tuple[Preprocess, str, Tensor]:
    """How images are prepared for the model, the input that they are for, and its example."""
    example = named_example(loaded)
    name = image_input(example, loaded.name)
    return preprocess_of(loaded.name, loaded.model, how.preprocess), name, example[name]


def _full(count: int, example: dict[str, Any], loaded: Source, path: Path) -> int:
    """Samples that fill batches."""
    size = int(example[image_input(example, loaded.name)].shape[0])
    if count < size:
        raise UsageError(f"{path} holds {count} images, and one batch of the example inputs has {size}; pass --batch 1")
    return count - count % size


@dataclass(frozen=True)
class _Pictures:
    """Images, from files or from a data set, as calls of the model."""

    images: Any
    prepare: Preprocess
    name: str
    like: Tensor
    positional: int
    count: int

    def __iter__(self) -> Iterator[Any]:
        import torch

        size, channels, height, width = (int(n) for n in self.like.shape)
        for i in range(0, self.count, size):
            taken = (self.images[k] for k in range(i, i + size))
            found = [self.prepare(opened(v) if isinstance(v, Path) else v, channels, height, width) for v in taken]
            yield as_call({self.name: torch.stack(found).to(self.like.dtype)}, self.positional)


def _texts(texts: list[str], loaded: Source, how: Reading) -> Iterable[Any]:
    kind, _, folder = loaded.name.partition(":")
    if kind != "hf":
        raise UsageError(f"texts need the tokenizer of a Hugging Face folder (hf:DIR), and the model is {loaded.name}")
    tokenizer = tokenizer_in(local_folder(folder), trust=how.trust)
    return [as_call(b, len(loaded.args)) for b in text_batches(texts, tokenizer, named_example(loaded), loaded.name)]


def _columns(data: Any, rows: Sequence[int], example: dict[str, Any], positional: int, path: Path) -> Iterator[Any]:
    """Columns that are named as the model's inputs are."""
    import torch

    tensors = tensors_of(example)
    size = int(next(iter(tensors.values())).shape[0])
    for i in range(0, len(rows) - size + 1, size):
        some = data[list(rows[i : i + size])]
        batch = {}
        for name, like in tensors.items():
            try:
                batch[name] = torch.tensor(some[name]).to(like.dtype)
            except (TypeError, ValueError) as e:
                raise UsageError(f"{path}: {name} cannot be read as an array: {str(e).splitlines()[0]}") from e
        yield as_call(example | batch, positional)
