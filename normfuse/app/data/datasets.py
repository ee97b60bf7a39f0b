"""Data sets of Hugging Face on disk, as `save_to_disk` wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfuse.errors import UsageError
from normfuse.extras import need

__all__ = ["Column", "column_of_images", "column_of_labels", "column_of_texts", "is_dataset", "open_dataset", "rows_evenly"]

_SPLITS = ("validation", "test", "train")  # the first that there is
_LABELS = ("label", "labels", "target", "fine_label", "class")


def is_dataset(folder: Path) -> bool:
    """Did `datasets` write this folder?"""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_dataset(folder: Path) -> Any:
    """The data set; of one with splits `validation`, else `test`, else `train`. Nothing is fetched.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    datasets = need("datasets", extra="data")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as e:  # of many kinds, from several libraries
        raise UsageError(f"{folder} cannot be read as a data set: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
    if isinstance(found, Mapping):
        split = next((s for s in _SPLITS if s in found), next(iter(found), None))
        if split is None:
            raise UsageError(f"{folder} is a data set without splits")
        found = found[split]
    if not len(found):
        raise UsageError(f"{folder} is a data set without samples")
    return found


def column_of_images(data: Any) -> str | None:
    """The column that holds images, where there is one."""
    return next((name for name, feature in data.features.items() if type(feature).__name__ == "Image"), None)


def column_of_texts(data: Any) -> str | None:
    """The column `text`, else the only one that holds strings."""
    strings = [name for name, feature in data.features.items() if getattr(feature, "dtype", None) == "string"]
    return "text" if "text" in strings else strings[0] if len(strings) == 1 else None


def column_of_labels(data: Any) -> str | None:
    """The column that holds classes."""
    classes = [name for name, feature in data.features.items() if type(feature).__name__ == "ClassLabel"]
    return next(iter(classes), None) or next((name for name in _LABELS if name in data.features), None)


@dataclass(frozen=True)
class Column(Sequence[Any]):
    """Some values of one column, each read when it is asked for."""

    data: Any
    name: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.data[self.rows[i]][self.name]


def rows_evenly(data: Any, most: int) -> Sequence[int]:
    """Positions of at most so many samples, evenly spread."""
    count = min(len(data), most)
    return [i * len(data) // count for i in range(count)]
