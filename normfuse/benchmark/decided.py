"""A measurement that decides nothing is made once more, for longer."""

from __future__ import annotations

from collections.abc import Callable

from normfuse.benchmark.comparison import Comparison, Verdict

__all__ = ["MORE", "decided"]

MORE = 2  # times as long, the second time


def decided(
    measured: Callable[[int], Comparison], at_least: float | None, on_undecided: Callable[[Comparison], None] | None = None
) -> Comparison:
    """`measured(1)`, or `measured(MORE)` where the first one decides nothing about `at_least`; `on_undecided` is told of that."""
    first = measured(1)
    if first.verdict(at_least) is not Verdict.UNDECIDED:
        return first
    if on_undecided is not None:
        on_undecided(first)
    return measured(MORE)
