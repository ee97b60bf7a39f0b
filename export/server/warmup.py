"""Requests that the server runs before it says that a model is ready: one item, and as many as it takes at once.

The first run of a model allocates memory and chooses algorithms; without warm-up, that is the latency of the first users. A warm-up
that fails makes the server refuse the model, so sizes that nothing is known about are tried here, and left out where they fail.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.runtime import session
from normfuse.export.server.signature import Signature, TensorSpec

__all__ = ["Warmup", "plan"]

log = logging.getLogger(__name__)

_SIZES = (16, 1, 32, 224)  # tried for axes other than the batch


@dataclass(frozen=True)
class Warmup:
    """Sizes of each input of one item, without the batch axis; `note` says why there are none."""

    shapes: Mapping[str, tuple[int, ...]] | None
    note: str = ""


def plan(artifact: Path, signature: Signature, max_batch: int, stated: Mapping[str, Sequence[int]]) -> Warmup:
    """Sizes for the warm-up: stated, those that the engine is best at, or tried in ONNX Runtime.

    Args:
        artifact: the ONNX file or the engine.
        signature: of `artifact`.
        max_batch: 0 for a model that is served without batching.
        stated: sizes by input, as they are in the file, with the batch axis.

    Raises:
        UsageError: stated sizes do not fit.
    """
    skip = 1 if max_batch else 0
    known = {t.name: t for t in signature.inputs}
    for name, sizes in stated.items():
        if name not in known:
            raise UsageError(f"warm-up: the model has no input {name!r}; its inputs are {', '.join(map(str, signature.inputs))}")
        _check(signature, known[name], tuple(sizes))
    if signature.profiles:
        usual = {name: profile.opt for name, profile in signature.profiles.items()}
        chosen = {t.name: tuple(stated.get(t.name, usual.get(t.name, t.dims)))[skip:] for t in signature.inputs}
        return Warmup(chosen)
    open_axes = [t for t in signature.inputs if t.name not in stated and -1 in t.dims[skip:]]
    if not open_axes and not stated:
        return Warmup({t.name: t.dims[skip:] for t in signature.inputs})
    return _tried(artifact, signature, skip, stated, sizes=_SIZES if open_axes else _SIZES[:1])


def _check(signature: Signature, tensor: TensorSpec, sizes: tuple[int, ...]) -> None:
    fits = len(sizes) == len(tensor.dims) and all(
        type(s) is int and s >= 1 and d in (-1, s) for s, d in zip(sizes, tensor.dims, strict=False)
    )
    profile = signature.profiles.get(tensor.name)
    if fits and profile is not None:
        fits = all(low <= s <= high for low, s, high in zip(profile.min, sizes, profile.max, strict=True))
    if not fits:
        bounds = "" if profile is None else f" from {list(profile.min)} to {list(profile.max)}"
        raise UsageError(
            f"warm-up: {tensor} cannot have the shape {list(sizes)}; expected {len(tensor.dims)} sizes that fit{bounds}"
        )


def _tried(
    artifact: Path, signature: Signature, skip: int, stated: Mapping[str, Sequence[int]], sizes: Sequence[int]
) -> Warmup:  # fmt: skip
    try:
        runs = session(artifact, threads=1)
    except ExportError as e:  # the file may need a newer runtime, or a library that only the server has
        return Warmup(None, f"no warm-up: {e}")
    problem = ""
    for size in sizes:
        shapes = {t.name: tuple(stated[t.name]) if t.name in stated else _sized(t, size, skip) for t in signature.inputs}
        try:
            runs.run(None, {t.name: np.zeros(shapes[t.name], t.dtype) for t in signature.inputs})
        except Exception as e:  # onnxruntime has an exception class for every status code, all private
            problem = " ".join(str(e).split())[:200]
            log.info("warm-up of %s with %s: %s", artifact, shapes, problem)
            continue
        return Warmup({name: shape[skip:] for name, shape in shapes.items()})
    if len(sizes) == 1:
        raise UsageError(f"warm-up: the model does not run on zeros of the stated shapes: {problem}")
    tried = ", ".join(map(str, sizes))
    return Warmup(
        None, f"no warm-up: the model runs on zeros with none of the sizes {tried} for its open axes; state warmup_shapes"
    )


def _sized(tensor: TensorSpec, size: int, skip: int) -> tuple[int, ...]:
    return tuple(s if isinstance(s, int) else 1 if axis < skip else size for axis, s in enumerate(tensor.shape))
