"""`--shapes`: the sizes that an engine is made for also say which axes of the model may vary, and fit the example to them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError

if TYPE_CHECKING:
    import torch

    from normfuse.app.sources import Source
    from normfuse.cli.options import Model
    from normfuse.export.tensorrt.profiles import Profile

__all__ = ["fitted"]


def fitted(model: Model, loaded: Source, profiles: Mapping[str, Profile]) -> tuple[Source, Any]:
    """`loaded` with example inputs inside `profiles`, and `dynamic_shapes` for the axes that vary in them.

    With --dynamic the user says which axes vary, and a .pt2 file knows it: then `loaded` stays as it is, and None.

    Raises:
        UsageError: the number of axes does not fit an input.
    """
    import torch

    if not profiles or model.dynamic or isinstance(loaded.model, torch.export.ExportedProgram):
        return loaded, None
    names = list(inspect.signature(loaded.model.forward).parameters)
    inputs = dict(zip(names, loaded.args, strict=False)) | loaded.kwargs
    spec: dict[str, dict[int, Any] | None] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            spec[name] = None
            continue
        profile = profiles.get(name)
        if profile is None:
            spec[name] = {}
            continue
        if len(profile.opt) != value.ndim:
            raise UsageError(f"--shapes: input {name!r} has {value.ndim} axes, and {profile} has {len(profile.opt)}")
        varying = [axis for axis in range(value.ndim) if profile.min[axis] != profile.max[axis]]
        # An example of size 1 would be taken for a fixed size. The usual size may be large, and proofs need none such.
        sizes = [
            max(2, min(max(size, profile.min[axis]), profile.max[axis])) if axis in varying else profile.opt[axis]
            for axis, size in enumerate(value.shape)
        ]
        inputs[name] = _resized(value, sizes)
        spec[name] = dict.fromkeys(varying, torch.export.Dim.DYNAMIC)
    count = len(loaded.args)
    args = tuple(inputs[name] for name in names[:count])
    kwargs = {name: inputs[name] for name in loaded.kwargs}
    return dataclasses.replace(loaded, args=args, kwargs=kwargs), spec if any(spec.values()) else None


def _resized(example: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Values of `example` over and over, in another shape: ids stay ids, masks stay masks."""
    import torch

    if list(example.shape) == sizes or not example.numel():
        return example
    index = [torch.arange(size) % now for size, now in zip(sizes, example.shape, strict=True)]
    return example[torch.meshgrid(*index, indexing="ij")] if example.ndim else example
