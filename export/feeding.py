"""Arrays for the inputs of a file that is timed; no torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["fed"]


def fed(wanted: Mapping[str, str | None], arrays: Any, path: str) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a file by name.

    Args:
        wanted: the inputs in order, with the dtype of those of floats: it need not be that of the model that the file was made of.
        arrays: by name, or in the order of the inputs.
        path: of the file, for messages.

    Raises:
        UsageError: their number is another.
    """
    if isinstance(arrays, dict) and set(wanted) <= set(arrays):
        found = {name: arrays[name] for name in wanted}
    else:
        values = tuple(arrays.values()) if isinstance(arrays, dict) else tuple(arrays)
        if len(values) != len(wanted):
            raise UsageError(f"{path} takes {len(wanted)} inputs ({', '.join(wanted)}), got {len(values)}")
        found = dict(zip(wanted, values, strict=True))
    return {name: _as_taken(x, wanted[name]) for name, x in found.items()}


def _as_taken(array: Any, dtype: str | None) -> Any:
    return array.astype(dtype, copy=False) if dtype is not None and array.dtype.kind == "f" else array
