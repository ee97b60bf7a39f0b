"""A bar that shows the rounds of a measurement, on terminals only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["rounds_bar"]


@contextmanager
def rounds_bar(label: str, *, show: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Yields what to call with (rounds done, rounds planned), or None when standard error is no terminal."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        yield None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def on_round(done: int, planned: int) -> None:
            bar.update(task, completed=done, total=planned)

        yield on_round
