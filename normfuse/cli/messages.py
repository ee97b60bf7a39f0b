"""What the user is told when something went wrong: one message of few lines, whatever a library or a name wanted to say."""

import contextlib
import io
import logging
import re
from collections.abc import Iterator

import click

__all__ = ["concise", "unless_it_fails"]

_log = logging.getLogger(__name__)

_WORD, _LINE, _LINES = 200, 560, 6  # letters, letters, lines


def concise(text: str) -> str:
    """`text` with long words, long lines and all but the first lines shortened; its ends stay, where remedies stand."""
    lines = [_shortened(re.sub(rf"\S{{{_WORD},}}", lambda m: _cut(m[0], 80, 40), line), _LINE) for line in text.splitlines()]
    return "\n".join(
        lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"... and {len(lines) - _LINES + 1} more lines (-vv)"]
    )


def _shortened(line: str, letters: int) -> str:
    return line if len(line) <= letters else _cut(line, letters - 200, 180)


def _cut(text: str, head: int, tail: int) -> str:
    return f"{text[:head]}...({len(text):,} letters)...{text[-tail:]}"


@contextlib.contextmanager
def unless_it_fails() -> Iterator[None]:
    """Hold back what is printed in the block: libraries print graphs and tracebacks before they raise an error that says more.

    When the block ends well it goes to standard error, else into the log of -vv.
    """
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held), contextlib.redirect_stderr(held):
            yield
    except BaseException:
        _log.debug("printed before the error: %s", held.getvalue())
        raise
    if held.getvalue():
        click.echo(held.getvalue(), nl=False, err=True)
