"""Patterns of module paths that match nothing are mistakes."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from normfuse.errors import UsageError
from normfuse.quant.scheme import Scheme

__all__ = ["check_patterns"]

_SHOWN = 6


def check_patterns(spec: Scheme, paths: Iterable[str]) -> None:
    """Every pattern of `keep` and `overrides` must match a layer.

    Raises:
        UsageError: one does not; the message names the layers that come nearest.
    """
    known = list(dict.fromkeys(paths))
    for option, patterns in (("keep", spec.keep), ("overrides", [p for p, _ in spec.overrides])):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in known):
                raise UsageError(f"{option}: no layer matches {pattern!r}; {_suggestion(pattern, known)}")


def _suggestion(pattern: str, known: Sequence[str]) -> str:
    if not known:
        return "the model has no layer that could be quantized"
    if any(path.startswith(f"{pattern}.") for path in known):
        return f"did you mean {pattern + '.*'!r}?"
    near = difflib.get_close_matches(pattern, known, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"there are {', '.join(known[:_SHOWN])}{more}"
