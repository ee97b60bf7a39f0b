"""Which form of attention is fastest in the real runtime."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from normfuse.benchmark.turns import in_turns, timed
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
    a: Callable[[], object], b: Callable[[], object], seconds: float, step: Callable[[int], None]
) -> tuple[list[float], list[float]]:
    """Times of the turns of a and of b."""
    start = time.perf_counter()
    a()
    b()
    runs = max(1, round(_TURN / min(timed(a), timed(b))))
    times: tuple[list[float], list[float]] = ([], [])
    for pair in in_turns(a, b, runs=runs):
        for kept, took in zip(times, pair, strict=True):
            kept.append(took)
        step(1)
        rounds = len(times[0])
        if rounds >= _MAX_ROUNDS or (rounds >= _MIN_ROUNDS and time.perf_counter() - start >= seconds):
            break
    step(_MAX_ROUNDS - rounds)
    return times
