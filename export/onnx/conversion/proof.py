"""The new file against the one that it was made of: on the given inputs, on others like them, and at another size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from normfuse.errors import ExportError
from normfuse.export.onnx.compare import MIN_SQNR, deviation, sqnr
from normfuse.export.onnx.runtime import opened
from normfuse.export.session import Session
from normfuse.numerics.compare import like, nothing_in, resembling
from normfuse.reports.model import Error

__all__ = ["Held", "Original"]

log = logging.getLogger(__name__)
Feeds = dict[str, Tensor]


@dataclass(frozen=True)
class Held:
    """How far the new file is from the old one; `sqnr` in dB; `nothing`: why the comparison tells nothing, else empty."""

    error: Error
    sqnr: float
    nothing: str = ""


class Original:
    """The file that is given, opened, with what it answers.

    Args:
        path: the file.
        inputs: by name.
        threads: of ONNX Runtime; None for one for each CPU.

    Raises:
        ExportError: ONNX Runtime does not take it, or fails on the inputs.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Tensor], threads: int | None = None) -> None:
        session = opened(path, threads=threads)
        self.runs: list[tuple[str, Feeds, list[Tensor]]] = []
        for label, feeds in _trials(session, dict(inputs)):
            try:
                answer = session.outputs(feeds)
            except ExportError as e:
                if label == "example":
                    raise
                log.info("%s itself does not run on %s inputs: %s", path, label, e)
                continue
            self.names = list(answer)
            self.runs.append((label, feeds, list(answer.values())))

    def held(self, session: Session, bound: float) -> Held:
        """Compare what `session` answers.

        Args:
            session: the new file, opened.
            bound: on the relative deviation; infinite for a file that rounds to integers, which must have an SQNR of 40 dB.

        Raises:
            ExportError: it fails where the old file runs, has other outputs, or is farther away.
        """
        worst, quality = None, math.inf
        for label, feeds, expected in self.runs:
            answer = list(session.outputs(_as_taken(session, feeds)).values())
            if len(answer) != len(expected):
                raise ExportError(f"the new file gives {len(answer)} outputs, and the old one {len(expected)}")
            found = [a.to(e.dtype) if e.is_floating_point() else a for a, e in zip(answer, expected, strict=True)]
            worst = deviation(expected, found, self.names, label) | worst
            quality = min(quality, sqnr(expected, found))
        assert worst is not None
        if not worst.max_rel <= bound:
            raise ExportError(
                f"the new file deviates from the old one by {worst.max_rel:.1e} relative, above the bound {bound:.0e}"
            )
        if bound == math.inf and not quality >= MIN_SQNR:
            raise ExportError(f"the new file has {quality:.0f} dB against the old one, and must have {MIN_SQNR:.0f}")
        return Held(worst, quality, nothing_in([answers for _, _, answers in self.runs]))


def _trials(session: Session, inputs: Feeds) -> Iterator[tuple[str, Feeds]]:
    yield "example", inputs
    yield "random", dict(zip(inputs, like(list(inputs.values()), seed=0), strict=True))
    stated = {i.name: i.sizes for i in session.inputs}
    if any(isinstance(n, str) for sizes in stated.values() for n in sizes):
        generator = torch.Generator("cpu").manual_seed(1)
        yield "resized", {n: resembling(t, generator, _larger(t, stated.get(n, ()))) for n, t in inputs.items()}


def _larger(value: Tensor, stated: Sequence[int | str]) -> tuple[int, ...]:
    """Every free size one larger."""
    return tuple(n + isinstance(wanted, str) for n, wanted in zip(value.shape, stated, strict=True))


def _as_taken(session: Session, feeds: Feeds) -> Feeds:
    """Floats in the dtypes of the new file, in the order of its inputs where it has other names for them."""
    names = [i.name for i in session.inputs]
    values = list(feeds.values()) if not set(names) <= set(feeds) else [feeds[n] for n in names]
    taken = {}
    for wanted, value in zip(session.inputs, values, strict=True):
        dtype = getattr(torch, wanted.dtype, value.dtype)
        taken[wanted.name] = value.to(dtype) if value.is_floating_point() and dtype.is_floating_point else value
    return taken
