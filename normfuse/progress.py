"""A bar for what takes longer than people like to wait, on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Bar", "progress_bar"]


class Bar:
    """What is told about the work; says nothing where it is not shown."""

    def __init__(self, shown: Any = None) -> None:
        self._shown = shown
        self._task = None if shown is None else shown.task_ids[0]

    def advance(self, steps: int = 1) -> None:
        """That many steps are done."""
        self._update(advance=steps)

    def to(self, done: int, total: int) -> None:
        """`done` steps of `total` are done."""
        self._update(completed=done, total=total)

    def name(self, label: str) -> None:
        """What is being done now."""
        self._update(description=label)

    def _update(self, **what: Any) -> None:
        if self._shown is not None:
            self._shown.update(self._task, **what)


@contextmanager
def progress_bar(label: str, total: int | None = None, *, show: bool = True, clock: bool = False) -> Iterator[Bar]:
    """A bar on standard error, if that is a terminal and rich is installed, until the block ends.

    Args:
        label: in front of it.
        total: number of steps, where it is known.
        show: False for none anyway.
        clock: the time that has gone by instead of a bar, for what has no steps.
    """
    if not (show and sys.stderr.isatty()):
        yield Bar()
        return
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        yield Bar()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) if clock else Progress.get_default_columns()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        shown.add_task(label, total=total)
        yield Bar(shown)
