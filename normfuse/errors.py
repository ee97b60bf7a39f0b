"""Everything normfuse raises on purpose.

    NormfuseError
    ├─ UsageError       an argument is wrong: unknown pass, misspelt name, existing target
    │  └─ MissingExtra  an optional library is not installed; the message holds the pip line
    ├─ CaptureError     the model could not be turned into a graph
    ├─ RewriteError     a rewrite broke an invariant of the graph (a bug in a pass)
    ├─ ExportError      a runtime or a file format could not take the graph
    └─ CheckFailed      a check that the user asked for did not hold (exit code 1, not 2)
       └─ Undecided     it can neither be said to hold nor to fail (exit code 3)

A *refusal* is not an error: a rule that may not rewrite a site says so in the report.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "CheckFailed",
    "ExportError",
    "MissingExtra",
    "NormfuseError",
    "RewriteError",
    "Undecided",
    "UsageError",
    "did_you_mean",
]


class NormfuseError(Exception):
    """Base of all errors that normfuse raises on purpose; the message is meant for the user."""


class UsageError(NormfuseError):
    """An argument is wrong; the message says which, what was expected and what to do."""


class MissingExtra(UsageError):
    """An optional library is not installed; the message holds the pip line that installs it."""


class CaptureError(NormfuseError):
    """The model could not be turned into a graph."""


class RewriteError(NormfuseError):
    """A rewrite broke an invariant of the graph: a bug in a pass, never a mistake of the user."""


class ExportError(NormfuseError):
    """A runtime or a file format could not take the graph."""


class CheckFailed(NormfuseError):
    """A check that the user asked for did not hold."""


class Undecided(CheckFailed):
    """A measurement that the user asked for can neither be said to hold nor to fail on this machine."""


def did_you_mean(given: object, known: Iterable[str], *, most: int = 1) -> str:
    """`; did you mean 'A' or 'B'?` with up to `most` of the names in `known` that are nearest to `given`; "" where none is near."""
    near = [repr(name) for name in difflib.get_close_matches(str(given), list(known), most)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
