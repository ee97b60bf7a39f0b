"""Calibration batches of another size than the batch that the model was captured with.

A graph may hold its batch size b as a number, in a reshape for instance. Batches of n samples then run in pieces of b.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.ir.graph import Graph
from normfuse.numerics.compare import magnitude
from normfuse.numerics.evaluate import evaluate

__all__ = ["Batches"]

log = logging.getLogger(__name__)

_CLOSE = 1e-3  # relative: sums of another order are as close, samples of another place are not


class Batches:
    """Makes batches of inputs fit a graph, and says once by logging when it had to cut them.

    Args:
        graph: the graph.
        example: the inputs it was captured with, one for each placeholder; None if there were none.
    """

    def __init__(self, graph: Graph, example: Sequence[Any] | None) -> None:
        self._graph, self._example = graph, example
        self._cut: dict[str, int] = {}  # by the batch's sizes: samples a piece, 0 for a batch that runs as it is
        self._told = False

    def fitted(self, batch: list[Any], i: int) -> list[list[Any]]:
        """The batch, or its pieces of the captured size; samples that do not fill a piece are dropped.

        A batch runs as it is where its last samples then have the outputs that they have in a batch of the captured size.

        Args:
            batch: one value for each placeholder.
            i: its number, for messages.

        Raises:
            UsageError: it does not run through the graph, or has fewer samples than a piece.
        """
        key = str([(v.dtype, tuple(v.shape)) if isinstance(v, Tensor) else type(v) for v in batch])
        sizes = _sizes(self._example, batch)
        if key not in self._cut:
            self._cut[key] = self._samples_a_piece(batch, sizes, i)
        b = self._cut[key]
        if not b or sizes is None:
            return [batch]
        n = sizes[1]
        if not self._told:
            self._told = True
            lost = f", of which the last {n % b} samples are dropped" if n % b else ""
            log.info("calibration: batches of %d run in pieces of %d, the batch size of the example inputs%s", n, b, lost)
        return [_piece(self._example, batch, slice(at, at + b)) for at in range(0, n - n % b, b)]

    def _samples_a_piece(self, batch: list[Any], sizes: tuple[int, int] | None, i: int) -> int:
        if sizes is None:
            self._run(batch, i)
            return 0
        b, n = sizes
        at = [max(n - b, 0) + k % min(b, n) for k in range(b)]  # the last samples; they repeat where there are too few
        expected = self._run(_piece(self._example, batch, at), i)
        try:
            found = evaluate(self._graph, batch, exact=False)
        except Exception:  # any operator may object
            found = []
        if _agree(found, expected, sizes):
            return 0
        if n < b:
            raise UsageError(
                f"calibration: batch {i} ({_shapes(batch)}) has {n} samples, the model was captured with {b}; "
                "leave it out (drop_last=True), give a smaller example, or pass dynamic_shapes="
            )
        return b

    def _run(self, batch: list[Any], i: int) -> list[Tensor]:
        try:
            return evaluate(self._graph, batch, exact=False)
        except Exception as e:  # any operator may object
            raise UsageError(
                f"calibration: batch {i} ({_shapes(batch)}) does not run through the model as it was captured: {e}; "
                "pass dynamic_shapes= if sizes vary"
            ) from e


def _sizes(example: Sequence[Any] | None, batch: Sequence[Any]) -> tuple[int, int] | None:
    """Leading sizes (of the example, of the batch) where all inputs that differ do so in these alone; None elsewhere."""
    if example is None:
        return None
    found = {(e.shape[0], v.shape[0]) for e, v in zip(example, batch, strict=True) if _batched(e, v)}
    others = [
        e.shape == v.shape or _batched(e, v)
        for e, v in zip(example, batch, strict=True)
        if isinstance(e, Tensor) and isinstance(v, Tensor)
    ]
    return found.pop() if len(found) == 1 and all(others) and all(map(all, found)) else None


def _batched(e: Any, v: Any) -> bool:
    """Do they differ in their leading sizes alone?"""
    if not (isinstance(e, Tensor) and isinstance(v, Tensor)) or e.ndim == 0 or e.ndim != v.ndim:
        return False
    return e.shape[0] != v.shape[0] and e.shape[1:] == v.shape[1:] and e.shape[0] > 0 and v.shape[0] > 0


def _piece(example: Sequence[Any] | None, batch: Sequence[Any], at: Any) -> list[Any]:
    assert example is not None
    return [v[at] if _batched(e, v) else v for e, v in zip(example, batch, strict=True)]


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], sizes: tuple[int, int]) -> bool:
    """Do the last samples have the outputs that they have in a batch of the captured size?"""
    b, n = sizes
    if len(found) != len(expected):
        return False
    for whole, piece in zip(found, expected, strict=True):
        if piece.ndim and piece.shape[0] == b:
            if not whole.ndim or whole.shape[0] != n:
                return False
            shared = min(b, n)
            whole, piece = whole[-shared:], piece[:shared]
        if whole.shape != piece.shape:
            return False
        if not torch.allclose(whole.double(), piece.double(), rtol=_CLOSE, atol=_CLOSE * magnitude(piece), equal_nan=True):
            return False
    return True


def _shapes(batch: Sequence[Any]) -> str:
    return ", ".join(str(tuple(v.shape)) for v in batch if isinstance(v, Tensor))
