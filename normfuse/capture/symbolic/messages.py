"""Is a line of Python only there to tell somebody something? A value that is not known yet may be named there."""

from __future__ import annotations

import ast
import functools
import linecache
from types import FrameType

__all__ = ["tells"]

_TELLING = {"_assert", "print", "warn", "warn_once", "warning", "warning_once", "info", "debug", "error", "exception", "log"}


def tells(frame: FrameType) -> bool:
    """Does the frame stand in a message: of an assertion, an exception, a warning, a log?"""
    spans = _messages(frame.f_code.co_filename)
    return any(first <= frame.f_lineno <= last for first, last in spans)


@functools.cache
def _messages(file: str) -> tuple[tuple[int, int], ...]:
    """First and last lines of statements whose text decides nothing."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError, RecursionError):
        return ()
    return tuple(
        (node.lineno, node.end_lineno or node.lineno) for node in ast.walk(tree) if isinstance(node, ast.stmt) and _is_message(node)
    )


def _is_message(node: ast.stmt) -> bool:
    match node:
        case ast.Raise() | ast.Assert():
            return True
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))):
            return name in _TELLING
        case _:
            return False
