"""Which form of attention is fastest in the real runtime."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from normfuse.errors import ExportError
from normfuse.export.onnx.runtime import run, session
from normfuse.progress import progress_bar

__all__ = ["fastest"]

log = logging.getLogger(__name__)

_TURN = 0.02  # seconds; shorter runs are repeated within a turn
_MIN_ROUNDS, _MAX_ROUNDS = 7, 60
# the threads of the model whose turn it is not must not spin beside the other
_CONFIG = {"session.force_spinning_stop": "1"}
_GAIN = 1.003  # a form must win by more than a clock and a scheduler lose


def fastest(
    plain: str,
    files: Mapping[str, Path],
    feeds: Mapping[str, Tensor],
    *,
    threads: int | None = None,
    seconds: float = 10.0,
    progress: bool = True,
) -> tuple[str, dict[str, float]]:
    """The fastest of `files`, by name, and the latency of `plain` over the latency of each.

    Each form is measured against the plain one, in turns, never more than two models in memory. What other processes do
    to a clock only ever makes a turn longer, so the fast turns count: a form is taken when it wins at the fastest fifth of
    the turns and at their median as well; otherwise the plain one stays. A form that the runtime does not take is left out.
    """
    ratios: dict[str, float] = {}
    better: dict[str, float] = {}
    others = [name for name in files if name != plain]
    if not others:
        return plain, ratios
    first = session(files[plain], threads=threads, config=_CONFIG)
    with progress_bar("measuring attention", len(others) * _MAX_ROUNDS, show=progress) as bar:
        for name in others:
            try:
                second = session(files[name], threads=threads, config=_CONFIG)
                turns = _turns(lambda: run(first, feeds), lambda s=second: run(s, feeds), seconds / len(others), bar.advance)  # type: ignore[misc]
            except ExportError as e:
                log.info("attention as %s: %s", name, e)
                continue
            a, b = (sorted(times) for times in turns)
            ratios[name] = a[len(a) // 5] / b[len(b) // 5]
            median = a[len(a) // 2] / b[len(b) // 2]
            log.info("attention as %s: %.3fx, median %.3fx, %d rounds", name, ratios[name], median, len(a))
            if ratios[name] > _GAIN and median > 1:
                better[name] = ratios[name]
    chosen = max(better, key=better.__getitem__, default=plain)
    return chosen, {plain: 1.0, **ratios}


def _turns(
    a: Callable[[], Any], b: Callable[[], Any], seconds: float, step: Callable[[int], None]
) -> tuple[list[float], list[float]]:
    """Times of the turns of a and of b."""
    start = time.perf_counter()
    for call in (a, b):
        call()
    n = max(1, round(_TURN / min(_timed(a, 1), _timed(b, 1))))
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < _MIN_ROUNDS or (len(times[0]) < _MAX_ROUNDS and time.perf_counter() - start < seconds):
        order = (0, 1) if len(times[0]) % 2 else (1, 0)  # neither profits from always being second
        for i in order:
            times[i].append(_timed((a, b)[i], n))
        step(1)
    step(_MAX_ROUNDS - len(times[0]))
    return times


def _timed(call: Callable[[], Any], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return time.perf_counter() - start
