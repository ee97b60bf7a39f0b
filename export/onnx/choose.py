"""Which form of attention is fastest in the real runtime."""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from normfuse.errors import ExportError
from normfuse.export.onnx.runtime import run, session

__all__ = ["fastest"]

log = logging.getLogger(__name__)

_TURN = 0.02  # seconds; shorter runs are repeated within a turn
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60
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
    """The fastest of `files`, by name, and the latency of `plain` over the latency of each (median over rounds).

    Each form is measured against the plain one, in turns, never more than two models in memory. A form is taken only when
    it wins in three rounds of four; otherwise the plain one stays. A form that the runtime does not take is left out.
    """
    ratios: dict[str, float] = {}
    better: dict[str, float] = {}
    others = [name for name in files if name != plain]
    if not others:
        return plain, ratios
    first = session(files[plain], threads=threads)
    with _bar(len(others) * _MAX_ROUNDS, show=progress) as step:
        for name in others:
            try:
                second = session(files[name], threads=threads)
                rounds = _rounds(lambda: run(first, feeds), lambda s=second: run(s, feeds), seconds / len(others), step)  # type: ignore[misc]
            except ExportError as e:
                log.info("attention as %s: %s", name, e)
                continue
            ratios[name] = statistics.median(rounds)
            wins = sorted(rounds)[len(rounds) // 4]
            log.info("attention as %s: %.3fx, lower quarter %.3fx, %d rounds", name, ratios[name], wins, len(rounds))
            if wins > 1 and ratios[name] > _GAIN:
                better[name] = ratios[name]
    chosen = max(better, key=better.__getitem__, default=plain)
    return chosen, {plain: 1.0, **ratios}


def _rounds(a: Callable[[], Any], b: Callable[[], Any], seconds: float, step: Callable[[int], None]) -> list[float]:
    """Time of a over time of b, round by round."""
    start = time.perf_counter()
    for call in (a, b):
        call()
    once = min(_timed(a, 1), _timed(b, 1))
    n = max(1, round(_TURN / once))
    done: list[float] = []
    while len(done) < _MIN_ROUNDS or (len(done) < _MAX_ROUNDS and time.perf_counter() - start < seconds):
        order = (a, b) if len(done) % 2 else (b, a)  # neither profits from always being second
        times = {id(call): _timed(call, n) for call in order}
        done.append(times[id(a)] / times[id(b)])
        step(1)
    step(_MAX_ROUNDS - len(done))
    return done


def _timed(call: Callable[[], Any], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return time.perf_counter() - start


@contextlib.contextmanager
def _bar(total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    if not show or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring attention", total=total)
        yield lambda n: bar.advance(task, n)
