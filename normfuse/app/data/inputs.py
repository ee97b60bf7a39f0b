"""The inputs of a model by name, and which of them is an image or a text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from normfuse.app.sources import Source
from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_call", "image_input", "named_example", "tensors_of"]


def named_example(loaded: Source) -> dict[str, Any]:
    """The example inputs by the names of the model's parameters."""
    names = list(inspect.signature(loaded.module.forward).parameters)
    names += [f"arr_{i}" for i in range(len(names), len(loaded.args))]
    return dict(zip(names, loaded.args, strict=False)) | loaded.kwargs


def tensors_of(example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the inputs that are tensors, and no flags."""
    return {k: v for k, v in example.items() if hasattr(v, "shape")}


def image_input(example: Mapping[str, Any], source: str) -> str:
    """The name of the one input that is an image, [batch, channels, height, width].

    Raises:
        UsageError: there is no such input, or there are others beside it.
    """
    tensors = tensors_of(example)
    found = [k for k, v in tensors.items() if v.ndim == 4 and v.dtype.is_floating_point]
    if len(tensors) != 1 or len(found) != 1:
        told = ", ".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in tensors.items())
        raise UsageError(f"images are for a model that takes one image, and {source} takes {told or 'no tensor'}")
    return found[0]


def as_call(batch: dict[str, Any], positional: int) -> Any:
    """A tuple where the model is called by position, else a dictionary."""
    return tuple(batch.values())[:positional] if positional == len(batch) else batch
