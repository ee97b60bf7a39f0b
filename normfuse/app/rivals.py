"""One engine against several, in one interleaved measurement, and how close each is to the float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.benchmark.machine import cores
from normfuse.progress import progress_bar

__all__ = ["bench_each", "float_outputs", "sqnr_of"]


def bench_each(
    rivals: Sequence[Engine], challenger: Engine, schedule: Schedule, *, progress: bool = True,
    on_plan: Callable[[int, float], None] | None = None,
) -> list[Comparison]:  # fmt: skip
    """`challenger` against each of `rivals`: every engine has a turn in every round, a rival two, for the noise.

    Raises:
        NormfuseError: an engine could not be opened or failed while it ran.
    """
    twice = [e for rival in rivals for e in (rival, rival)]
    with progress_bar(f"{', '.join(e.name for e in rivals)} / {challenger.name}", show=progress) as bar:
        found = measure((*twice, challenger), schedule, on_plan=on_plan, on_round=bar.to)
    return [Comparison.of(found, a=2 * i, again=2 * i + 1, b=len(twice)) for i in range(len(rivals))]


def sqnr_of(engine: Engine, expected: Sequence[np.ndarray[Any, Any]], threads: int | None = None) -> float:
    """Of what `engine` gives on its inputs, in dB against `expected`; the least of the outputs, infinite for equal ones.

    Opens it in this process.
    """
    found = _arrays(engine.open(threads or len(cores()))())
    pairs = [(a, b) for a, b in zip(expected, found, strict=False) if a.shape == b.shape]
    if len(pairs) < len(expected):
        return float("nan")  # another number of outputs, or in another order: nothing is compared
    return min((_sqnr(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs), default=float("nan"))


def float_outputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    """The floats among the outputs of the model as it was given."""
    import torch

    with torch.inference_mode():
        return _arrays(module(*args, **kwargs))


def _sqnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    noise = float(np.square(a - b).sum())
    return float("inf") if noise == 0 else float(10 * np.log10(np.square(a).sum() / noise))


def _arrays(outputs: Any) -> list[np.ndarray[Any, Any]]:
    """Floats of whatever a runtime returns, in order."""
    import torch
    from torch.utils import _pytree as pytree

    leaves = list(outputs.values()) if hasattr(outputs, "to_dict") and hasattr(outputs, "values") else pytree.tree_leaves(outputs)
    tensors = [x.detach().float().cpu().numpy() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in leaves]
    return [np.asarray(x).copy() for x in tensors if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
